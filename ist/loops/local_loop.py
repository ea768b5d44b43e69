"""The built-in local steps, one at a time: the innermost loop of the system.

Where it sits: a worker, and every rank of a baseline, makes the steps of a `Part` (`ist/loops/part.py`) with a
`LocalLoop`. The built-in one, `TaskLoop`, takes batches from the task's data and makes one optimizer step for each.
Not here: one step (`ist/loops/local_step.py`), a user's own loop (`ist/loops/part.py`), receiving and returning weights
(`ist/training/worker.py`, `ist/baselines/`).
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ist.data.batches import fetch, is_stream
from ist.data.loading.loader import BatchReader, StepBatches, worker_data
from ist.evaluation.step_function import Values
from ist.loops.local_step import LocalStep
from ist.loops.part import LocalLoop, OwnLoop, Part
from ist.network.failures import located
from ist.rng import Indices
from ist.subnet.assignments import WorkerSlot
from ist.subnet.job import Job


@dataclass(frozen=True)
class StepDone:
    """The result of one optimizer step.

    Attributes:
        loss: Mean loss over the samples of the step, shape (), detached.
        samples: Number of samples.
        values: Means of other numbers over the samples of the step, by name.
    """

    loss: Tensor
    samples: int
    values: Values = field(default_factory=dict)


class TaskLoop:
    """The built-in loop: one optimizer step for each batch of the task's data; a `LocalLoop`.

    Args:
        job: The run.
        slot: The worker whose data and random numbers are used.
        device: The device of the module.

    Attributes:
        schedule: The steps of each round; the part applies their settings.
        sampler: The samples of each step.
        shard: The worker's data.
        step: Makes a step.
    """

    def __init__(self, job: Job, slot: WorkerSlot, device: torch.device) -> None:
        self.slot = slot
        self.device = device
        self.seed = job.config.seed
        self.schedule = job.schedule
        self.sampler = job.schedule.sampler_for(slot.team.num_workers)
        self.shard: Dataset[Any] = worker_data(job.task.data_of(slot.worker), self.sampler, slot.worker)
        self.step = LocalStep(job.config.train, job.task, device)
        self._parts = job.config.train.accumulate
        self._batches = StepBatches(self.shard, self.sampler, slot.worker, self._parts, slot.rank, slot.ranks)
        num_batches = job.schedule.total_steps * self._parts
        self._reader = BatchReader(self._batches, num_batches, job.task.loader, device, is_stream(self.shard))

    def steps(
        self, round_number: int, module: nn.Module, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Generator[StepDone]:
        """Run the steps of a round, and yield after each; if the generator is closed, no further step runs.

        Args:
            round_number: The round, from 0.
            module: The module to train: a subnet module, or a full network that averages its gradients.
            named: The module's trained parameters, by their names in the full network.
            optimizer: An optimizer of these parameters.

        Raises:
            DataError: A sample cannot be read, or its loss fails; the message names it, the round and the worker.
            ModelError: The network fails; the message names the module.
        """
        parameters = list(named.values())
        for step in self.schedule.steps(round_number):
            batch = self._batches.of_step(step)
            of_worker = len(batch) if self.slot.ranks == 1 else len(self.sampler.batch(self.slot.worker, step))
            weight = len(batch) * self.slot.ranks / of_worker  # the ranks' gradients are averaged with equal weights
            with located(f"round {round_number}, worker {self.slot.worker}"):
                done = self.step.take(module, parameters, optimizer, batch, self._read_in(step), self.numbers, weight)
            yield StepDone(done.loss, len(batch), done.values)

    def run(self, part: Part) -> None:
        """Make the steps of a part; see `LocalLoop`.

        Raises:
            AbandonedRoundError: The coordinator has continued without this worker.
            DataError: A sample cannot be read, or its loss fails.
            ModelError: The network fails.
        """
        with closing(self.steps(part.round, part.model, part.named, part.optimizer)) as steps:
            while True:
                part.check_not_over()
                before = part.steps_made
                done = next(steps, None)
                if done is None:
                    return
                if part.steps_made == before:  # float16: the scaler skips a step whose gradient overflows
                    part.count_step()
                part.log(done.loss, done.samples, done.values)

    def read(self, batch: Indices) -> tuple[Any, Any]:
        """Return the samples at some positions in the worker's shard as a batch (inputs, targets).

        Raises:
            DataError: A sample cannot be read.
        """
        return fetch(self.shard, batch, self.device, lambda: self.numbers(batch))

    def numbers(self, batch: Indices) -> Indices:
        """Return the numbers in the full data set of the samples at some positions in the worker's shard."""
        return self._batches.numbers(batch)

    def close(self) -> None:
        """End the loader processes."""
        self._reader.close()

    def _read_in(self, step: int) -> Callable[[Indices], tuple[Any, Any]]:
        """Return a function that reads the micro-batches of a step, one after the other."""
        numbers = iter(range(step * self._parts, (step + 1) * self._parts))
        return lambda _: self._reader.batch(next(numbers))


def worker_loop(job: Job, slot: WorkerSlot, device: torch.device) -> LocalLoop:
    """Return the loop that makes a worker's steps: the user's own if the task has one, or the built-in loop."""
    return OwnLoop(job.task.loop) if job.task.loop is not None else TaskLoop(job, slot, device)
