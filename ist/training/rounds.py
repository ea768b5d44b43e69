"""The round loop, and the interfaces that it uses: `Method`, `Follower` and `Recorder`.

Where it sits: `ist/runs/open.py` builds the objects, and `ist/runs/execute.py` iterates `run_rounds`, or
`follow_rounds` on ranks that do not coordinate. Both yield each `Part` whose local steps this process has to make.
IST (`ist/training/coordinator.py`) is one `Method`; the methods that it is compared with (`ist/baselines/`) are others.
Not here: training of a round, files, printing.
"""

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ist.data.nested import moved
from ist.evaluation.evaluate import Metrics, evaluate, evaluate_by, reestimate_statistics, statistics_batches
from ist.loops.part import Part
from ist.measurements import Numbers, check_round
from ist.network.failures import located
from ist.rng import Purpose, seeded
from ist.subnet.job import Job, assignments
from ist.subnet.residual_blocks import scaled_blocks
from ist.transport.interfaces import Lost


@dataclass(frozen=True)
class RoundReport:
    """The measurements and the lost workers of a round.

    Attributes:
        numbers: Every number of `ist/measurements.py` that a method measures in a round, by name.
        by_worker: The numbers of each worker whose result was merged, ordered by worker.
        lost: Workers whose results are not in the merge.
        logged: The means over all samples of the numbers that `train.logged` names, by name.
        held_fraction: The largest fraction of the network's parameters that a worker held; None: unknown.
        merge_scale: The scale of merged updates that the coordinator chose; None: it did not choose one.
    """

    numbers: Numbers
    by_worker: Sequence[Numbers]
    lost: tuple[Lost, ...] = ()
    logged: Mapping[str, float] = field(default_factory=dict)
    held_fraction: float | None = None
    merge_scale: float | None = None

    def __post_init__(self) -> None:
        check_round(self.numbers)


def logged_means(names: Sequence[str], sums: Sequence[Sequence[float]], samples: float) -> dict[str, float]:
    """Return the means of logged numbers from each worker's sums over its samples.

    Args:
        names: The names of the numbers (`train.logged`).
        sums: For each worker, the sums in the order of `names`.
        samples: The number of samples of all workers.
    """
    return {name: sum(of_worker[place] for of_worker in sums) / samples for place, name in enumerate(names)}


class Method(Protocol):
    """A way to train the full network, one round at a time."""

    @property
    def model(self) -> nn.Module:
        """The full network with its current values."""
        ...

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        """Train for one round; yield each part of this process, whose steps are made before the generator continues."""
        ...

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return every tensor that the method needs to resume: the network's tensors and optimizer state."""
        ...

    def bytes_sent(self) -> int:
        """Return the payload bytes that all processes have sent so far."""
        ...

    def close(self) -> None:
        """Release the workers."""
        ...


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of a round: of the method's training, and of the evaluation, which is not part of training."""

    train: float
    evaluate: float


class Follower(Protocol):
    """The part of a rank in a `Method` that another rank coordinates."""

    def train_round(self, round_number: int) -> Generator[Part, None, object]:
        """Take part in a round; yield this process's part, whose steps are made before the generator continues."""
        ...

    def close(self) -> None:
        """Release what this rank holds."""
        ...


class Recorder(Protocol):
    """Receives the report of every round, and saves checkpoints; see `ist/runs/recorder.py`."""

    def round_done(
        self,
        round_number: int,
        report: RoundReport,
        metrics: Metrics | None,
        seconds: Seconds,
        sent_bytes: int,
    ) -> bool:
        """Record a round; `metrics` is None if the network was not evaluated after it.

        Return whether a callback ends the run after this round, which is not the last one.
        """
        ...

    def evaluated(self, metrics: Metrics) -> None:
        """Receive the evaluation of the trained network, if the run ends after a round that was not evaluated."""
        ...

    def save(self, rounds_done: int, state: Mapping[str, Tensor]) -> None:
        """Save a checkpoint."""
        ...


def run_rounds(job: Job, method: Method, recorder: Recorder, first_round: int, device: torch.device) -> Generator[Part]:
    """Run the remaining rounds of a run: the one round loop of all methods.

    It yields the parts of this process; see `Method.train_round`.

    Args:
        job: The run.
        method: The method that trains.
        recorder: Receives the report of every round.
        first_round: The first round to run, from 0; the rounds before it are done.
        device: The device of the method's full network.

    Raises:
        CallbackError: A callback fails.
        DivergedError: A worker returned a non-finite loss or weight; nothing is saved after that.
        WorkerLostError: Too few workers returned a result.
        DataError: A sample cannot be read, or its loss or metric fails.
        ModelError: The network fails.
    """
    config, own = job.config, job.task.evaluation
    every = config.evaluate.every if own is None else own.every
    for round_number in range(first_round, job.schedule.num_rounds):
        started = time.perf_counter()
        report = yield from method.train_round(round_number)
        trained = time.perf_counter()
        rounds_done = round_number + 1
        last = rounds_done == job.schedule.num_rounds
        metrics = None
        with located(f"evaluating the full network after round {round_number}"):
            if job.task.is_evaluated and (last or rounds_done % every == 0):
                metrics = evaluate_full_network(job, method.model, device)
            elif last:
                refresh_statistics(job, method.model, device)
        seconds = Seconds(trained - started - report.numbers["aside_s"], time.perf_counter() - trained)
        ends = recorder.round_done(round_number, report, metrics, seconds, method.bytes_sent())
        if ends and metrics is None:
            _evaluate_at_end(job, method.model, recorder, device)
        if last or ends or config.checkpoint.is_due(rounds_done):
            recorder.save(rounds_done, method.checkpoint_state())
        if ends:
            return


def _evaluate_at_end(job: Job, model: nn.Module, recorder: Recorder, device: torch.device) -> None:
    """Evaluate the network of a run that ends early, as after a last round."""
    with located("evaluating the full network at the end of the run"):
        if job.task.is_evaluated:
            recorder.evaluated(evaluate_full_network(job, model, device))
        else:
            refresh_statistics(job, model, device)


def follow_rounds(
    job: Job, follower: Follower, first_round: int, ends_early: Callable[[], bool] | None = None
) -> Generator[Part]:
    """Take part in the remaining rounds, on a rank that does not coordinate; yield the parts of this process.

    Args:
        job: The run.
        follower: This rank's side of the method.
        first_round: The first round to run.
        ends_early: Hears, after each round but the last, whether the coordinator ends the run; None: it never does.
    """
    for round_number in range(first_round, job.schedule.num_rounds):
        yield from follower.train_round(round_number)
        if ends_early is not None and round_number + 1 < job.schedule.num_rounds and ends_early():
            return


def refresh_statistics(job: Job, model: nn.Module, device: torch.device) -> None:
    """Re-estimate batch norm's running statistics, unless workers exchange them (`train.running_statistics`)."""
    config = job.config
    if config.train.running_statistics == "reestimate":
        if job.task.loop is not None:
            batches = _own_statistics(job, device)
        else:
            batches = statistics_batches(
                job.task.train_data,
                config.evaluate.batch_size,
                config.evaluate.statistics_batches,
                config.seed,
                device,
                job.task.statistics_inputs if config.pool.memory_limit is None else None,
                job.task.loader,
            )
        if batches is None:
            return  # `make_loop_job` has checked that the network has no batch norm
        with scaled_blocks(model, assignments(job).block_scales()), seeded(device, config.seed, Purpose.STATISTICS):
            reestimate_statistics(model, batches, job.task.forward)


def evaluate_full_network(job: Job, model: nn.Module, device: torch.device) -> Metrics:
    """Evaluate the full network on the test data, with re-estimated batch norm statistics unless they are exchanged."""
    config, task = job.config, job.task
    refresh_statistics(job, model, device)
    # Every evaluation draws the same random numbers, so that rounds are comparable if test data are random.
    with scaled_blocks(model, assignments(job).block_scales()), seeded(device, config.seed, Purpose.EVALUATION):
        if task.evaluation is not None:
            return evaluate_by(task.evaluation.function, model)
        assert task.test_data is not None
        return evaluate(
            model,
            task.test_data,
            task.loss,
            config.evaluate.batch_size,
            device,
            task.metric,
            config.seed,
            task.test_loader,
            task.step,
        )


def _own_statistics(job: Job, device: torch.device) -> Iterable[Any] | None:
    """Return the inputs that the user gave for the re-estimation of batch norm's statistics; None if there are none."""
    if job.task.statistics is None:
        return None
    few = islice(job.task.statistics, job.config.evaluate.statistics_batches)
    return (moved(inputs, device) for inputs in few)
