"""What the coordinator does in a round of Independent Subnet Training: cut, exchange, merge.

Where it sits: one of the methods that `ist/training/rounds.py` runs.
Not here: the round loop; gloo, nccl, ray; files; printing.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from torch import Tensor, nn

from ist.checks.finite_values import find_non_finite_sample
from ist.config.schema import Config, min_returned
from ist.errors import DivergedError, ISTError, PoolError, WorkerLostError
from ist.measurements import combined
from ist.monitoring.meter import Meter, Stopwatch
from ist.optimization import optimizers
from ist.storage.checkpoint import check_tensors
from ist.subnet.assignments import Team, WorkerSlot
from ist.subnet.cut import Cut, on_device
from ist.subnet.job import Job, assignments
from ist.subnet.partition import holds_everything
from ist.subnet.store import LocalStore, ParameterStore
from ist.tensors import is_finite
from ist.training.outer_optimizer import PREFIX as OUTER
from ist.training.outer_optimizer import OuterOptimizer
from ist.training.rounds import RoundReport
from ist.training.speed_balance import SpeedBalance
from ist.transport.codec import SCALE
from ist.transport.endpoints import SubnetWriter, read_trained
from ist.transport.frozen_parameters import FrozenSender
from ist.transport.interfaces import Lost, Subnet, WorkerPool
from ist.transport.message import Header


class Coordinator:
    """Independent Subnet Training, as the coordinator sees it; a `Method`.

    Args:
        job: The run.
        pool: Carries subnets to workers and back.
        model: The whole network, trained in place.
        meter: Counts what the pool sends.
        carried: Of a run that is resumed: optimiser state, where it is carried, and the outer step's. None: it begins.

    Raises:
        CheckpointError: `carried` lacks something, or holds what the configuration has no use for.
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
        trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        momentum = (
            {f"{OUTER}{name}": tensor for name, tensor in trained.items()}
            if job.config.recipe.has_outer_optimizer
            else {}
        )
        if carried is not None:
            check_tensors(carried, {**fresh, **momentum})
        self._frozen = FrozenSender(job.split, job.config.exchange, tensors, device)
        # Masks hold infinities from the start.
        self._never_finite = {name for name in job.split.model_specs if not is_finite([tensors[name]])}
        saved = dict(carried or {})
        self._outer: OuterOptimizer | None = None
        if job.config.recipe.has_outer_optimizer:
            self._outer = OuterOptimizer(
                trained, {name: saved.pop(name) for name in list(saved) if name.startswith(OUTER)}
            )
        for name, tensor in saved.items():
            self._store.tensors()[name].copy_(tensor)

    @property
    def model(self) -> nn.Module:
        """The whole network; merging writes into it."""
        return self._model

    def train_round(self, round_number: int) -> RoundReport:
        """Cut subnets for the workers that are there, have them trained, and merge what comes back.

        A worker that does not come back, or comes back with nonsense, is left out: its neurons keep their values. Where
        too few come back and others may take their places, the round is begun anew; what did come back stays merged.

        Raises:
            DivergedError: Too few came back well, nobody was lost, and the first had something that is not finite.
            PoolError: Too few came back well, nobody was lost, and the first had a message of another round or shape.
            WorkerLostError: Too few came back, or too few are there to begin with.

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
            arrivals, watch = _Arrivals(team.num_workers, self._min_returned), Stopwatch()
            self._frozen.begin(map(self._pool.process, range(team.num_workers)))
            with watch.phase("cut"):
                cuts = on_device(self._held.cuts(round_number, team), self._device)
            for worker, cut in enumerate(cuts):
                with watch.phase("cut"):
                    subnet = self._cut(round_number, WorkerSlot(worker, team), cut)
                with watch.phase("exchange"):
                    self._pool.submit(round_number, subnet)
            try:
                with closing(self._pool.results()) as results:
                    merge = self._store.merge(cuts, self._held.exclusive(round_number))
                    while True:
                        with watch.phase("exchange"):
                            result = next(results, None)
                        if result is None:
                            break
                        with watch.phase("merge"):
                            tensors = self._take(round_number, result, cuts, arrivals)
                            if tensors is not None:
                                merge.add(result.worker, tensors)
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
        return replace(report, lost=(*failed, *report.lost))

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return the whole network's tensors, carried optimiser state, and the outer step's momentum."""
        outer = self._outer.checkpoint_state() if self._outer else {}
        stored = self._store.tensors()
        return {**self._model.state_dict(), **{name: stored[name] for name in self.job.split.state_specs}, **outer}

    def bytes_sent(self) -> int:
        """Return the bytes of all messages so far, both ways."""
        return self._meter.total_bytes

    def close(self) -> None:
        """Let the workers go."""
        self._pool.close()

    def _team(self, names: Sequence[str], round_number: int) -> Team:
        """Return the workers of a round, with shares that follow their speed where that is configured."""
        balance = self._balance_of(round_number)
        return Team(len(names), balance.capacities(names) if balance else None)

    def _balance_of(self, round_number: int) -> SpeedBalance | None:
        """Return what shares follow in a round: nothing where all hold everything, and time says nothing of shares."""
        return None if holds_everything(self._held.partition(round_number)) else self._balance

    def _note_speed(self, round_number: int, names: Sequence[str], arrivals: "_Arrivals", watch: Stopwatch) -> None:
        """Note how long each worker of a round took, for the shares of the next."""
        if balance := self._balance_of(round_number):
            took = {header.worker: header.numbers["compute_s"] for header in arrivals.headers}
            took |= {late.worker: watch.seconds["exchange"] for late in arrivals.lost if late.kind == "late"}
            balance.note({names[worker]: seconds for worker, seconds in took.items()})

    def _cut(self, round_number: int, slot: WorkerSlot, cut: Cut) -> Subnet:
        """Cut a worker's subnet into the memory that the pool gives for it, with what it lacks of frozen parameters."""
        worker = slot.worker
        buffers = self._pool.buffers(worker, self._writer.layouts(cut))
        sent = self._writer.write(self._store, cut, round_number, buffers)
        neurons = self._held.of(round_number, slot.team)[worker]
        frozen, reuses_frozen = self._frozen.write(
            self._pool.process(worker), worker, round_number, self.job.split.frozen_cut(neurons)
        )
        buffers.down.write_header(Header(round_number, worker, reuses_frozen=reuses_frozen))
        return Subnet(slot, buffers, sent, frozen)

    def _take(
        self, round_number: int, result: Subnet | Lost, cuts: Sequence[Cut], arrivals: "_Arrivals"
    ) -> Mapping[str, Tensor] | None:
        """Return what a worker trained, checked; None: it is left out of the merge.

        Raises:
            ISTError: Too many are left out; see `train_round`.
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
        if not math.isfinite(loss := header.numbers["loss_sum"]):
            what = f"a loss of {loss}"
        else:
            checked = (name for name in tensors if name.removesuffix(SCALE) not in self._never_finite)
            bad = next((name for name in checked if not is_finite([tensors[name]])), None)
            if bad is None:
                return
            what = f"values in '{bad.removesuffix(SCALE)}' that are not finite"
        raise diverged(self.job, num_workers, header.worker, what, header.round_number)


class _Arrivals:
    """What has come back in an attempt at a round.

    Args:
        num_workers: Workers of the round.
        min_returned: The fewest whose part must come back well.

    Attributes:
        headers: Of those whose part is merged, in the order of arrival.
        lost: Those that are left out.
    """

    def __init__(self, num_workers: int, min_returned: int) -> None:
        self.num_workers = num_workers
        self.headers: list[Header] = []
        self.lost: list[Lost] = []
        self._needed = min(min_returned, num_workers)
        self._causes: list[ISTError] = []

    def lost_error(self, lost: Lost, round_number: int) -> WorkerLostError:
        """Return the error of a round that fails for a lost worker."""
        text = f"worker {lost.worker} was {lost.kind} in round {round_number} ({lost.reason})"
        return WorkerLostError(f"{text}; {self._needed} of {self.num_workers} workers are needed")

    def lose(self, lost: Lost, cause: ISTError) -> None:
        """Leave a worker out of the merge.

        Raises:
            ISTError: Too few are left: the first cause, that of a lost worker before others.
        """
        self.lost.append(lost)
        self._causes.append(cause)
        if self.num_workers - len(self.lost) < self._needed:
            # Report lost workers first: they can be replaced, invalid results cannot.
            raise next((error for error in self._causes if isinstance(error, WorkerLostError)), self._causes[0])


def attempts(config: Config) -> int:
    """Return how often a round may be begun: once, unless the pool replaces workers while a run goes on."""
    return config.pool.round_attempts if config.pool.spec.replaces_workers else 1


def diverged(job: Job, num_workers: int, worker: int, what: str, round_number: int) -> DivergedError:
    """Return the error about a worker that returned something that is not finite: its data, or divergence."""
    if bad := find_non_finite_sample(job, num_workers, worker, round_number):
        return DivergedError(
            f"worker {worker} returned {what} in round {round_number}: {bad}. Leave it out, or mend it"
        )
    return DivergedError(
        f"worker {worker} returned {what} in round {round_number}: training has diverged. "
        "Lower the learning rate (train.optimizer.args.lr); checkpoints of earlier rounds are as they were"
    )


def _report(headers: Sequence[Header], lost: Sequence[Lost], spent: Mapping[str, float], parallel: bool) -> RoundReport:
    """Return the report of a round, of what its workers measured and how long each phase of its last attempt took."""
    measured = [header.numbers for header in headers]
    numbers = combined(measured, parallel)
    computes = [of_worker["compute_s"] for of_worker in measured]
    critical = max(computes) if parallel else sum(computes)
    # While the coordinator waits for results, workers compute.
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
