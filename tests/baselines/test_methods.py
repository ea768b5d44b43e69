"""The methods that IST is compared with: each matches a plain loop, sends the bytes of its formula, and can be resumed.

Ranks are processes that talk over gloo, three of them, on a network with batch norm and dropout.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ist.data.batches import fetch, take_shard
from ist.evaluation.evaluate import reestimate_statistics, statistics_batches
from ist.rng import Purpose, seeded
from ist.storage.checkpoint import read_tensors
from ist.subnet.job import Job
from tests.baselines.program import BASELINES, RESUMED, RUNS, WORKERS, build, build_plain, job
from tests.conftest import assert_same, clone, naming, run_forked_ranks

pytestmark = pytest.mark.procs

CPU = torch.device("cpu")
RING = 2 * (WORKERS - 1)  # sends of all ranks together, for one byte to average
NUMBERS = sum(parameter.numel() for parameter in build().parameters())
STEPS, ROUNDS = 3, 4

Mean = Callable[[Sequence[Tensor]], Tensor]
"""Returns the vector that all ranks get, from the vectors of all ranks."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    run_forked_ranks((WORKERS, "tests/baselines/program.py", folder))
    return folder


def weights(runs: Path, name: str) -> dict[str, Tensor]:
    return read_tensors(runs / f"{name}.safetensors")[0]


def records(runs: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((runs / f"{name}.json").read_text())
    return found


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=0, atol=tolerance), name


def large_batch_training(made: Job) -> dict[str, Tensor]:
    """One process whose batch contains the batches of all ranks; the mean of each rank has the same weight."""
    model = build_plain()
    optimizer = torch.optim.SGD(model.parameters(), **made.config.train.optimizer.args)
    shards = [take_shard(made.task.train_data, made.schedule.sampler.shard(rank)) for rank in range(WORKERS)]
    for step in range(made.schedule.total_steps):
        optimizer.zero_grad()
        for rank, shard in enumerate(shards):
            inputs, targets = fetch(shard, made.schedule.sampler.batch(rank, step), CPU)
            loss = nn.functional.cross_entropy(model(inputs), targets) / WORKERS
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()


def test_ddp_is_training_with_a_large_batch(runs: Path) -> None:
    # 1e-5: twelve steps of sums in another order
    assert_close(weights(runs, "ddp, no norm"), large_batch_training(job("ddp, no norm")), 1e-5)


def mean(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(vectors)).mean(dim=0)


def mean_in(dtype: torch.dtype) -> Mean:
    """The mean of vectors that are rounded to a dtype, and summed in it."""
    return lambda vectors: sum(vector.to(dtype) / WORKERS for vector in vectors).float()  # type: ignore[union-attr]


def in_int8(vector: Tensor) -> Tensor:
    """A vector of one block, rounded to the nearest of 255 levels."""
    level = vector.abs().max() / 127
    return (vector / level).round() * level


def nesterov(start: Tensor, average: Mean) -> Mean:
    """DiLoCo's outer optimizer, with the momentum and the learning rate of its paper."""
    common, momentum = start, torch.zeros_like(start)

    def step(vectors: Sequence[Tensor]) -> Tensor:
        nonlocal common, momentum
        change = average([common - vector for vector in vectors])
        momentum = 0.9 * momentum + change
        common = common - 0.7 * (change + 0.9 * momentum)
        return common

    return step


def ranks_in_one_process(
    made: Job, of_gradients: Mean | None = None, of_networks: Callable[[Tensor], Mean] | None = None
) -> dict[str, Tensor]:
    """Train the networks of all ranks in plain PyTorch, and return the parameters of the first.

    Args:
        made: Settings, and which samples a step uses.
        of_gradients: Applied to the ranks' gradients after each step; None: each rank uses its own.
        of_networks: Made from the parameters at the start, applied to the ranks' after each round.
    """
    models = [build().train() for _ in range(WORKERS)]
    train = made.config.train
    settings = train.optimizer
    optimizers = [getattr(torch.optim, settings.name)(model.parameters(), **settings.args) for model in models]
    shards = [take_shard(made.task.train_data, made.schedule.sampler.shard(rank)) for rank in range(WORKERS)]
    combine = of_networks(parameters_to_vector(models[0].parameters()).detach()) if of_networks else None
    for round_number in range(made.schedule.num_rounds):
        # Each rank draws its dropout from a generator of its own, which continues over the steps of a round.
        states = []
        for rank in range(WORKERS):
            with seeded(CPU, made.config.seed, Purpose.TRAINING, round_number, rank):
                states.append(torch.get_rng_state())
        for step in made.schedule.steps(round_number):
            for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                optimizer.zero_grad()
                torch.set_rng_state(states[rank])
                batch = made.schedule.sampler.batch(rank, step)
                for rows in np.array_split(batch, train.accumulate):
                    inputs, targets = fetch(shards[rank], rows, CPU)
                    with torch.autocast("cpu", torch.bfloat16, enabled=train.autocast is not None):
                        loss = nn.functional.cross_entropy(model(inputs), targets)
                    (loss * len(rows) / len(batch)).backward()
                states[rank] = torch.get_rng_state()
            if of_gradients:
                average_gradients(models, of_gradients)
            if train.clip_grad_norm is not None:
                for model in models:
                    nn.utils.clip_grad_norm_(model.parameters(), train.clip_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
        if combine:
            combined = combine([parameters_to_vector(model.parameters()).detach() for model in models])
            for model in models:
                vector_to_parameters(combined.clone(), model.parameters())
    return {name: parameter.data for name, parameter in models[0].named_parameters()}


def average_gradients(models: Sequence[nn.Module], average: Mean) -> None:
    for same in zip(*(model.parameters() for model in models), strict=True):
        gradient = average([parameter.grad for parameter in same])
        for parameter in same:
            parameter.grad = gradient.clone()


# 1e-5: twelve steps of sums in another order. Sums in half as many bits and in another order are off by a bit of the
# gradient, 1e-3 or 8e-3 of it, and it moves a weight by less than 0.1 a step. A change that lies between two of the 255
# levels may be rounded to the other one, and a level is less than 5e-3.
ORACLES: dict[str, tuple[Callable[[Path, Job], dict[str, Tensor]], float]] = {
    "ddp": (lambda _, made: ranks_in_one_process(made, of_gradients=mean), 1e-5),
    "ddp_fp16": (lambda _, made: ranks_in_one_process(made, of_gradients=mean_in(torch.float16)), 5e-4),
    "ddp_bf16": (lambda _, made: ranks_in_one_process(made, of_gradients=mean_in(torch.bfloat16)), 4e-3),
    "powersgd": (lambda runs, _: weights(runs, "PyTorch's own powersgd"), 1e-5),
    "local_sgd": (lambda _, made: ranks_in_one_process(made, of_networks=lambda _: mean), 1e-5),
    "diloco": (
        lambda _, made: ranks_in_one_process(made, of_networks=lambda start: nesterov(start, mean)), 1e-5,
    ),
    "diloco_int8": (
        lambda _, made: ranks_in_one_process(
            made,
            of_networks=lambda start: nesterov(start, lambda vectors: in_int8(mean(list(map(in_int8, vectors))))),
        ),
        5e-3,
    ),
}  # fmt: skip
"""For every method, a plain implementation, and the allowed difference."""


@pytest.mark.parametrize("method", BASELINES)
def test_a_method_trains_like_a_plain_pytorch_loop(runs: Path, method: str) -> None:
    oracle, tolerance = ORACLES[method]
    found, expected = weights(runs, method), oracle(runs, job(method))

    assert_close({key: found[key] for key in expected}, expected, tolerance)
    start = clone(dict(build().named_parameters()))
    assert all((expected[key] - start[key]).abs().max() > 4 * tolerance for key in start)


@pytest.mark.parametrize("method", ["ddp", "ddp_fp16", "powersgd", "local_sgd"])
def test_a_method_clips_and_accumulates_like_a_plain_pytorch_loop_and_sends_no_more(runs: Path, method: str) -> None:
    name = f"{method}, clipped, accumulated"
    oracle, tolerance = ORACLES[method]
    expected = weights(runs, f"PyTorch's own {name}") if method == "powersgd" else oracle(runs, job(name))
    found = weights(runs, name)

    assert_close({key: found[key] for key in expected}, expected, tolerance)
    assert any((found[key] - weights(runs, method)[key]).abs().max() > 4 * tolerance for key in expected)
    assert records(runs, name)[-1]["sent_bytes"] == records(runs, method)[-1]["sent_bytes"]


def test_a_step_function_trains_as_a_loss_does(runs: Path) -> None:
    assert_same(weights(runs, "ddp, by a step function"), weights(runs, "ddp, clipped, accumulated"))


def test_a_compiled_rank_trains_as_a_plain_one(runs: Path) -> None:
    assert_same(weights(runs, "ddp, compiled"), weights(runs, "ddp, in two parts"))


def test_numbers_that_a_step_returns_are_recorded_as_means_over_the_samples_of_all_ranks(runs: Path) -> None:
    made = job("ddp, by a step function")
    for record in records(runs, "ddp, by a step function"):
        batches = [
            made.schedule.sampler.batch(rank, step)
            for rank in range(WORKERS)
            for step in made.schedule.steps(record["round"])
        ]
        sizes = [len(part) for batch in batches for part in np.array_split(batch, 3)]
        assert record["logged"]["samples"] == pytest.approx(sum(size**2 for size in sizes) / sum(sizes))
        assert 0 < record["logged"]["right"] < 1


def test_ddp_computes_in_fewer_bits_like_a_plain_pytorch_loop(runs: Path) -> None:
    found, expected = (
        weights(runs, "ddp, in bfloat16"),
        ranks_in_one_process(job("ddp, in bfloat16"), of_gradients=mean),
    )

    # Sums in another order may move an activation to the next of bfloat16's numbers, 8e-3 of it away.
    assert_close({key: found[key] for key in expected}, expected, 4e-3)
    assert any(not torch.equal(found[key], weights(runs, "ddp")[key]) for key in expected)


@pytest.mark.parametrize("method", BASELINES)
def test_statistics_of_norms_are_taken_from_the_network_that_is_evaluated(runs: Path, method: str) -> None:
    made, state = job(method), weights(runs, method)
    model = build()
    model.load_state_dict(state)
    batches = statistics_batches(
        made.task.train_data, made.config.evaluate.batch_size, made.config.evaluate.statistics_batches, made.config.seed, CPU,
    )  # fmt: skip
    reestimate_statistics(model, batches)

    assert_close(clone(model.state_dict()), state, 1e-5)  # sums in another order
    assert records(runs, method)[-1]["loss"] < records(runs, method)[0]["loss"]


@pytest.mark.parametrize(("name", "tolerance"), [("ddp_fp16", 2e-3), ("ddp_bf16", 2e-2)])
def test_half_as_many_bytes_give_nearly_the_same_network(runs: Path, name: str, tolerance: float) -> None:
    whole, half = weights(runs, "ddp"), weights(runs, name)

    assert_close(half, whole, tolerance)
    assert any(not torch.equal(half[key], whole[key]) for key in whole)


def test_local_sgd_of_one_step_is_ddp(runs: Path) -> None:
    assert_close(weights(runs, "local SGD of one step, plain SGD"), weights(runs, "ddp, plain SGD"), 1e-5)
    assert records(runs, "local_sgd")[-1]["loss"] != records(runs, "ddp")[-1]["loss"]


def test_diloco_with_a_plain_outer_optimizer_is_local_sgd(runs: Path) -> None:
    same = weights(runs, "local SGD, plain SGD")

    assert_close(weights(runs, "diloco that takes the mean, plain SGD"), same, 1e-5)
    # Each round is off by at most a level of 1 / 127 of the largest change, twice.
    assert_close(weights(runs, "diloco_int8 that takes the mean, plain SGD"), same, 2e-2)


def powersgd_numbers(rank: int) -> int:
    """Numbers of a compressed step: rank x (rows + columns) of a matrix where that halves it at least."""
    total = 0
    for parameter in build().parameters():
        rows, columns = parameter.shape[0], parameter[0].numel()
        low = min(rank, rows, columns)
        total += (rows + columns) * low if (rows + columns) * low * 2 < rows * columns else rows * columns
    return total


def powersgd_bytes(rank: int, start: int) -> float:
    """Bytes of a run that compresses gradients to a rank from a step on."""
    compressed = powersgd_numbers(rank)
    assert compressed < NUMBERS / 2
    return 4 * RING * (start * NUMBERS + (STEPS * ROUNDS - start) * compressed)


EIGHT_BITS = -(-NUMBERS // (1024 * WORKERS)) * WORKERS * 1028
"""Bytes of the network in blocks of 1024 numbers with a scale of four bytes, as many for each rank."""

BYTES = {
    "ddp": 4 * RING * NUMBERS * STEPS * ROUNDS,
    "ddp_fp16": 2 * RING * NUMBERS * STEPS * ROUNDS,
    "ddp_bf16": 2 * RING * NUMBERS * STEPS * ROUNDS,
    "powersgd": powersgd_bytes(rank=1, start=2),
    "powersgd of rank 2": powersgd_bytes(rank=2, start=5),
    "local_sgd": 4 * RING * NUMBERS * ROUNDS,
    "diloco": 4 * RING * NUMBERS * ROUNDS,
    "diloco_int8": RING * EIGHT_BITS * ROUNDS,
}


@pytest.mark.parametrize("name", [*BASELINES, "powersgd of rank 2"])
def test_a_method_sends_the_bytes_of_its_formula(runs: Path, name: str) -> None:
    history = records(runs, name)

    assert history[-1]["sent_bytes"] == pytest.approx(BYTES[name], abs=WORKERS)  # each rank rounds its own
    if "powersgd" not in name:
        for before, after in pairwise(history):
            sent = after["sent_bytes"] - before["sent_bytes"]
            assert sent == pytest.approx(BYTES[name] / ROUNDS, abs=2 * WORKERS)


def test_powersgd_starts_like_ddp_and_then_differs(runs: Path) -> None:
    losses = {name: [r["loss"] for r in records(runs, name)] for name in ("ddp", "powersgd", "powersgd of rank 2")}

    assert losses["powersgd of rank 2"][0] == losses["ddp"][0]
    assert losses["powersgd of rank 2"][-1] != losses["ddp"][-1] != losses["powersgd"][-1]
    assert losses["powersgd"][-1] < losses["powersgd"][0]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_stopped_and_resumed_is_the_same_run(runs: Path, name: str) -> None:
    assert_same(weights(runs, f"{name}, resumed"), weights(runs, name))


@pytest.mark.parametrize("method", ["ddp", "local_sgd"])
def test_a_method_trains_the_same_with_an_optimizer_made_by_a_function(runs: Path, method: str) -> None:
    assert_same(weights(runs, f"{method}, by a function"), weights(runs, method))


@pytest.mark.parametrize("name", RUNS)
def test_compute_normalized_seconds_are_counted(runs: Path, name: str) -> None:
    history = records(runs, name)

    assert history[0]["virtual_s"] > 0
    assert all(after["virtual_s"] > before["virtual_s"] for before, after in pairwise(history))


@pytest.mark.parametrize("name", ["local_sgd, tied weights", "ddp, tied weights", "diloco_int8, tied weights"])
def test_tied_weights_stay_tied(runs: Path, name: str) -> None:
    state = weights(runs, name)

    assert torch.equal(state["0.weight"], state["2.weight"])
    assert records(runs, name)[-1]["loss"] < records(runs, name)[0]["loss"]


def refusals(runs: Path) -> list[dict[str, str]]:
    """The errors of each rank."""
    return [json.loads((runs / f"refused by rank {rank}.json").read_text()) for rank in range(WORKERS)]


def test_networks_that_a_method_cannot_train_are_refused_by_every_rank(runs: Path) -> None:
    for errors in refusals(runs):
        assert re.search(naming("ModelError: 'spare'", "gradient", "requires_grad_(False)"), errors["unused"])
        assert re.search(naming("ModelError: ", "one dtype", "torch.float32", "torch.float64"), errors["mixed"])


def test_ranks_with_other_data_are_refused_by_every_rank(runs: Path) -> None:
    for errors in refusals(runs):
        assert re.search(naming("DataError: rank 1 has 80", "rank 0 has 100", "every process"), errors["fewer samples"])
        assert re.search(naming("DataError: ", "rank 1, 2", "sample 0", "every process"), errors["other samples"])
