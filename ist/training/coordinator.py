"""The coordinator of Independent Subnet Training: in each round it cuts subnets, exchanges them and merges the results.

Where it sits: `ist/training/rounds.py` runs it as a `Method`; a pool (`ist/pools/`) carries the subnets to workers.
Not here: the round loop (`ist/training/rounds.py`), the transport (`ist/pools/`), files, printing.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from torch import Tensor, nn

from ist.checks.finite_values import find_non_finite_sample
from ist.config.recipe import MergeScale
from ist.config.schema import Config, min_returned
from ist.errors import DivergedError, ISTError, PoolError, WorkerLostError
from ist.loops.part import Part
from ist.measurements import combined
from ist.monitoring.meter import Meter, Stopwatch
from ist.optimization import optimizers
from ist.storage.checkpoint import check_tensors
from ist.subnet.assignments import Team, WorkerSlot
from ist.subnet.cut import Cut, UpdateScale, on_device
from ist.subnet.job import Job, assignments
from ist.subnet.partition import is_full_width
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.parameter_store import LocalStore, ParameterStore, RoundMerge
from ist.tensors import is_finite
from ist.training.outer_optimizer import PREFIX as OUTER
from ist.training.outer_optimizer import OuterOptimizer
from ist.training.rounds import RoundReport, logged_means
from ist.training.scale_search import ScaleSearch
from ist.training.speed_balance import SpeedBalance
from ist.transport.codec import SCALE, MessageBuffers
from ist.transport.endpoints import SubnetWriter, read_trained
from ist.transport.frozen_parameters import FrozenSender, rest_fraction
from ist.transport.interfaces import Lost, Subnet, WorkerPool
from ist.transport.message import Header


class Coordinator:
    """Independent Subnet Training on the coordinator; a `Method`.

    Args:
        job: The run.
        pool: Carries subnets to workers and back.
        model: The full network, trained in place.
        meter: Counts what the pool sends.
        carried: Carried optimizer state and the outer optimizer's momentum from a checkpoint; None for a new run.

    Raises:
        CheckpointError: A tensor is missing in `carried`, or the configuration does not use one of its tensors.
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
        self._held = assignments(job)
        self._writer = SubnetWriter(job.split, job.config.exchange)
        self._device = device = next(model.parameters()).device
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.contiguous()
        tensors = model.state_dict()
        fresh = optimizers.initial_state(job.split.state_slots, job.split.state_specs, device)
        self._store: ParameterStore = LocalStore({name: tensors[name] for name in job.split.model_specs} | fresh)
        self._trained = trained = {
            name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        momentum = (
            {f"{OUTER}{name}": tensor for name, tensor in trained.items()}
            if job.config.recipe.has_outer_optimizer
            else {}
        )
        if carried is not None:
            check_tensors(carried, {**fresh, **momentum})
        self._frozen = FrozenSender(job.split, job.config.exchange, self._held, tensors, device)
        # Masks contain infinities from the start.
        self._never_finite = {name for name in job.split.model_specs if not is_finite([tensors[name]])}
        saved = dict(carried or {})
        self._outer: OuterOptimizer | None = None
        if job.config.recipe.has_outer_optimizer:
            self._outer = OuterOptimizer(
                trained, {name: saved.pop(name) for name in list(saved) if name.startswith(OUTER)}
            )
        for name, tensor in saved.items():
            self._store.tensors()[name].copy_(tensor)
        self._search = (
            ScaleSearch(job, model, self._store.tensors(), device) if job.config.recipe.has_auto_scale else None
        )

    @property
    def model(self) -> nn.Module:
        """The full network; merging writes into it."""
        return self._model

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        """Cut a subnet for each available worker, let the workers train them, and merge the results.

        The merge leaves out lost workers and invalid results: the neurons of those workers keep their values. If too
        few results are valid and the pool can replace workers, the round is repeated; merged results stay merged,
        unless the scale of updates is chosen when all results are there.

        Raises:
            DivergedError: Too few results are valid, no worker was lost, and the first invalid result is non-finite.
            PoolError: Too few results are valid, no worker was lost, and the first invalid result has the wrong round
                or layout.
            WorkerLostError: Too few workers returned a result, or too few are available at the start.

        Reference: Yuan et al., arXiv 1910.02120, Algorithm 1.
        """
        settings = self.job.schedule.outer(round_number)
        outer = None if settings.is_plain else self._outer
        if outer:
            outer.begin()
        failed: list[Lost] = []
        for left in reversed(range(attempts(self.job.config))):
            names = self._pool.gather(round_number)
            team = self._team(names, round_number)
            arrivals, watch = Arrivals(team.num_workers, self._min_returned), Stopwatch()
            self._frozen.begin(map(self._pool.process, range(team.num_workers)))
            with watch.phase("cut"):
                cuts = on_device(self._held.cuts(round_number, team), self._device)
            for worker, cut in enumerate(cuts):
                with watch.phase("cut"):
                    layouts = self._writer.layouts(cut)
                with watch.phase("exchange"):
                    buffers = self._pool.buffers(worker, layouts)
                with watch.phase("cut"):
                    subnet = self._cut(round_number, WorkerSlot(worker, team), cut, buffers)
                with watch.phase("exchange"):
                    self._pool.submit(round_number, subnet)
            try:
                with closing(self._pool.results()) as results:
                    merge = self._merge(round_number, cuts)
                    for result in watch.timed("exchange", results):
                        if isinstance(result, Part):
                            with watch.phase("exchange"):
                                yield result
                            continue
                        with watch.phase("merge"):
                            tensors = self._accept(round_number, result, cuts, arrivals)
                            if tensors is not None:
                                assert isinstance(result, Subnet)
                                merge.add(result.worker, tensors, result.is_lasting)
                with watch.phase("merge"):
                    merge.finish()
                    if outer:
                        outer.step(settings, cuts, (header.worker for header in arrivals.headers))
                break
            except WorkerLostError:
                if not left:
                    raise
                failed += arrivals.lost
        self._note_speed(round_number, names, arrivals, watch)
        report = _report(arrivals.headers, arrivals.lost, watch.seconds, self._pool.parallel)
        headers = sorted(arrivals.headers, key=lambda header: header.worker)
        sums = [header.logged for header in headers]
        logged = logged_means(self.job.config.train.logged, sums, report.numbers["samples"])
        held = self._held.held_fraction(round_number, team)
        if any(self._held.has_rest(round_number, neurons) for neurons in self._held.of(round_number, team)):
            held += rest_fraction(self.job.split, self.job.config.exchange)
        chosen = self._search.chosen if self._search and self._scale(round_number, team.num_workers).is_auto else None
        lost = (*failed, *report.lost)
        return replace(report, lost=lost, logged=logged, held_fraction=held, merge_scale=chosen)

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return the full network's tensors, carried optimizer state, and the outer optimizer's momentum."""
        outer = self._outer.checkpoint_state() if self._outer else {}
        stored = self._store.tensors()
        return {**self._model.state_dict(), **{name: stored[name] for name in self.job.split.state_specs}, **outer}

    def bytes_sent(self) -> int:
        """Return the bytes of all messages so far, in both directions."""
        return self._meter.total_bytes

    def close(self) -> None:
        """Release the workers."""
        self._pool.close()

    def _team(self, names: Sequence[str], round_number: int) -> Team:
        """Return the workers of a round; with `partition.balance: speed`, their shares follow their speed."""
        balance = self._balance_of(round_number)
        return Team(len(names), balance.capacities(names) if balance else None)

    def _scale(self, round_number: int, num_workers: int) -> MergeScale:
        """Return the scale of a round's updates; those of a worker that is alone do not overshoot."""
        is_whole = num_workers == 1 or is_full_width(self._held.partition(round_number))
        return self.job.schedule.merge_scale(round_number, is_whole)

    def _merge(self, round_number: int, cuts: Sequence[Cut]) -> RoundMerge:
        """Start the merge of a round; it scales updates of weights, not of carried optimizer state or statistics."""
        scale, exclusive = self._scale(round_number, len(cuts)), self._held.exclusive(round_number)

        def started(chosen: float) -> RoundMerge:
            factors = UpdateScale(frozenset(self._trained), *scale.factors(chosen))
            return self._store.merge(cuts, exclusive, factors)

        return self._search.merge(round_number, len(cuts), started) if scale.is_auto and self._search else started(1.0)

    def _balance_of(self, round_number: int) -> SpeedBalance | None:
        """Return the speed balance for a round; None in a full-width round, whose times do not depend on shares."""
        return None if is_full_width(self._held.partition(round_number)) else self._balance

    def _note_speed(self, round_number: int, names: Sequence[str], arrivals: "Arrivals", watch: Stopwatch) -> None:
        """Record how long each worker of a round took, for the shares of the next round."""
        if balance := self._balance_of(round_number):
            took = {header.worker: header.numbers["compute_s"] for header in arrivals.headers}
            took |= {late.worker: watch.seconds["exchange"] for late in arrivals.lost if late.kind == "late"}
            balance.note({names[worker]: seconds for worker, seconds in took.items()})

    def _cut(self, round_number: int, slot: WorkerSlot, cut: Cut, buffers: MessageBuffers) -> Subnet:
        """Cut a worker's subnet into the pool's buffers, with the frozen parameters that the worker does not have."""
        worker = slot.worker
        sent = self._writer.write(self._store, cut, round_number, buffers)
        neurons = self._held.of(round_number, slot.team)[worker]
        frozen, reuses_frozen = self._frozen.write(self._pool.process(worker), worker, round_number, neurons)
        buffers.down.write_header(Header(round_number, worker, reuses_frozen=reuses_frozen))
        return Subnet(slot, buffers, sent, frozen)

    def _accept(
        self, round_number: int, result: Subnet | Lost, cuts: Sequence[Cut], arrivals: "Arrivals"
    ) -> Mapping[str, Tensor] | None:
        """Check a worker's result, and return its tensors; None if the merge leaves the worker out.

        Raises:
            ISTError: Too few workers are left; see `train_round`.
        """
        worker = result.worker
        if isinstance(result, Lost):
            arrivals.lose(result, arrivals.lost_error(result, round_number))
            return None
        try:
            header = result.buffers.up.read_header(round_number, worker)
            self._check_finite(header, result.buffers.up.tensors, arrivals.num_workers)
            tensors = read_trained(self.job.config.exchange, self._store, cuts[worker], result.buffers)
        except (PoolError, DivergedError) as error:
            arrivals.lose(Lost(worker, str(error), "rejected"), error)
            return None
        arrivals.headers.append(header)
        self._frozen.returned(self._pool.process(worker))
        return tensors

    def _check_finite(self, header: Header, tensors: Mapping[str, Tensor], num_workers: int) -> None:
        what = invalid(self.job.split.whole, header)
        if what is None and self.job.split.whole is self.job.split:  # else all shards must merge the same results
            checked = (name for name in tensors if name.removesuffix(SCALE) not in self._never_finite)
            bad = next((name for name in checked if not is_finite([tensors[name]])), None)
            what = f"non-finite values in '{bad.removesuffix(SCALE)}'" if bad is not None else None
        if what is None:
            return
        raise diverged(self.job, num_workers, header.worker, what, header.round_number)


class Arrivals:
    """The results and losses in one attempt at a round.

    Args:
        num_workers: Workers of the round.
        min_returned: The minimum number of valid results.

    Attributes:
        headers: The headers of the merged results, in the order of arrival.
        lost: Workers that the merge leaves out.
    """

    def __init__(self, num_workers: int, min_returned: int) -> None:
        self.num_workers = num_workers
        self.headers: list[Header] = []
        self.lost: list[Lost] = []
        self._needed = min(min_returned, num_workers)
        self._causes: list[ISTError] = []

    def lost_error(self, lost: Lost, round_number: int) -> WorkerLostError:
        """Return the error of a round that fails because of a lost worker."""
        text = f"worker {lost.worker} was {lost.kind} in round {round_number} ({lost.reason})"
        return WorkerLostError(f"{text}; {self._needed} of {self.num_workers} workers are needed")

    def lose(self, lost: Lost, cause: ISTError) -> None:
        """Leave a worker out of the merge.

        Raises:
            ISTError: Too few workers are left: the first cause; causes of lost workers come before others.
        """
        self.lost.append(lost)
        self._causes.append(cause)
        if self.num_workers - len(self.lost) < self._needed:
            # Report lost workers first: they can be replaced, invalid results cannot.
            raise next((error for error in self._causes if isinstance(error, WorkerLostError)), self._causes[0])


def invalid(split: SplitModel, header: Header) -> str | None:
    """Return what is not finite in a result, as far as its header says; None: nothing.

    Args:
        split: The full split network.
        header: The header of a worker's result, or of a piece of it.
    """
    if not math.isfinite(loss := header.numbers["loss_sum"]):
        return f"a loss of {loss}"
    return f"non-finite values in '{list(split.specs)[header.non_finite - 1]}'" if header.non_finite else None


def attempts(config: Config) -> int:
    """Return the maximum number of attempts at a round: one, unless the pool replaces lost workers."""
    return config.pool.round_attempts if config.pool.spec.replaces_workers else 1


def diverged(job: Job, num_workers: int, worker: int, what: str, round_number: int) -> DivergedError:
    """Return the error for a non-finite result; it names a non-finite sample of the worker, if there is one."""
    if bad := find_non_finite_sample(job, num_workers, worker, round_number):
        return DivergedError(
            f"worker {worker} returned {what} in round {round_number}: {bad}. Remove or correct this sample"
        )
    return DivergedError(
        f"worker {worker} returned {what} in round {round_number}: training has diverged. "
        "Lower the learning rate (train.optimizer.args.lr). Checkpoints of earlier rounds are unchanged"
    )


def _report(headers: Sequence[Header], lost: Sequence[Lost], spent: Mapping[str, float], parallel: bool) -> RoundReport:
    """Return the report of a round, from its workers' numbers and the seconds of each phase of its last attempt."""
    measured = [header.numbers for header in headers]
    numbers = combined(measured, parallel)
    computes = [of_worker["compute_s"] for of_worker in measured]
    critical = max(computes) if parallel else sum(computes)
    # The wait for results includes the time in which workers compute.
    exchange = max(0.0, spent["exchange"] - critical - numbers["aside_s"])
    numbers |= {
        "workers": len(headers) + len(lost),
        "loss": sum(of_worker["loss_sum"] for of_worker in measured) / numbers["samples"],
        "exchange_s": exchange,
        "idle_s": max(0.0, critical - numbers["compute_s"]) if parallel else 0.0,
        "cut_s": spent["cut"],
        "merge_s": spent["merge"],
        "virtual_s": max(of_worker["cpu_s"] for of_worker in measured) + exchange + spent["cut"] + spent["merge"],
    }
    by_worker = [header.numbers for header in sorted(headers, key=lambda header: header.worker)]
    return RoundReport(numbers, by_worker, tuple(lost))
