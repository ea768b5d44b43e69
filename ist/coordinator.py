"""The round loop, and what the coordinator does in a round.

Where it sits: `ist/run.py` builds what is needed and calls `run_rounds`; a `Method` is what differs
between IST and the methods that it is compared with.
Not here: gloo, nccl, ray; files; printing.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ist import optim
from ist.balance import SpeedBalance
from ist.blocks import scaled_blocks
from ist.config import Config
from ist.errors import DivergedError, ISTError, PoolError, WorkerLostError
from ist.evaluate import Metrics, evaluate, reestimate_statistics, statistics_batches
from ist.exchange import Outgoing, read_trained
from ist.job import Job
from ist.meter import Meter
from ist.pool import Lost, Place, Subnet, WorkerPool
from ist.pool.wire import Header
from ist.subnet import Cut, reassemble


@dataclass(frozen=True)
class RoundReport:
    """What a round did.

    Attributes:
        steps: Local steps of each worker.
        samples: Samples of all workers together.
        loss: Mean training loss over those samples.
        compute_s: Mean seconds of a worker's local steps.
        exchange_s: Seconds of the round in which subnets or gradients were on their way and nobody computed.
        idle_s: Mean seconds that a worker waited for slower ones.
        cut_s: Seconds of cutting subnets.
        merge_s: Seconds of merging them.
        virtual_s: Compute-normalised seconds, as if every worker had a core of its own: the longest CPU time of a
            worker's local steps, and what else was measured while nobody computed.
        memory_bytes: Peak memory of each worker so far.
        workers: Workers of the round, those that were lost included.
        aside_s: Seconds of the method's that were no training: collecting the states of all ranks for a checkpoint.
        lost: Workers that were left out of the merge.
    """

    steps: int
    samples: int
    loss: float
    compute_s: float
    exchange_s: float
    idle_s: float
    cut_s: float
    merge_s: float
    virtual_s: float
    memory_bytes: tuple[int, ...]
    workers: int
    lost: tuple[Lost, ...] = ()
    aside_s: float = 0.0


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
    """
    config = job.config
    for round_number in range(first_round, job.num_rounds):
        started = time.perf_counter()
        report = method.train_round(round_number)
        trained = time.perf_counter()
        rounds_done = round_number + 1
        last = rounds_done == job.num_rounds
        metrics = None
        if job.test_data is not None and (last or rounds_done % config.evaluate.every == 0):
            metrics = evaluate_whole(job, method.model, device)
        elif last:
            refresh_statistics(job, method.model, device)
        seconds = Seconds(trained - started - report.aside_s, time.perf_counter() - trained)
        recorder.round_done(round_number, report, metrics, seconds, method.bytes_sent())
        if last or config.checkpoint.is_due(rounds_done):
            recorder.save(rounds_done, method.checkpoint_state())


def follow_rounds(job: Job, follower: Follower, first_round: int) -> None:
    """Take part in every round that is left, on a rank that does not coordinate."""
    for round_number in range(first_round, job.num_rounds):
        follower.train_round(round_number)


def refresh_statistics(job: Job, model: nn.Module, device: torch.device) -> None:
    """Re-estimate batch norm's running statistics, where they do not travel with their neurons."""
    config = job.config
    if config.train.running_statistics == "reestimate":
        batches = statistics_batches(
            job.train_data, config.evaluate.batch_size, config.evaluate.statistics_batches, config.seed, device
        )
        with scaled_blocks(model, job.block_scales):
            reestimate_statistics(model, batches)


def evaluate_whole(job: Job, model: nn.Module, device: torch.device) -> Metrics:
    """Evaluate the whole network on the test data, with fresh batch norm statistics if they do not travel."""
    config = job.config
    assert job.test_data is not None
    refresh_statistics(job, model, device)
    accuracy = config.evaluate.metric == "accuracy"
    with scaled_blocks(model, job.block_scales):
        return evaluate(model, job.test_data, job.loss, config.evaluate.batch_size, device, accuracy)


class Coordinator:
    """Independent Subnet Training, as the coordinator sees it; a `Method`.

    Args:
        job: The run.
        pool: Carries subnets to workers and back.
        model: The whole network, trained in place.
        meter: Counts what the pool sends.
        carried: Optimiser state to go on with, where it is carried and the run is resumed.
    """

    def __init__(
        self,
        job: Job,
        pool: WorkerPool,
        model: nn.Module,
        meter: Meter,
        carried: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.job = job
        self._model = model
        self._pool = pool
        self._meter = meter
        self._min_returned = min_returned(job.config)
        self._balance = SpeedBalance() if job.config.partition.balance == "speed" else None
        self._job_now = job
        self._outgoing = Outgoing(job)
        device = next(model.parameters()).device
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.contiguous()
        tensors = model.state_dict()
        fresh = optim.initial_state(job.state_slots, job.state_specs, device)
        self._state: dict[str, Tensor] = {name: tensors[name] for name in job.model_specs} | fresh
        for name, tensor in (carried or {}).items():
            self._state[name].copy_(tensor)

    @property
    def model(self) -> nn.Module:
        """The whole network; merging writes into it."""
        return self._model

    def train_round(self, round_number: int) -> RoundReport:
        """Cut subnets for the workers that are there, have them trained, and merge what comes back.

        A worker that does not come back, or comes back with nonsense, is left out: its neurons keep their values. Where
        too few come back and others may take their places, the round is begun anew; what did come back stays merged.

        Raises:
            DivergedError: Too few came back, and first of all one with something that is not finite.
            PoolError: Too few came back, and first of all one with a message of another round or shape.
            WorkerLostError: Too few came back, or too few are there to begin with.

        Reference: Yuan et al., arXiv 1910.02120, Algorithm 1.
        """
        failed: list[Lost] = []
        for left in reversed(range(attempts(self.job.config))):
            names = self._pool.gather(round_number)
            before = dict(self._meter.seconds)
            places = self._places(names)
            with self._meter.phase("cut"):
                cuts = self._job_now.cuts(round_number)
            headers: list[Header] = []
            lost: list[Lost] = []
            try:
                with self._meter.phase("merge"):
                    subnets = self._subnets(round_number, places, cuts)
                    trained = self._accept(round_number, subnets, cuts, headers, lost)
                    reassemble(self._state, cuts, trained, self.job.exclusive)
                break
            except WorkerLostError:
                if not left:
                    raise
                failed += lost
        spent = {phase: seconds - before.get(phase, 0.0) for phase, seconds in self._meter.seconds.items()}
        if self._balance:
            took = {header.worker: header.compute_s for header in headers}
            took |= {late.worker: spent["train"] for late in lost if late.kind == "late"}
            self._balance.note({names[worker]: seconds for worker, seconds in took.items()})
        report = _report(headers, lost, spent, self._pool.parallel)
        return replace(report, lost=(*failed, *report.lost))

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return the whole network's tensors and carried optimiser state."""
        return {**self._model.state_dict(), **{name: self._state[name] for name in self.job.state_specs}}

    def bytes_sent(self) -> int:
        """Return the bytes of all messages so far, both ways."""
        return self._meter.total_bytes

    def close(self) -> None:
        """Let the workers go."""
        self._pool.close()

    def _places(self, names: Sequence[str]) -> list[Place]:
        """Give the workers that are there their places, and see to it that `_job_now` is the job for so many."""
        capacities = self._balance.capacities(names) if self._balance else None
        self._job_now = self.job.with_workers(len(names), capacities)
        return [Place(worker, len(names), capacities) for worker in range(len(names))]

    def _subnets(self, round_number: int, places: Sequence[Place], cuts: Sequence[Cut]) -> Iterator[Subnet]:
        """Cut each subnet when it is asked for.

        By then others may have been merged: what two workers hold is merged last of all, and the rest is theirs alone.
        """
        for place, cut in zip(places, cuts, strict=True):
            with self._meter.phase("cut"):
                envelope = self._pool.envelope(place.worker, self._outgoing.route(cut))
                sent = self._outgoing.write(self._state, cut, round_number, envelope)
                envelope.down.write_header(Header(round_number, place.worker))
            yield Subnet(place, envelope, sent)

    def _accept(
        self,
        round_number: int,
        subnets: Iterator[Subnet],
        cuts: Sequence[Cut],
        headers: list[Header],
        lost: list[Lost],
    ) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Yield what workers return, checked, as it arrives; note headers, and who is left out."""
        results = self._pool.train(round_number, subnets)
        num_workers = self._job_now.config.train.workers
        needed = min(self._min_returned, num_workers)
        causes: list[ISTError] = []
        with closing(results):
            while True:
                with self._meter.phase("train"):
                    result = next(results, None)
                if result is None:
                    break
                if isinstance(result, Subnet):
                    try:
                        header = result.envelope.up.read_header(round_number, result.worker)
                        tensors = read_trained(self.job, self._state, cuts[result.worker], result.envelope)
                        _check_finite(header, tensors)
                    except (PoolError, DivergedError) as error:
                        causes.append(error)
                        lost.append(Lost(result.worker, str(error), "rejected"))
                    else:
                        headers.append(header)
                        yield result.worker, tensors
                else:
                    lost.append(result)
                    text = f"worker {result.worker} was {result.kind} in round {round_number} ({result.reason})"
                    causes.append(WorkerLostError(f"{text}; {needed} of {num_workers} workers are needed"))
                if num_workers - len(lost) < needed:
                    raise causes[0]


def min_returned(config: Config) -> int:
    """Return how many workers must come back from a round, lest the run end."""
    train, pool = config.train, config.pool
    if pool.min_returned is not None:
        return pool.min_returned
    if train.is_elastic:
        return train.min_workers or 1
    return -(-train.workers // 2) if pool.kind == "ray" else train.workers


def attempts(config: Config) -> int:
    """Return how often a round may be begun: only Ray's workers are replaced while a run goes on."""
    return config.pool.round_attempts if config.pool.kind == "ray" else 1


def _check_finite(header: Header, tensors: Mapping[str, Tensor]) -> None:
    if not math.isfinite(header.loss_sum):
        what = f"a loss of {header.loss_sum}"
    else:
        bad = next((name for name, t in tensors.items() if t.is_floating_point() and not _is_finite(t)), None)
        if bad is None:
            return
        what = f"values in '{bad}' that are not finite"
    raise diverged(header.worker, what, header.round_number)


def diverged(worker: int, what: str, round_number: int) -> DivergedError:
    """Return the error about a worker that returned something that is not finite."""
    return DivergedError(
        f"worker {worker} returned {what} in round {round_number}: training has diverged. "
        "Lower the learning rate (train.optimizer.args.lr); checkpoints of earlier rounds are as they were"
    )


def _is_finite(tensor: Tensor) -> bool:
    # aminmax carries NaN along and needs one pass and no temporary, unlike isfinite().all().
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _report(headers: Sequence[Header], lost: Sequence[Lost], spent: Mapping[str, float], parallel: bool) -> RoundReport:
    computes = [header.compute_s for header in headers]
    critical = max(computes) if parallel else sum(computes)
    exchange = max(0.0, spent["train"] - spent["cut"] - critical)  # subnets are cut while the pool asks for them
    mean = sum(computes) / len(computes)
    samples = sum(header.samples for header in headers)
    merge = spent["merge"] - spent["train"]
    return RoundReport(
        steps=max(header.steps for header in headers),
        samples=samples,
        loss=sum(header.loss_sum for header in headers) / samples,
        compute_s=mean,
        exchange_s=exchange,
        idle_s=max(0.0, critical - mean) if parallel else 0.0,
        cut_s=spent["cut"],
        merge_s=merge,
        virtual_s=max(header.cpu_s for header in headers) + exchange + spent["cut"] + merge,
        memory_bytes=tuple(h.memory_bytes for h in sorted(headers, key=lambda header: header.worker)),
        workers=len(headers) + len(lost),
        lost=tuple(lost),
    )
