"""Local steps one at a time: the built-in loop, and another in its place."""

import pytest
import torch
from torch import nn

from ist.errors import AbandonedRoundError
from ist.loops.local_loop import TaskLoop
from ist.loops.part import LocalSteps, Part, completed
from ist.monitoring.meter import Meter
from ist.pools.inline import InlinePool
from ist.subnet.assignments import WorkerSlot
from ist.subnet.job import assignments, slot_of
from ist.training.coordinator import Coordinator
from ist.training.worker import Worker
from tests.conftest import assert_same, clone, job_for
from tests.networks import NETWORKS, seeded

CPU = torch.device("cpu")


class OwnLoop:
    """A user's loop: it makes the steps of the built-in one with its own code, and counts them."""

    def __init__(self, inner: TaskLoop, max_norm: float | None = None) -> None:
        self.inner, self.made, self.max_norm = inner, 0, max_norm
        self.slot: WorkerSlot = inner.slot

    def run(self, part: Part) -> None:
        for step in part.steps:
            part.check_not_over()
            rows = torch.from_numpy(self.inner.sampler.batch(self.slot.worker, step))
            inputs, targets = (tensor[rows] for tensor in self.inner.shard.tensors)  # type: ignore[attr-defined]
            loss = nn.functional.cross_entropy(part.model(inputs), targets)
            loss.backward()
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(part.model.parameters(), self.max_norm)
            part.optimizer.step()
            part.optimizer.zero_grad()
            self.made += 1
            part.log(loss, len(rows))

    def close(self) -> None:
        """It holds nothing."""


@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_a_loop_of_the_users_own_that_makes_the_same_steps_gives_the_same_weights(max_norm: float | None) -> None:
    ended, loops = [], []
    for own in (False, True):
        model = seeded(NETWORKS["two hidden layers, batch norm"])
        job, meter = job_for(model, train__workers=2, train__clip_grad_norm=max_norm), Meter()
        pool, held = InlinePool(job, CPU, meter), assignments(job)
        if own:
            loops = [OwnLoop(TaskLoop(job, slot_of(job, worker), CPU), max_norm) for worker in range(2)]
            for host, loop in zip(pool._hosts, loops, strict=True):
                host._slot, host._worker = loop.slot, Worker(job, loop.slot, CPU, held, loop=loop)
        coordinator = Coordinator(job, pool, model, meter)
        for round_number in range(job.schedule.num_rounds):
            completed(coordinator.train_round(round_number))
        ended.append(clone(model.state_dict()))

    assert_same(*ended)
    assert [loop.made for loop in loops] == [job.schedule.total_steps] * 2


def test_an_abandoned_worker_makes_no_further_step() -> None:
    model = seeded(NETWORKS["no batch norm"])
    job = job_for(model, train__workers=1, train__local_steps=5)
    loop = OwnLoop(TaskLoop(job, slot_of(job, 0), CPU))
    local = LocalSteps(job.schedule, job.config.seed, slot_of(job, 0), CPU, loop)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(AbandonedRoundError, match="worker 0.*round 0"):
        completed(local.of_round(0, model, dict(model.named_parameters()), optimizer, lambda: loop.made == 2))

    assert loop.made == 2
