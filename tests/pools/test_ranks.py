"""The exchange between ranks, with all ranks in this process: they run in turns, over mailboxes instead of a network."""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ist.config.base import run_fingerprint
from ist.data.fingerprint import data_fingerprint
from ist.distributed import process_group as group
from ist.distributed.process_group import Membership, agree_on_start
from ist.errors import CheckpointError, PoolError
from ist.loops.part import completed
from ist.monitoring.meter import Meter
from ist.pools import torchrun
from ist.pools.inline import InlinePool
from ist.pools.torchrun import RankWorker, TorchrunPool
from ist.storage.checkpoint import read_tensors, write_tensors
from ist.subnet.job import Job, assignments, slot_of
from ist.tensors import TensorSpec
from ist.training.coordinator import Coordinator
from ist.training.rounds import run_rounds
from ist.training.worker_state import WorkerState
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.message import HEADER_BYTES, Header, Message, layout_of
from tests.conftest import assert_same, clone, data, job_for, naming, small_config
from tests.networks import NETWORKS, seeded
from tests.pools.scenario import rounds_without_waiting

CPU = torch.device("cpu")


@dataclass
class Ranks:
    """A replacement of `torch.distributed`: rank 0 runs, and each rank that it waits for runs until it has sent."""

    followers: dict[int, RankWorker] = field(default_factory=dict)
    mail: defaultdict[tuple[int, int], deque[Tensor]] = field(default_factory=lambda: defaultdict(deque))
    crossed: int = 0
    round_number: int = 0
    now: int = 0
    memory: set[int] = field(default_factory=set)
    """The addresses of the messages of rank 0."""

    isend, irecv, Work = "send", "receive", object

    def P2POp(self, what: str, flat: Tensor, peer: int) -> tuple[str, Tensor, int]:  # noqa: N802 (torch's name)
        return what, flat, peer

    def batch_isend_irecv(self, operations: list[tuple[str, Tensor, int]]) -> list[Any]:
        works = []
        for what, flat, peer in operations:
            if self.now == 0:
                self.memory.add(flat.data_ptr())
            if what == "send":
                self.mail[self.now, peer].append(flat.clone())
                self.crossed += flat.nbytes
                works.append(SimpleNamespace(wait=lambda: None))
            else:
                works.append(SimpleNamespace(wait=lambda me=self.now, flat=flat, peer=peer: self._take(me, flat, peer)))
        return works

    def _take(self, me: int, flat: Tensor, peer: int) -> None:
        if not self.mail[peer, me]:
            self.now = peer
            completed(self.followers[peer].train_round(self.round_number))
            self.now = me
        flat.copy_(self.mail[peer, me].popleft())


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    made = Ranks()
    monkeypatch.setattr(torchrun, "dist", made)
    yield made
    assert not any(made.mail.values()), "a message was sent and not received"


def membership(rank: int, world_size: int) -> Membership:
    return Membership(rank, world_size, CPU, "gloo")


def by_ranks(ranks: Ranks, job: Job, model: nn.Module, spare: int) -> tuple[Coordinator, Meter]:
    """A coordinator whose workers are ranks; `spare` is 1 if the coordinator is dedicated."""
    size, meter = job.config.train.workers + spare, Meter()
    ranks.followers = {rank: RankWorker(job, membership(rank, size)) for rank in range(1, size)}
    return Coordinator(job, TorchrunPool(job, membership(0, size), meter), model, meter), meter


@pytest.mark.parametrize("spare", [0, 1], ids=["rank 0 trains", "rank 0 only coordinates"])
@pytest.mark.parametrize("buffers", [None, 1], ids=["a buffer each", "one buffer"])
@pytest.mark.parametrize("exchange", [{}, {"down": "int8", "up": "int8", "values": "deltas"}], ids=["exact", "int8"])
def test_ranks_end_with_the_weights_of_the_inline_pool_and_count_each_byte_once(
    ranks: Ranks, spare: int, exchange: dict[str, Any], buffers: int | None
) -> None:
    model = seeded(NETWORKS["two hidden layers, batch norm"])
    pool = {"kind": "torchrun", "message_buffers": buffers}
    settings = {"train__workers": 3, "exchange": exchange, "pool": pool}
    job, alone = job_for(model, **settings), clone(model.state_dict())
    expected = seeded(NETWORKS["two hidden layers, batch norm"])
    expected.load_state_dict(alone)
    inline = Coordinator(job, InlinePool(job, CPU, Meter()), expected, Meter())
    coordinator, meter = by_ranks(ranks, job, model, spare)

    for round_number in range(job.schedule.num_rounds):
        ranks.round_number = round_number
        completed(coordinator.train_round(round_number))
        completed(inline.train_round(round_number))

    assert_same(model.state_dict(), expected.state_dict())
    workers = range(1 - spare, 3)
    all_layouts = [
        [message_layouts(job.split, job.config.exchange, assignments(job).cuts(number)[worker]) for worker in workers]
        for number in range(job.schedule.num_rounds)
    ]
    down = sum(down_bytes(job.split, layouts, number) for number, row in enumerate(all_layouts) for layouts in row)
    up = sum(layouts.up.nbytes for row in all_layouts for layouts in row)
    assert (meter.sent.total(), meter.received.total()) == (down, up)
    assert coordinator.bytes_sent() == meter.total_bytes == down + up == ranks.crossed
    assert set(meter.sent) == set(meter.received) == set(workers)
    assert len(ranks.memory) == (buffers or len(workers))


@pytest.mark.parametrize(("spare", "buffers"), [(0, None), (1, 1)])
def test_a_worker_can_be_given_its_next_subnet_while_the_results_of_others_are_awaited(
    ranks: Ranks, spare: int, buffers: int | None
) -> None:
    model = seeded(NETWORKS["no batch norm"])
    pool = {"kind": "torchrun", "message_buffers": buffers}
    job = job_for(model, train__workers=2, train__rounds=3, pool=pool)
    coordinator, _ = by_ranks(ranks, job, model, spare)
    for follower in ranks.followers.values():
        train, rounds = follower.train_round, iter(range(3))
        follower.train_round = lambda _, train=train, rounds=rounds: train(next(rounds))  # type: ignore[method-assign, misc]

    by_pool = [
        rounds_without_waiting(pool, job, model, 3) for pool in (InlinePool(job, CPU, Meter()), coordinator._pool)
    ]

    every = [(worker, number) for worker in range(2) for number in range(3)]
    assert [sorted(returned) for returned in by_pool] == [every, every]


def test_a_rank_with_another_network_refuses_the_subnet(ranks: Ranks) -> None:
    model, other = seeded(NETWORKS["no batch norm"]), seeded(NETWORKS["uneven widths"])
    job = job_for(model, train__workers=2, pool__kind="torchrun")
    coordinator, _ = by_ranks(ranks, job, model, spare=0)
    ranks.followers = {1: RankWorker(job_for(other, train__workers=2, pool__kind="torchrun"), membership(1, 2))}
    ranks._take = lambda me, flat, peer: _take_what_fits(ranks, me, flat, peer)  # type: ignore[method-assign]

    with pytest.raises(PoolError, match=naming("(layout, round, worker)")):
        completed(coordinator.train_round(0))
    ranks.mail.clear()


def _take_what_fits(ranks: Ranks, me: int, flat: Tensor, peer: int) -> None:
    if not ranks.mail[peer, me]:
        ranks.now = peer
        completed(ranks.followers[peer].train_round(ranks.round_number))
    there = ranks.mail[peer, me].popleft()
    length = min(len(there), len(flat))
    flat[:length] = there[:length]


@pytest.mark.parametrize(
    "theirs",
    [
        {"a": TensorSpec((4, 8), torch.float32), "c": TensorSpec((8,), torch.float32)},
        {"a": TensorSpec((8, 4), torch.float32), "b": TensorSpec((8,), torch.float32)},
        {"a": TensorSpec((4, 8), torch.int32), "b": TensorSpec((8,), torch.float32)},
        {"b": TensorSpec((8,), torch.float32), "a": TensorSpec((4, 8), torch.float32)},
    ],
    ids=["another name", "another shape", "another dtype", "another order"],
)
def test_a_message_with_another_layout_of_the_same_length_is_refused(theirs: dict[str, TensorSpec]) -> None:
    ours = {"a": TensorSpec((4, 8), torch.float32), "b": TensorSpec((8,), torch.float32)}
    received = Message(layout_of(ours))
    received.write_header(Header(3, 1))

    as_theirs = Message(layout_of(theirs), flat=received.flat)

    assert received.read_header(3, 1) == Header(3, 1)
    assert received.nbytes == as_theirs.nbytes == HEADER_BYTES + 4 * 32 + 64
    with pytest.raises(PoolError, match=naming("(layout, round, worker)")):
        as_theirs.read_header(3, 1)
    for other in ((2, 1), (3, 0)):
        with pytest.raises(PoolError, match=naming("(layout, round, worker)")):
            received.read_header(*other)


def agreed(monkeypatch: pytest.MonkeyPatch, rank: int, starts: list[tuple[int, int]]) -> int:
    """Return the first round that a rank agrees on, if ranks have these (first round, fingerprint)."""
    contents = data_fingerprint(data(), 3), data_fingerprint(data(40, seed=4), 3)

    def gather(said: list[Tensor], own: Tensor) -> None:
        for slot, start in zip(said, starts, strict=True):
            slot.copy_(torch.tensor([*start, *own[2:].tolist()], dtype=own.dtype))

    monkeypatch.setattr(group.dist, "all_gather", gather)
    return agree_on_start(membership(rank, len(starts)), *starts[rank], contents)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_rank_starts_at_the_first_round_of_rank_0_and_refuses_another_configuration(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    assert agreed(monkeypatch, rank, [(5, 17), (0, 17), (9, 17)]) == 5
    with pytest.raises(PoolError, match=naming("rank 2", "configuration")):
        agreed(monkeypatch, rank, [(5, 17), (5, 17), (5, 18)])


def test_the_fingerprint_of_a_configuration_covers_only_keys_that_affect_training() -> None:
    same = [{}, {"name": "other"}, {"output": "elsewhere"}, {"data__root": "/mnt"}, {"checkpoint__every": 1}]
    others = [{"seed": 4}, {"train__batch_size": 8}, {"model__args": {"widths": [64, 10]}}, {"exchange__down": "int8"}]

    assert len({run_fingerprint(small_config(**changes)) for changes in same}) == 1
    assert len({run_fingerprint(small_config(**changes)) for changes in [{}, *others]}) == 1 + len(others)


def test_random_numbers_differ_between_workers_and_rounds_but_not_between_processes() -> None:
    model = seeded(NETWORKS["no batch norm"])

    def drawn(process_seed: int) -> list[float]:
        draws: list[float] = []

        def loss(outputs: Any, targets: Any) -> Tensor:
            if torch.is_grad_enabled():
                draws.append(torch.rand(()).item())
            return nn.functional.cross_entropy(outputs, targets)

        job = job_for(model, train__workers=2, train__rounds=2, train__local_steps=1)
        job = replace(job, task=replace(job.task, loss=loss))
        coordinator = Coordinator(job, InlinePool(job, CPU, Meter()), model, Meter())
        torch.manual_seed(process_seed)
        for round_number in range(2):
            completed(coordinator.train_round(round_number))
        return draws

    first = drawn(1)

    assert len(set(first)) == 4
    assert drawn(2) == first


def test_an_optimizer_continues_only_with_the_same_neurons() -> None:
    stages = [{}, {"rounds": 2, "keep": 1}]
    job = job_for(seeded(NETWORKS["no batch norm"]), train__workers=2, train__rounds=4, recipe__stages=stages)
    state = WorkerState(job, slot_of(job, 0), assignments(job), None)
    made, named = [], {}
    for round_number in range(4):
        if round_number < 3:  # a worker has one module for both full-width rounds
            named = dict(job.split.module(assignments(job).of(round_number)[0], CPU).named_parameters())
        made.append(state.optimizer(named, round_number))
        state.store(made[-1], named, {}, round_number)

    assert made[3] is made[2]
    assert len({id(optimizer) for optimizer in made}) == 3


def test_if_neurons_change_every_round_kept_state_is_the_same_as_reset_state() -> None:
    def trained(optimizer_state: str) -> dict[str, Tensor]:
        model = seeded(NETWORKS["no batch norm"])
        job = job_for(model, train__workers=2, train__optimizer_state=optimizer_state)
        coordinator = Coordinator(job, InlinePool(job, CPU, Meter()), model, Meter())
        for round_number in range(job.schedule.num_rounds):
            completed(coordinator.train_round(round_number))
        return clone(model.state_dict())

    assert_same(trained("kept"), trained("reset"))


def test_a_checkpoint_without_a_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {"round": "1"})
    assert read_tensors(path)[1] == {"round": "1"}

    save_file({"a": torch.ones(3)}, path, {"round": "1"})

    with pytest.raises(CheckpointError, match=naming("some.safetensors", "checksum")):
        read_tensors(path)


def test_rounds_are_evaluated_and_saved_when_they_are_due_and_at_the_end() -> None:
    model, evaluated, saved = seeded(NETWORKS["no batch norm"]), [], []
    settings = {"train__workers": 2, "train__rounds": 5, "checkpoint__every": 3, "evaluate__every": 2}
    job = job_for(model, test=data(20, seed=4), **settings)

    class Notes:
        def round_done(self, round_number: int, _report: Any, metrics: Any, *_rest: Any) -> None:
            if metrics is not None:
                evaluated.append(round_number + 1)

        def save(self, rounds_done: int, _state: Any) -> None:
            saved.append(rounds_done)

    completed(run_rounds(job, Coordinator(job, InlinePool(job, CPU, Meter()), model, Meter()), Notes(), 0, CPU))

    assert (evaluated, saved) == ([2, 4, 5], [3, 5])
