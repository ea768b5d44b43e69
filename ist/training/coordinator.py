"""What the coordinator does in a round of Independent Subnet Training: cut, exchange, merge.

Where it sits: one of the methods that `ist/training/rounds.py` runs.
Not here: the round loop; gloo, nccl, ray; files; printing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from torch import Tensor, nn

from ist.checks.finite_values import not_finite_sample
from ist.config.schema import Config, min_returned
from ist.errors import DivergedError, ISTError, PoolError, WorkerLostError
from ist.measurements import combined
from ist.monitoring.meter import Meter
from ist.optimization import optimizers
from ist.storage.checkpoint import check_tensors
from ist.subnet.assignments import Team, WorkerSlot
from ist.subnet.cut import Cut, placed, reassemble
from ist.subnet.job import Job, assignments
from ist.subnet.partition import holds_everything
from ist.tensors import is_finite
from ist.training.outer_optimizer import PREFIX as OUTER
from ist.training.outer_optimizer import OuterStep
from ist.training.rounds import RoundReport
from ist.training.speed_balance import SpeedBalance
from ist.transport.codec import SCALE
from ist.transport.endpoints import Outgoing, read_trained
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
        self._team = Team(job.config.train.workers)
        self._outgoing = Outgoing(job.split, job.config.exchange)
        self._device = device = next(model.parameters()).device
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.contiguous()
        tensors = model.state_dict()
        fresh = optimizers.initial_state(job.split.state_slots, job.split.state_specs, device)
        self._state: dict[str, Tensor] = {name: tensors[name] for name in job.split.model_specs} | fresh
        trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        momentum = (
            {f"{OUTER}{name}": tensor for name, tensor in trained.items()} if job.config.recipe.has_outer_step else {}
        )
        if carried is not None:
            check_tensors(carried, {**fresh, **momentum})
        self._frozen = FrozenSender(job.split, job.config.exchange, tensors, device)
        # Masks hold infinities from the start.
        self._never_finite = {name for name in job.split.model_specs if not is_finite([tensors[name]])}
        saved = dict(carried or {})
        self._outer: OuterStep | None = None
        if job.config.recipe.has_outer_step:
            self._outer = OuterStep(trained, {name: saved.pop(name) for name in list(saved) if name.startswith(OUTER)})
        for name, tensor in saved.items():
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
            DivergedError: Too few came back well, nobody was lost, and the first had something that is not finite.
            PoolError: Too few came back well, nobody was lost, and the first had a message of another round or shape.
            WorkerLostError: Too few came back, or too few are there to begin with.

        Reference: Yuan et al., arXiv 1910.02120, Algorithm 1.
        """
        failed: list[Lost] = []
        outer = None if self.job.schedule.outer(round_number).is_plain else self._outer
        # Where all hold everything, how long a worker takes says nothing of shares, and does not follow them.
        balance = None if holds_everything(self._held.partition(round_number)) else self._balance
        for left in reversed(range(attempts(self.job.config))):
            names = self._pool.gather(round_number)
            before = dict(self._meter.seconds)
            self._team = Team(len(names), balance.capacities(names) if balance else None)
            self._frozen.begin(map(self._pool.process, range(len(names))))
            with self._meter.phase("cut"):
                cuts = placed(self._held.cuts(round_number, self._team), self._device)
            headers: list[Header] = []
            lost: list[Lost] = []
            if outer and not failed:
                outer.begin()
            try:
                with self._meter.phase("merge"):
                    subnets = self._subnets(round_number, cuts)
                    trained = self._accept(round_number, subnets, cuts, headers, lost)
                    reassemble(self._state, cuts, trained, self._held.exclusive(round_number))
                    if outer:
                        outer.step(self.job.schedule.outer(round_number), cuts, (header.worker for header in headers))
                break
            except WorkerLostError:
                if not left:
                    raise
                failed += lost
        spent = {phase: seconds - before.get(phase, 0.0) for phase, seconds in self._meter.seconds.items()}
        if balance:
            took = {header.worker: header.numbers["compute_s"] for header in headers}
            took |= {late.worker: spent["train"] for late in lost if late.kind == "late"}
            balance.note({names[worker]: seconds for worker, seconds in took.items()})
        report = _report(headers, lost, spent, self._pool.parallel)
        return replace(report, lost=(*failed, *report.lost))

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return the whole network's tensors, carried optimiser state, and the outer step's momentum."""
        outer = self._outer.checkpoint_state() if self._outer else {}
        return {**self._model.state_dict(), **{name: self._state[name] for name in self.job.split.state_specs}, **outer}

    def bytes_sent(self) -> int:
        """Return the bytes of all messages so far, both ways."""
        return self._meter.total_bytes

    def close(self) -> None:
        """Let the workers go."""
        self._pool.close()

    def _subnets(self, round_number: int, cuts: Sequence[Cut]) -> Iterator[Subnet]:
        """Cut each subnet when it is asked for.

        By then others may have been merged: what two workers hold is merged last of all, and the rest is theirs alone.
        """
        held = self._held.of(round_number, self._team)
        for worker, (cut, neurons) in enumerate(zip(cuts, held, strict=True)):
            with self._meter.phase("cut"):
                envelope = self._pool.envelope(worker, self._outgoing.route(cut))
                sent = self._outgoing.write(self._state, cut, round_number, envelope)
                frozen, relies = self._frozen.write(
                    self._pool.process(worker), worker, round_number, self.job.split.frozen_cut(neurons)
                )
                envelope.down.write_header(Header(round_number, worker, relies=relies))
            yield Subnet(WorkerSlot(worker, self._team), envelope, sent, frozen)

    def _check_finite(self, header: Header, tensors: Mapping[str, Tensor]) -> None:
        if not math.isfinite(loss := header.numbers["loss_sum"]):
            what = f"a loss of {loss}"
        else:
            checked = (name for name in tensors if name.removesuffix(SCALE) not in self._never_finite)
            bad = next((name for name in checked if not is_finite([tensors[name]])), None)
            if bad is None:
                return
            what = f"values in '{bad.removesuffix(SCALE)}' that are not finite"
        raise diverged(self.job, self._team.num_workers, header.worker, what, header.round_number)

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
        num_workers = self._team.num_workers
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
                        self._check_finite(header, result.envelope.up.tensors)
                        tensors = read_trained(
                            self.job.config.exchange, self._state, cuts[result.worker], result.envelope
                        )
                    except (PoolError, DivergedError) as error:
                        causes.append(error)
                        lost.append(Lost(result.worker, str(error), "rejected"))
                    else:
                        headers.append(header)
                        self._frozen.returned(self._pool.process(result.worker))
                        yield result.worker, tensors
                else:
                    lost.append(result)
                    text = f"worker {result.worker} was {result.kind} in round {round_number} ({result.reason})"
                    causes.append(WorkerLostError(f"{text}; {needed} of {num_workers} workers are needed"))
                if num_workers - len(lost) < needed:
                    # Who was lost can be replaced: that comes before who returned nonsense.
                    raise next((cause for cause in causes if isinstance(cause, WorkerLostError)), causes[0])


def attempts(config: Config) -> int:
    """Return how often a round may be begun: once, unless the pool replaces workers while a run goes on."""
    return config.pool.round_attempts if config.pool.spec.replaces_workers else 1


def diverged(job: Job, num_workers: int, worker: int, what: str, round_number: int) -> DivergedError:
    """Return the error about a worker that returned something that is not finite: its data, or divergence."""
    if bad := not_finite_sample(job, num_workers, worker, round_number):
        return DivergedError(
            f"worker {worker} returned {what} in round {round_number}: {bad}. Leave it out, or mend it"
        )
    return DivergedError(
        f"worker {worker} returned {what} in round {round_number}: training has diverged. "
        "Lower the learning rate (train.optimizer.args.lr); checkpoints of earlier rounds are as they were"
    )


def _report(headers: Sequence[Header], lost: Sequence[Lost], spent: Mapping[str, float], parallel: bool) -> RoundReport:
    measured = [header.numbers for header in headers]
    numbers = combined(measured, parallel)
    computes = [of_worker["compute_s"] for of_worker in measured]
    critical = max(computes) if parallel else sum(computes)
    cut, merge = spent["cut"], spent["merge"] - spent["train"]
    # Subnets are cut while the pool asks for them.
    exchange = max(0.0, spent["train"] - cut - critical - numbers["aside_s"])
    numbers |= {
        "workers": len(headers) + len(lost),
        "loss": sum(of_worker["loss_sum"] for of_worker in measured) / numbers["samples"],
        "exchange_s": exchange,
        "idle_s": max(0.0, critical - numbers["compute_s"]) if parallel else 0.0,
        "cut_s": cut,
        "merge_s": merge,
        "virtual_s": max(of_worker["cpu_s"] for of_worker in measured) + exchange + cut + merge,
    }
    by_worker = [header.numbers for header in sorted(headers, key=lambda header: header.worker)]
    return RoundReport(numbers, by_worker, tuple(lost))
