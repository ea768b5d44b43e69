"""Messages in fewer bits: how exact they are, how many bytes they have, and that nothing else changes."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ist.runs.execute import execute
from ist.subnet.cut import reassemble
from ist.subnet.job import Job, assignments
from ist.subnet.stores.parameter_store import LocalStore
from ist.transport.codec import MessageBuffers
from ist.transport.endpoints import SubnetWriter, WorkerEndpoint, message_layouts, read_trained
from ist.transport.quantize import dequantize, packed_columns, quantize
from tests.conftest import assert_same, clone, job_for, whole_state
from tests.networks import NETWORKS, seeded
from tests.neurons.networks import stack

BUILD = NETWORKS["two hidden layers, batch norm"]


def rounded(matrix: Tensor, bits: int) -> Tensor:
    return dequantize(*quantize(matrix, bits), matrix.shape[1], bits)


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 33), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_error_of_a_number_is_at_most_half_a_level_of_its_row(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * 10.0 ** torch.randint(
        -4, 4, (rows, 1), generator=generator
    )

    codes, scale = quantize(matrix, bits)
    found = dequantize(codes, scale, columns, bits)

    assert codes.shape == (rows, packed_columns(columns, bits)) == (rows, math.ceil(columns * bits / 8))
    level = matrix.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((found - matrix).abs() <= level * (0.5 + 1e-5)).all()  # 1e-5: float32 rounding of the quotient
    assert torch.equal(quantize(found, bits)[0], codes)


def test_a_row_of_zeros_stays_and_only_rows_with_non_finite_values_become_nan() -> None:
    matrix = torch.ones(4, 5)
    matrix[1], matrix[2, 3], matrix[3, 0] = 0.0, math.inf, math.nan

    found = rounded(matrix, 6)

    assert torch.equal(found[:2], matrix[:2])
    assert found[2:].isnan().all()


def there_and_back(job: Job, state: dict[str, Tensor], round_number: int, change: float = 0.0) -> list[MessageBuffers]:
    """Run a round in which every worker adds `change` to all its tensors; return the messages."""
    writer, cuts, messages, trained = (
        SubnetWriter(job.split, job.config.exchange),
        assignments(job).cuts(round_number),
        [],
        [],
    )
    for worker, (cut, neurons) in enumerate(zip(cuts, assignments(job).of(round_number), strict=True)):
        buffers = MessageBuffers(writer.layouts(cut))
        writer.write(LocalStore(state), cut, round_number, buffers)
        end = WorkerEndpoint(job.split, job.config.exchange, torch.device("cpu"))
        message = end.open(buffers)
        for tensor in message.tensors.values():
            tensor.add_(change)
        end.close(buffers, message, neurons)
        trained.append((worker, read_trained(job.config.exchange, LocalStore(state), cut, buffers)))
        messages.append(buffers)
    reassemble(state, cuts, trained, assignments(job).exclusive(0))
    return messages


@pytest.mark.parametrize(
    "exchange",
    [
        {},
        {"values": "deltas"},
        {"down": "int4", "values": "deltas"},
        {"down": "bfloat16", "up": "int2", "values": "deltas"},
    ],
    ids=str,
)
def test_a_subnet_that_is_returned_unchanged_changes_nothing(exchange: dict[str, Any]) -> None:
    model = seeded(BUILD)
    job = job_for(model, exchange=exchange)
    state = whole_state(job, model)
    before = clone(state)

    for round_number in range(3):
        there_and_back(job, state, round_number)

    assert_same(state, before)


def test_exact_weights_are_trained_in_the_received_buffer() -> None:
    job = job_for(seeded(BUILD))
    buffers = MessageBuffers(message_layouts(job.split, job.config.exchange, assignments(job).cuts(0)[0]))

    message = WorkerEndpoint(job.split, job.config.exchange, torch.device("cpu")).open(buffers)

    assert message.flat.data_ptr() == buffers.flat.data_ptr()


@pytest.mark.parametrize(("coding", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3), ("int8", 4e-3)])
def test_rounded_weights_return_with_the_precision_of_their_coding_and_vectors_bit_for_bit(
    coding: str, tolerance: float
) -> None:
    model = seeded(BUILD)
    job = job_for(model, exchange={"down": "exact", "up": coding})
    state = whole_state(job, model)
    before = clone(state)

    there_and_back(job, state, 0)

    for name, tensor in state.items():
        if tensor.ndim < 2:
            assert torch.equal(tensor, before[name])
        else:
            # relative to the row's largest magnitude: half a level of int8, half a unit in the last place of the others
            largest = before[name].abs().amax(dim=1, keepdim=True)
            assert (tensor - before[name]).abs().max() > 0
            assert ((tensor - before[name]).abs() <= tolerance * largest).all()


def test_the_change_is_merged_into_exact_weights_if_the_message_down_is_rounded() -> None:
    model = seeded(BUILD)
    job = job_for(model, exchange={"down": "int2", "up": "exact", "values": "deltas"})
    state = whole_state(job, model)
    before = clone(state)

    there_and_back(job, state, 0, change=0.25)

    shared = [name for name in state if name not in assignments(job).exclusive(0)]
    assert shared  # the output's bias
    changes = torch.cat([(state[name] - before[name]).flatten() for name in state])
    # 1e-6: a weight plus a quarter minus the weight in float32. Entries without a holder do not change.
    assert (((changes - 0.25).abs() < 1e-6) | (changes == 0)).all()
    assert (changes != 0).float().mean() > 0.5


@pytest.mark.parametrize(("coding", "bits"), [("int8", 8), ("int6", 6), ("int4", 4), ("float16", 16)])
def test_a_rounded_message_has_the_bytes_of_the_formula(coding: str, bits: int) -> None:
    job = job_for(seeded(BUILD), exchange={"down": coding, "up": "exact"})
    layouts = message_layouts(job.split, job.config.exchange, assignments(job).cuts(0)[1])

    expected = 128  # the header
    for spec in layouts.plain.specs.values():
        sizes = [math.prod(spec.shape) * 4]
        if len(spec.shape) == 2:
            rows, columns = spec.shape
            sizes = [rows * columns * 2] if bits == 16 else [rows * math.ceil(columns * bits / 8), rows * 4]
        expected += sum(math.ceil(size / 64) * 64 for size in sizes)

    assert layouts.down.nbytes == expected
    assert (
        layouts.up.nbytes == message_layouts(job.split, job.config.exchange, assignments(job).cuts(0)[1]).plain.nbytes
    )


def test_residuals_of_rounding_are_sent_later() -> None:
    model = seeded(BUILD)
    exchange = {"up": "int2", "values": "deltas", "error_feedback": True}
    job = job_for(model, train__workers=1, exchange=exchange)
    writer, state = SubnetWriter(job.split, job.config.exchange), whole_state(job, model)
    before, end, generator = (
        clone(state),
        WorkerEndpoint(job.split, job.config.exchange, torch.device("cpu")),
        torch.Generator().manual_seed(0),
    )
    true_change = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    def one_round(round_number: int) -> None:
        (cut,), (neurons,) = assignments(job).cuts(round_number), assignments(job).of(round_number)
        buffers = MessageBuffers(writer.layouts(cut))
        writer.write(LocalStore(state), cut, round_number, buffers)
        message = end.open(buffers)
        for name, tensor in message.tensors.items():
            change = torch.randn(tensor.shape, generator=generator)
            true_change[name] += change
            tensor.add_(change)
        end.close(buffers, message, neurons)
        reassemble(
            state,
            [cut],
            [(0, read_trained(job.config.exchange, LocalStore(state), cut, buffers))],
            assignments(job).exclusive(0),
        )

    for round_number in range(3):
        one_round(round_number)

    name = "linear_1.weight" if "linear_1.weight" in state else next(n for n, t in state.items() if t.ndim == 2)
    residual = end.residuals[name]
    # 1e-4: sums of three rounds in float32. Merged changes + residual = all changes.
    assert torch.allclose(state[name] - before[name] + residual, true_change[name], atol=1e-4)
    assert residual.abs().max() > 0.1


def test_residuals_of_blocks_are_kept_until_a_worker_holds_them_again() -> None:
    exchange = {"up": "int4", "values": "deltas", "error_feedback": True}
    blocks = {"strategy": "blocks", "blocks": ["1.*"], "min_depth": 2}
    job = job_for(stack(), train__workers=2, train__rounds=5, exchange=exchange, partition=blocks)

    assert len({str(assignments(job).of(number)[0]) for number in range(5)}) > 1
    part = execute(job, progress=False)

    assert part.recorder.history[-1]["loss"] < part.recorder.history[0]["loss"]


def test_a_run_with_eight_bits_learns_and_one_with_two_bits_learns_less() -> None:
    losses = {}
    for coding in ("exact", "int8", "int2"):
        job = job_for(
            seeded(BUILD), train__rounds=6, train__activation_scale="width", exchange={"down": coding, "up": coding}
        )
        part = execute(job, progress=False)
        losses[coding] = part.recorder.history[-1]["loss"]  # type: ignore[union-attr]

    assert losses["int8"] == pytest.approx(losses["exact"], rel=0.05)
    assert losses["int2"] > losses["exact"] * 1.1
