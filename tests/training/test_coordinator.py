"""The coordinator's handling of lost workers and invalid results."""

import math
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ist.errors import CheckpointError, DivergedError, PoolError, WorkerLostError
from ist.loops.part import Part, completed
from ist.monitoring.meter import Meter
from ist.pools.inline import InlinePool
from ist.subnet.job import assignments
from ist.training.coordinator import Coordinator, _report
from ist.training.worker import Worker
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.interfaces import BufferCache, Lost, Subnet
from ist.transport.message import Header
from tests.conftest import assert_same, clone, job_for, naming, returned, worker_numbers
from tests.networks import NETWORKS, seeded


class FaultyPool:
    """The inline pool with injected faults: workers that are lost, and a worker whose result is made invalid."""

    parallel = False

    def __init__(self, inner: InlinePool, lost: Sequence[int] = (), invalid: int | None = None, how: str = "") -> None:
        self.inner, self.lost, self.invalid, self.how = inner, lost, invalid, how

    def gather(self, round_number: int) -> tuple[str, ...]:
        return self.inner.gather(round_number)

    def process(self, worker: int) -> str:
        return self.inner.process(worker)

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        return self.inner.buffers(worker, layouts)

    def submit(self, round_number: int, subnet: Subnet) -> None:
        self.round_number = round_number
        self.inner.submit(round_number, subnet)

    def results(self) -> Generator[Subnet | Lost]:
        round_number = self.round_number
        for result in returned(self.inner.results()):
            assert isinstance(result, Subnet)
            if result.worker in self.lost:
                yield Lost(result.worker, "it burnt down")
                continue
            if result.worker == self.invalid:
                if self.how == "weight":
                    result.buffers.up.tensors["linear_2.weight"][0, 0] = math.inf
                elif self.how == "loss":
                    result.buffers.up.write_header(
                        Header(round_number, result.worker, worker_numbers(samples=10, loss_sum=math.nan))
                    )
                elif self.how == "stale":
                    result.buffers.up.write_header(Header(round_number - 1, result.worker, worker_numbers(samples=10)))
            yield result

    def close(self) -> None:
        pass


def coordinator(min_returned: int | None = None, **faults: object) -> Coordinator:
    model = seeded(NETWORKS["no batch norm"])
    job, meter = job_for(model, pool__min_returned=min_returned), Meter()
    pool = FaultyPool(InlinePool(job, torch.device("cpu"), meter), **faults)  # type: ignore[arg-type]
    return Coordinator(job, pool, model, meter)


def test_a_lost_worker_leaves_its_neurons_untouched() -> None:
    made = coordinator(min_returned=3, lost=[2])
    before = clone(made.model.state_dict())

    report = completed(made.train_round(0))

    cuts = assignments(made.job).cuts(0)
    changed = made.model.linear_1.bias != before["linear_1.bias"]
    assert not changed[cuts[2]["linear_1.bias"][0]].any()
    assert changed[cuts[1]["linear_1.bias"][0]].any()
    assert [(lost.worker, lost.reason) for lost in report.lost] == [(2, "it burnt down")]


def test_by_default_one_lost_worker_ends_the_run_and_names_the_cause() -> None:
    with pytest.raises(WorkerLostError, match=naming("worker 1", "round 0", "it burnt down", "4 of 4 workers")):
        completed(coordinator(lost=[1]).train_round(0))


def test_lost_workers_are_reported_before_invalid_results() -> None:
    with pytest.raises(WorkerLostError, match=naming("worker 2", "round 0", "it burnt down", "2 of 4 workers")):
        completed(coordinator(min_returned=2, invalid=0, how="loss", lost=[2, 3]).train_round(0))


class InfiniteOnce(nn.Module):
    """A network that gives infinite outputs, and so infinite weights, to one worker in one round."""

    is_infinite = False

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.linear_2(self.linear_1(inputs).relu())
        return outputs * (math.inf if InfiniteOnce.is_infinite else 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"train__optimizer_state": "kept", "recipe__stages": [{"keep": 1}]},
        {"exchange": {"down": "int8", "up": "int4", "values": "deltas", "error_feedback": True}},
    ],
    ids=["optimizer state", "residuals"],
)
def test_a_worker_does_not_carry_non_finite_state_into_later_rounds(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = InfiniteOnce()
    job, meter = job_for(model, pool__min_returned=3, train__rounds=6, **settings), Meter()
    made = Coordinator(job, InlinePool(job, torch.device("cpu"), meter), model, meter)
    train = Worker.train

    def train_infinite(self: Worker, round_number: int, *rest: Any) -> Generator[Part]:
        monkeypatch.setattr(InfiniteOnce, "is_infinite", (round_number, self.number) == (2, 1))
        yield from train(self, round_number, *rest)

    monkeypatch.setattr(Worker, "train", train_infinite)

    lost = [(r, left.worker, left.kind) for r in range(6) for left in completed(made.train_round(r)).lost]

    assert lost == [(2, 1, "rejected")]


def test_a_checkpoint_with_a_tensor_that_the_configuration_does_not_use_is_refused() -> None:
    model = seeded(NETWORKS["no batch norm"])
    job, meter = job_for(model), Meter()
    pool = InlinePool(job, torch.device("cpu"), meter)

    with pytest.raises(CheckpointError, match=naming("'outer/linear_1.bias'", "checkpoint")):
        Coordinator(job, pool, model, meter, {"outer/linear_1.bias": torch.zeros(24)})


def test_a_round_without_results_is_an_error_for_every_min_returned() -> None:
    with pytest.raises(WorkerLostError, match=naming("worker 0", "round 0", "it burnt down", "1 of 4 workers")):
        completed(coordinator(min_returned=1, lost=range(4)).train_round(0))


@pytest.mark.parametrize("how", ["weight", "loss", "stale"])
def test_the_merge_leaves_out_an_invalid_result_if_enough_others_are_valid(how: str) -> None:
    made = coordinator(min_returned=3, invalid=2, how=how)
    before = clone(made.model.state_dict())

    report = completed(made.train_round(1))

    (lost,) = report.lost
    assert (lost.worker, lost.kind, report.numbers["workers"]) == (2, "rejected", 4)
    changed = made.model.linear_1.bias != before["linear_1.bias"]
    cuts = assignments(made.job).cuts(1)
    assert not changed[cuts[2]["linear_1.bias"][0]].any()
    assert changed[cuts[0]["linear_1.bias"][0]].any()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in made.model.state_dict().values())


@pytest.mark.parametrize(
    ("how", "value"),
    [("weight", "'linear_2.weight'"), ("loss", "a loss of nan")],
)
def test_an_invalid_result_ends_the_run_if_all_workers_are_needed(how: str, value: str) -> None:
    with pytest.raises(DivergedError, match=naming("worker 2", "round 0", value, "train.optimizer.args.lr")):
        completed(coordinator(invalid=2, how=how).train_round(0))


def test_a_message_of_another_round_is_refused() -> None:
    with pytest.raises(PoolError, match=naming("(layout, round, worker)")):
        completed(coordinator(invalid=2, how="stale").train_round(1))


def test_a_report_counts_every_step_and_sample() -> None:
    report = completed(coordinator().train_round(0))

    # 100 samples, 4 workers: shards of 25 in two batches an epoch; three steps are one and a half epochs.
    assert (report.numbers["steps"], report.numbers["samples"]) == (3, 100 + 4 * 13)
    assert report.numbers["compute_s"] > 0
    assert report.numbers["merge_s"] >= 0


def test_rounds_with_reused_buffers_give_the_same_weights_as_with_new_buffers() -> None:
    one, other = coordinator(), coordinator()
    for round_number in range(3):
        completed(one.train_round(round_number))
    for round_number in range(3):
        other._pool.inner._cache = BufferCache(torch.device("cpu"))  # type: ignore[attr-defined]
        completed(other.train_round(round_number))

    assert_same(clone(one.model.state_dict()), clone(other.model.state_dict()))


def test_the_loss_of_a_round_is_the_mean_over_samples_not_workers() -> None:
    headers = [
        Header(0, 0, worker_numbers(steps=1, samples=10, loss_sum=5.0)),
        Header(0, 1, worker_numbers(steps=3, samples=30, loss_sum=45.0)),
    ]

    report = _report(headers, [], {"exchange": 0.0, "cut": 0.0, "merge": 0.0}, parallel=True)

    assert [report.numbers[name] for name in ("loss", "samples", "steps")] == [50 / 40, 40, 3]
