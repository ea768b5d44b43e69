"""Frozen parameters are sent to a worker that lacks them and never returned; their bytes follow the formula."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ist.api import train
from ist.config.methods import METHODS, trained_sizes
from ist.errors import ModelError, PoolError
from ist.loops.part import completed
from ist.monitoring.meter import Meter
from ist.pools.inline import InlinePool
from ist.runs.execute import execute
from ist.runs.split import split_of
from ist.subnet.job import Job, assignments
from ist.training.coordinator import Coordinator
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.frozen_parameters import FrozenCache, FrozenSender, frozen_bytes
from ist.transport.message import HEADER_BYTES, Message
from tests.conftest import assert_same, clone, data, job_for, naming, plain_loop
from tests.networks import NETWORKS, frozen_first, seeded
from tests.training.test_coordinator import FaultyPool
from tests.training.test_elastic import ChangingPool


class LoRA(nn.Module):
    """A frozen linear layer, and a trained low-rank matrix that is added to its weight."""

    def __init__(self, features: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(features, outputs).requires_grad_(requires_grad=False)
        self.down = nn.Parameter(torch.randn(rank, features) / features**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def lora() -> nn.Module:
    return nn.Sequential(LoRA(12, 64, 4), nn.ReLU(), LoRA(64, 32, 4), nn.ReLU(), LoRA(32, 5, 4))


def shared() -> nn.Module:
    """Return the frozen layers of `frozen_first`, which are not split, before trained layers, of which one is split."""
    return nn.Sequential(*frozen_first()[:4], nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))


SHARED = ["0", "2"]
"""Its groups that are not split."""


def history(job: Job) -> list[dict[str, Any]]:
    part = execute(job, progress=False)
    return part.recorder.history


def padded(tensors: Iterator[Tensor]) -> int:
    return sum(-(-tensor.nbytes // 64) * 64 for tensor in tensors)


def test_shared_frozen_parameters_are_sent_once_and_sliced_ones_when_they_change() -> None:
    model = seeded(frozen_first)
    job = job_for(model, train__workers=2, train__rounds=4, partition__exclude=["0"], pool__coordinator="dedicated")
    whole = dict(model.named_parameters())
    sliced = 40 * 12 * 4 + 64  # half of the second layer: 12 of 24 rows and biases, each padded to 64 bytes
    first = padded(iter([whole["0.weight"], whole["0.bias"]]))
    trained = padded(iter([whole["4.bias"]])) + (5 * 12 * 4 + 63) // 64 * 64

    records = history(job)

    for record in records:
        beside = HEADER_BYTES + sliced + (first if record["round"] == 0 else 0)
        assert record["bytes_to_worker"] == [HEADER_BYTES + trained + beside] * 2
        assert record["bytes_from_worker"] == [HEADER_BYTES + trained] * 2
    found = split_of(job).inspection
    assert records[-1]["sent_bytes"] == found.bytes_of_run
    assert records[2]["sent_bytes"] - records[1]["sent_bytes"] == found.bytes_per_round.ist
    assert found.shares[0].frozen_bytes == HEADER_BYTES + sliced + first


def test_frozen_parameters_are_counted_separately() -> None:
    found = split_of(job_for(seeded(lora))).inspection

    trained = 4 * (12 + 64) + 4 * (64 + 32) + 4 * (32 + 5)
    assert found.trained_parameters == trained
    assert found.parameters == trained + 12 * 64 + 64 + 64 * 32 + 32 + 32 * 5 + 5
    assert found.bytes_per_round.ddp == 2 * 3 * 4 * trained * 3
    assert [t.name for t in found.tensors if t.frozen] == [
        f"{layer}.base.{tensor}" for layer in (0, 2, 4) for tensor in ("weight", "bias")
    ]


@pytest.mark.parametrize("exchange", [{}, {"down": "int8", "up": "int8", "values": "deltas", "error_feedback": True}])
@pytest.mark.parametrize("scale", ["none", "folded"])
def test_frozen_parameters_do_not_drift(exchange: dict[str, Any], scale: str) -> None:
    model = seeded(lora)
    before = clone(model.state_dict())

    history(job_for(model, train__rounds=6, train__activation_scale=scale, exchange=exchange))

    after = clone(model.state_dict())
    assert_same(*({n: t for n, t in state.items() if "base" in n} for state in (before, after)))
    assert not any(torch.equal(before[name], after[name]) for name in before if "base" not in name)


def test_one_worker_with_frozen_parameters_is_plain_training() -> None:
    ours, plain = (seeded(lora) for _ in range(2))
    job = job_for(
        ours, train__workers=1, train__rounds=3, train__optimizer_state="carried", pool__coordinator="dedicated"
    )
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    records = history(job)
    plain_loop(plain, job, optimizer)

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))
    assert records[-1]["sent_bytes"] == split_of(job).inspection.bytes_of_run


def test_a_worker_that_was_lost_is_sent_all_frozen_parameters_again() -> None:
    model, meter = seeded(shared), Meter()
    job = job_for(model, train__workers=4, train__rounds=9, pool__min_returned=1, partition__exclude=SHARED)
    pool = FaultyPool(InlinePool(job, torch.device("cpu"), meter))
    made = Coordinator(job, pool, model, meter)
    sent, before = [], 0
    for round_number, lost in enumerate([(), (), (1,), (), ()]):
        pool.lost = lost
        completed(made.train_round(round_number))
        sent.append(meter.sent[1] - before)
        before = meter.sent[1]

    subnet = down_bytes(job.split, message_layouts(job.split, job.config.exchange, assignments(job).cuts(0)[1]), 1)
    beside = frozen_bytes(job.split, job.config.exchange, assignments(job).of(0)[1], None)
    # It is lost in the third round: after that the coordinator does not rely on its cache.
    assert beside > 4 * (40 * 12 + 24 * 40)
    assert sent == [subnet + beside, subnet, subnet, subnet + beside, subnet]


def test_shared_frozen_parameters_stay_cached_when_the_number_of_workers_changes() -> None:
    model, meter = seeded(shared), Meter()
    job = job_for(model, train__workers={"min": 1, "max": 3}, train__rounds=9, partition__exclude=SHARED)
    pool = ChangingPoolOfAny(job, meter, {0: 3, 1: 2, 2: 3})
    made = Coordinator(job, pool, model, meter)
    beside = frozen_bytes(job.split, job.config.exchange, assignments(job).of(0)[0], None)

    written, write = [], made._frozen.write

    def noted(process: str, worker: int, round_number: int, neurons: Any) -> Any:
        message, reuses_frozen = write(process, worker, round_number, neurons)
        written.append((round_number, worker, message.nbytes if message else 0))
        return message, reuses_frozen

    made._frozen.write = noted  # type: ignore[method-assign]
    for round_number in range(4):
        completed(made.train_round(round_number))

    # The third worker does not take part in the second round.
    assert [slot for *slot, sent in written if sent] == [[0, 0], [0, 1], [0, 2], [2, 2]]
    assert {sent for *_, sent in written} == {0, beside}


class ChangingPoolOfAny(ChangingPool):
    """A `ChangingPool` for networks of any class."""

    def results(self) -> Any:
        yield from InlinePool.results(self)


def test_a_frozen_part_that_is_neither_cached_nor_sent_is_an_error() -> None:
    model = seeded(frozen_first)
    job = job_for(model, train__workers=2)
    sender, worker = (
        FrozenSender(job.split, job.config.exchange, assignments(job), model.state_dict(), torch.device("cpu")),
        FrozenCache(job.split, job.config.exchange, assignments(job)),
    )
    message, reuses_frozen = sender.write("a", 0, 0, assignments(job).of(0)[0])
    assert message is not None
    assert not reuses_frozen

    worker.update(assignments(job).of(0)[0], 0, 0, message, torch.device("cpu"))

    with pytest.raises(PoolError, match=naming("worker 0", "'0.weight'", "round 1", "same version")):
        worker.update(assignments(job).of(1)[0], 0, 1, None, torch.device("cpu"))  # other neurons
    with pytest.raises(PoolError, match=naming("(layout, round, worker)", "same version")):
        worker.update(assignments(job).of(1)[0], 0, 1, message, torch.device("cpu"))  # an old message


def test_both_ends_derive_the_same_message() -> None:
    model = seeded(frozen_first)
    job = job_for(model, train__workers=2, train__rounds=6, partition__exclude=["0"])
    sender, worker, device = (
        FrozenSender(job.split, job.config.exchange, assignments(job), model.state_dict(), torch.device("cpu")),
        FrozenCache(job.split, job.config.exchange, assignments(job)),
        torch.device("cpu"),
    )
    whole = dict(model.named_parameters())
    for round_number in range(6):
        sender.begin(["a"])
        message, reuses_frozen = sender.write("a", 1, round_number, assignments(job).of(round_number)[1])
        layout = worker.layout(round_number, assignments(job).of(round_number)[1], reuses_frozen)
        assert reuses_frozen == (round_number not in (0, 4))
        assert (message.layout if message else None) == layout
        received = Message(layout, flat=message.flat.clone()) if layout and message else None

        worker.update(assignments(job).of(round_number)[1], 1, round_number, received, device)
        held = worker.tensors

        rows = assignments(job).of(round_number)[1][-1]
        assert torch.equal(held["0.weight"], whole["0.weight"])
        assert torch.equal(held["2.weight"], whole["2.weight"][rows])
        if round_number != 3:
            sender.returned("a")


class Averaging(nn.Module):
    """A network whose forward updates a slow copy of a layer, as in momentum contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(12, 16), nn.Linear(16, 5)
        self.slow = nn.Parameter(torch.zeros(5, 16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.slow.mul_(0.9).add_(self.last.weight, alpha=0.1)
        return self.last(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


def test_a_forward_that_changes_a_frozen_parameter_is_refused_before_the_run() -> None:
    with pytest.raises(ModelError, match=naming("'slow'", "requires_grad", "register_buffer")):
        train(Averaging(), data(), workers=1, rounds=1, progress=False)


def test_a_deep_frozen_part_without_norms_gives_finite_values_in_the_rehearsal() -> None:
    deep = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.ReLU()))).requires_grad_(False)
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 64), nn.ReLU(), deep, nn.Linear(64, 1), nn.Sigmoid()))
    inputs, targets = data().tensors
    pairs = TensorDataset(inputs, (targets > 2).float()[:, None])

    result = train(
        model, pairs, loss="binary_cross_entropy", workers=2, local_steps=2, rounds=2, partition={"exclude": ["2.*"]},
        progress=False,
    )  # fmt: skip

    assert math.isfinite(result.history[-1]["loss"])


def test_a_frozen_parameter_may_hold_non_finite_values() -> None:
    model = seeded(NETWORKS["no batch norm"])
    model.register_parameter("mask", nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False))

    train(model, data(), workers=2, local_steps=2, rounds=2, progress=False)

    assert model.mask[1] == -math.inf


def gpt2_with_lora() -> nn.Module:
    """Return a small GPT-2 in which only low-rank matrices (rank 8), added to its projections, are trained."""
    import transformers
    from transformers.pytorch_utils import Conv1D

    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).requires_grad_(requires_grad=False)
    for block in model.transformer.h:
        for parent, name in ((block.attn, "c_proj"), (block.mlp, "c_fc")):
            layer = getattr(parent, name)
            assert isinstance(layer, Conv1D)
            setattr(parent, name, Beside(layer, 8))
    return model  # type: ignore[no-any-return]


class Beside(nn.Module):
    """A frozen layer of transformers, and a trained low-rank matrix that is added to its weight."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        rows, columns = layer.weight.shape  # type: ignore[misc]
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, rows) / rows**0.5)
        self.up = nn.Parameter(torch.zeros(columns, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)  # type: ignore[no-any-return]


def test_fine_tuning_a_gpt2_with_lora_costs_what_local_sgd_costs_and_its_frozen_weights_once() -> None:
    tokens = torch.randint(64, (40, 16), generator=torch.Generator().manual_seed(0))
    model = seeded(gpt2_with_lora)
    before = clone(model.state_dict())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())

    records = train(
        model, TensorDataset(tokens, tokens), loss=loss, workers=2, local_steps=2, rounds=3, batch_size=4,
        progress=False, recipe={"stages": [{"keep": 1}]}, pool_options={"coordinator": "dedicated"},
    ).history  # fmt: skip

    # In a ring of two, each rank sends the trained bytes once. IST sends them to each of two workers and back.
    local_sgd = 2 * METHODS["local_sgd"].collective.rank_bytes(trained_sizes(trained), 2, 2)
    message = HEADER_BYTES + padded(iter(trained))
    frozen = HEADER_BYTES + padded(p for p in model.parameters() if not p.requires_grad)
    sent = [records[0]["sent_bytes"], *(b["sent_bytes"] - a["sent_bytes"] for a, b in pairwise(records))]
    assert sent == [4 * message + 2 * frozen, 4 * message, 4 * message]
    assert message == HEADER_BYTES + 4 * sum(p.numel() for p in trained)  # these need no padding
    assert 4 * message == 2 * local_sgd + 4 * HEADER_BYTES
    after = clone(model.state_dict())
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
