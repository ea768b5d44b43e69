"""The round loop, and what it needs of a method.

Where it sits: `ist/runs/open.py` builds what is needed, `run_rounds` runs it; a `Method` is what differs between IST
(`ist/training/coordinator.py`) and the methods that it is compared with (`ist/baselines/`).
Not here: how a round is trained; files; printing.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ist.evaluation.evaluate import Metrics, evaluate, reestimate_statistics, statistics_batches
from ist.measurements import Numbers, check_round
from ist.network.failures import located
from ist.rng import Purpose, seeded
from ist.subnet.job import Job, assignments
from ist.subnet.residual_blocks import scaled_blocks
from ist.transport.interfaces import Lost


@dataclass(frozen=True)
class RoundReport:
    """What a round did.

    Attributes:
        numbers: Every number of `ist/measurements.py` that a method measures of a round, by name.
        by_worker: What each worker that came back measured, in the order of workers.
        lost: Workers that were left out of the merge.
    """

    numbers: Numbers
    by_worker: Sequence[Numbers]
    lost: tuple[Lost, ...] = ()

    def __post_init__(self) -> None:
        check_round(self.numbers)


class Method(Protocol):
    """A way to train the whole network, a round at a time."""

    @property
    def model(self) -> nn.Module:
        """The whole network as it is now."""
        ...

    def train_round(self, round_number: int) -> RoundReport:
        """Train for one round."""
        ...

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return every tensor that the method needs to go on: the network's, and optimiser state."""
        ...

    def bytes_sent(self) -> int:
        """Return the payload bytes that all processes have sent so far."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of a round: `train` is the method's own; evaluation is a measuring instrument, kept apart."""

    train: float
    evaluate: float


class Follower(Protocol):
    """A rank's part in a `Method` that another rank coordinates."""

    def train_round(self, round_number: int) -> object:
        """Take part in a round."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


class Recorder(Protocol):
    """Who is told what happened: the run folder, the progress display, or a list."""

    def round_done(
        self,
        round_number: int,
        report: RoundReport,
        metrics: Metrics | None,
        seconds: Seconds,
        sent_bytes: int,
    ) -> None:
        """Take note of a round; `metrics` where it was evaluated."""
        ...

    def save(self, rounds_done: int, state: Mapping[str, Tensor]) -> None:
        """Save a checkpoint."""
        ...


def run_rounds(job: Job, method: Method, recorder: Recorder, first_round: int, device: torch.device) -> None:
    """Train for the rounds of a run that are left: the one round loop.

    Args:
        job: The run.
        method: How to train.
        recorder: Who is told.
        first_round: Rounds that were done before.
        device: Where the method's whole network is.

    Raises:
        DivergedError: A worker returned a loss or a weight that is not finite; nothing is saved after it.
        WorkerLostError: Too few workers came back.
        DataError: A sample of the data cannot be read, or its loss or metric fails.
        ModelError: The network fails.
    """
    config = job.config
    for round_number in range(first_round, job.schedule.num_rounds):
        started = time.perf_counter()
        report = method.train_round(round_number)
        trained = time.perf_counter()
        rounds_done = round_number + 1
        last = rounds_done == job.schedule.num_rounds
        metrics = None
        with located(f"evaluating the whole network after round {round_number}"):
            if job.task.test_data is not None and (last or rounds_done % config.evaluate.every == 0):
                metrics = evaluate_full_network(job, method.model, device)
            elif last:
                refresh_statistics(job, method.model, device)
        seconds = Seconds(trained - started - report.numbers["aside_s"], time.perf_counter() - trained)
        recorder.round_done(round_number, report, metrics, seconds, method.bytes_sent())
        if last or config.checkpoint.is_due(rounds_done):
            recorder.save(rounds_done, method.checkpoint_state())


def follow_rounds(job: Job, follower: Follower, first_round: int) -> None:
    """Take part in every round that is left, on a rank that does not coordinate."""
    for round_number in range(first_round, job.schedule.num_rounds):
        follower.train_round(round_number)


def refresh_statistics(job: Job, model: nn.Module, device: torch.device) -> None:
    """Re-estimate batch norm's running statistics, where they do not travel with their neurons."""
    config = job.config
    if config.train.running_statistics == "reestimate":
        batches = statistics_batches(
            job.task.train_data, config.evaluate.batch_size, config.evaluate.statistics_batches, config.seed, device
        )
        with scaled_blocks(model, assignments(job).block_scales()), seeded(device, config.seed, Purpose.STATISTICS):
            reestimate_statistics(model, batches)


def evaluate_full_network(job: Job, model: nn.Module, device: torch.device) -> Metrics:
    """Evaluate the whole network on the test data, with fresh batch norm statistics if they do not travel."""
    config = job.config
    assert job.task.test_data is not None
    refresh_statistics(job, model, device)
    # The same draws at every evaluation: where test data are random, rounds can be compared.
    with scaled_blocks(model, assignments(job).block_scales()), seeded(device, config.seed, Purpose.EVALUATION):
        return evaluate(model, job.task.test_data, job.task.loss, config.evaluate.batch_size, device, job.task.metric)
