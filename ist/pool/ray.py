"""Workers as Ray actors, which may die, be slow, come and go: the driver coordinates.

A round's subnets travel through Ray's object store: the driver cuts one after the other into the same memory and
puts each into the store (one copy); an actor copies it into the message it trains on; the trained message is put
into the store (one copy), where the driver merges from it without copying.

Whoever is lost in a round is replaced before the next. The first `train.min_workers` actors share a placement group,
so that they are placed together or not at all; the others are placed as room is found.
Not here: starting or finding a cluster (`ist/pool/ray_cluster.py`), what a lost worker means (`ist/coordinator.py`).
"""

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ist import optim
from ist.config import Ray
from ist.errors import PoolError, WorkerLostError, first_line
from ist.job import Job
from ist.meter import Meter
from ist.pool import Lost, Place, Subnet
from ist.pool.device import compute_device
from ist.pool.wire import Layout, Message
from ist.worker import Seat

_START_ATTEMPTS = 3
_POLL_S = 0.2
_SIGN_OF_LIFE_S = 5.0

Flat = NDArray[np.uint8]


class RayWorker:
    """The actor: one worker of the run.

    Args:
        job: The run, for as many workers as there may be.
        name: What the actor is called.
    """

    def __init__(self, job: Job, name: str) -> None:
        torch.set_num_threads(job.config.pool.threads)
        self._threads = job.config.pool.threads
        self._device = compute_device(job.config.pool)
        self._seat = Seat(job, self._device)
        # The first optimiser imports much of torch: neither the first round's time nor the subnet's memory.
        optim.build_optimizer(job.config.train.optimizer, [torch.nn.Parameter(torch.zeros(2, 3))])
        self._message: Message | None = None
        self._over = -1
        self.name = name

    @ray.method(concurrency_group="control", enable_task_events=False)
    def where(self) -> str:
        """Return the address of the node that this worker runs on: a sign of life."""
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    # Ray's record of every call would have the cluster's memory grow with the number of rounds.
    @ray.method(enable_task_events=False)
    def train(self, round_number: int, place: Place, received: Flat) -> Flat:
        """Train a subnet for a round.

        Args:
            round_number: The round, from 0.
            place: Which worker of how many this is in the round.
            received: The part of the message that was sent; read-only, as it lies in the object store.

        Returns:
            The trained message.

        Raises:
            PoolError: What was received is not this round's subnet of this worker.
            AbandonedRoundError: The round went on without this worker.
        """
        torch.set_num_threads(self._threads)  # actors run on a thread of their own
        worker = self._seat.worker(place)
        layout = worker.job.layout(place.worker, round_number)
        if self._message is None or self._message.layout != layout:
            self._message = Message(layout, self._device)
        message = self._message
        expected = layout.end_of(worker.job.sent_names(layout, round_number))
        if received.shape != (expected,):
            raise PoolError(f"{self.name} expected a message of {expected} bytes, received {received.shape}")
        message.flat[:expected].copy_(_as_tensor(received))
        message.read_header(round_number, place.worker)
        worker.train(round_number, message, lambda: self._over >= round_number)
        trained: Flat = message.flat.cpu().numpy()
        return trained

    @ray.method(concurrency_group="control", enable_task_events=False)
    def abandon(self, round_number: int) -> None:
        """Be told that a round goes on without this worker: its next local step will not be made."""
        self._over = max(self._over, round_number)


@dataclass
class _Member:
    """An actor, and what it is doing for us.

    Attributes:
        slot: Which of the run's workers it stands for; an actor that takes over after a loss has the same.
        starting: Answers when the actor runs; None afterwards.
        busy: A round that goes on without it, but that it may still be training; since when.
    """

    slot: int
    name: str
    actor: Any
    starting: Any | None
    where: str = "?"
    busy: Any | None = None
    busy_since: float = 0.0

    @property
    def is_free(self) -> bool:
        return self.starting is None and self.busy is None


class RayPool:
    """The driver's side.

    Args:
        job: The run; its configuration says how many workers there may be and what each needs.
        meter: Counts payload bytes.
        label: What actors are named after; must be this run's own in the cluster.
        worker_class: The class of the actors.

    Raises:
        PoolError: The job cannot be sent to actors.
    """

    parallel = True

    def __init__(self, job: Job, meter: Meter, label: str, worker_class: type = RayWorker) -> None:
        config = job.config
        self._meter = meter
        self._label = label
        self._settings = config.pool.ray
        self._round_s = config.pool.round_deadline_s or config.pool.timeout_s
        self._has_deadline = config.pool.round_deadline_s is not None
        self._most = config.train.workers
        self._least = config.train.min_workers or self._most
        remote: Any = ray.remote  # its annotations leave concurrency groups out
        self._class = remote(concurrency_groups={"control": 1})(worker_class)
        try:
            self._job = ray.put(job.for_workers())
        except (TypeError, AttributeError) as error:
            raise PoolError(
                f"network, data or loss cannot be sent to Ray workers: {first_line(error)}. Define them in a module, "
                "not inside a function"
            ) from error
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._group = placement_group([_bundle(self._settings)] * self._least, self._settings.placement)
        self._members: dict[int, _Member] = {}
        self._crew: list[_Member] = []
        self._generation = 0
        self._failed_starts: dict[int, int] = {}
        self._retry_at: dict[int, float] = {}
        self._last_cause = ""

    def gather(self, round_number: int) -> tuple[str, ...]:
        """Let new workers take the place of lost ones, and wait until enough are there.

        Raises:
            WorkerLostError: There are too few after `pool.ray.start_timeout_s`, or they fail as they start.
        """
        deadline = time.monotonic() + self._settings.start_timeout_s
        self._dismiss_the_dead()
        while True:
            self._fill_slots()
            self._poll()
            self._crew = [member for _, member in sorted(self._members.items()) if member.is_free]
            if len(self._crew) >= self._least:
                return tuple(f"worker-{member.slot}" for member in self._crew)
            failing = max(self._failed_starts.values(), default=0) >= _START_ATTEMPTS
            if failing or time.monotonic() > deadline:
                raise WorkerLostError(self._too_few(round_number, failing))
            waited_for = [ref for member in self._members.values() for ref in (member.starting, member.busy) if ref]
            if waited_for:
                ray.wait(waited_for, timeout=_POLL_S, fetch_local=False)
            else:
                time.sleep(_POLL_S)

    def message(self, worker: int, layout: Layout) -> Message:  # noqa: ARG002
        """Return memory for a message, the same for all workers: what is sent is a copy in the object store."""
        if self._scratch.nbytes < layout.nbytes:
            self._scratch = torch.zeros(layout.nbytes, dtype=torch.uint8)
        return Message(layout, flat=self._scratch[: layout.nbytes])

    def train(self, round_number: int, subnets: Iterable[Subnet]) -> Iterator[Subnet | Lost]:
        """Send subnets, and yield each as it comes back; whoever is not back in time is told so."""
        began = time.monotonic()
        pending: dict[Any, Subnet] = {}
        for subnet in subnets:
            try:
                sent = ray.put(subnet.message.flat[: subnet.sent_bytes].numpy())
            except ObjectStoreFullError as error:
                raise PoolError(
                    f"Ray's object store is full: a subnet of {subnet.sent_bytes} bytes does not fit. Give nodes a "
                    "larger one (ray start --object-store-memory; shm_size in containers)"
                ) from error
            actor = self._crew[subnet.worker].actor
            pending[actor.train.remote(round_number, subnet.place, sent)] = subnet
            self._meter.sent[subnet.worker] += subnet.sent_bytes
        while pending:
            left = began + self._round_s - time.monotonic()
            done, _ = ray.wait(list(pending), timeout=max(0.0, left))
            if not done:
                break
            subnet = pending.pop(done[0])
            yield self._result(done[0], subnet)
            del done
        for ref, subnet in pending.items():
            yield self._late(ref, subnet, round_number)

    def close(self) -> None:
        """Let the actors and their resources go."""
        with suppress(RayError):  # the cluster itself may be gone
            for member in self._members.values():
                ray.kill(member.actor)
            remove_placement_group(self._group)
        self._members.clear()
        self._crew.clear()

    def _result(self, ref: Any, subnet: Subnet) -> Subnet | Lost:
        member = self._crew[subnet.worker]
        try:
            # Its bytes may be on a node that is gone; then they never come.
            trained = ray.get(ref, timeout=self._round_s)
        except RayTaskError as error:  # the actor is well, its code failed
            return Lost(subnet.worker, f"{member.name} on {member.where} failed: {first_line(_cause(error))}")
        except (RayActorError, RayError) as error:
            self._dismiss(member)
            return Lost(subnet.worker, f"{member.name} on {member.where} is gone: {_why_gone(error)}")
        layout = subnet.message.layout
        if not isinstance(trained, np.ndarray) or trained.dtype != np.uint8 or trained.shape != (layout.nbytes,):
            what = f"{trained.dtype} {trained.shape}" if isinstance(trained, np.ndarray) else type(trained).__name__
            reason = f"{member.name} on {member.where} returned {what} instead of {layout.nbytes} bytes"
            return Lost(subnet.worker, reason, "rejected")
        self._meter.received[subnet.worker] += trained.nbytes
        return Subnet(subnet.place, Message(layout, flat=_as_tensor(trained)), subnet.sent_bytes)

    def _late(self, ref: Any, subnet: Subnet, round_number: int) -> Lost:
        member = self._crew[subnet.worker]
        waited = f"{member.name} on {member.where} was not back after {self._round_s:g} s"
        if not self._has_deadline:  # pool.timeout_s: it is given up
            self._dismiss(member)
            return Lost(subnet.worker, waited)
        member.busy, member.busy_since = ref, time.monotonic()
        member.actor.abandon.remote(round_number)
        return Lost(subnet.worker, waited, "late")

    def _fill_slots(self) -> None:
        """Start an actor for every slot that has none, the failing ones after a pause that grows."""
        now = time.monotonic()
        for slot in range(self._most):
            if slot in self._members or now < self._retry_at.get(slot, 0.0):
                continue
            self._generation += 1
            name = f"{self._label}-worker-{slot}-{self._generation}"
            grouped = slot < self._least
            strategy: Any = PlacementGroupSchedulingStrategy(self._group, slot) if grouped else "SPREAD"
            actor = self._class.options(
                name=name,
                num_cpus=self._settings.num_cpus,
                num_gpus=self._settings.num_gpus,
                resources=self._settings.resources,
                scheduling_strategy=strategy,
                max_restarts=0,
                max_task_retries=0,
            ).remote(self._job, name)
            self._members[slot] = _Member(slot, name, actor, actor.where.remote())

    def _dismiss_the_dead(self) -> None:
        """Look for actors that died since the last round: whoever is replaced now costs no round its part."""
        answers = {member.actor.where.remote(): member for member in self._members.values() if member.is_free}
        if answers:
            ray.wait(list(answers), num_returns=len(answers), timeout=_SIGN_OF_LIFE_S, fetch_local=False)
        for answer, member in answers.items():
            done, _ = ray.wait([answer], timeout=0, fetch_local=False)
            try:
                if done:  # who does not answer in time may yet: the round will tell
                    ray.get(answer)
            except RayError:
                self._dismiss(member)

    def _poll(self) -> None:
        """See which actors have started, which are done with a round they were left out of, and which have failed."""
        for member in list(self._members.values()):
            ref = member.starting or member.busy
            if ref is None:
                continue
            done, _ = ray.wait([ref], timeout=0, fetch_local=False)
            if not done:
                # Told to stop and still not back: as good as dead.
                if member.busy is not None and time.monotonic() - member.busy_since > self._round_s:
                    self._dismiss(member)
                continue
            started = member.starting is not None
            try:
                answer = ray.get(ref)
            except RayTaskError as error:
                if started:
                    self._start_failed(member, _cause(error))
            except RayError as error:
                if started:
                    self._start_failed(member, error)
                else:
                    self._dismiss(member)
            else:
                if started:
                    member.where = str(answer)
                    self._failed_starts.pop(member.slot, None)
            member.starting = member.busy = None

    def _start_failed(self, member: _Member, error: BaseException) -> None:
        self._dismiss(member)
        self._last_cause = f"{member.name}: {_why_gone(error)}"
        failed = self._failed_starts.get(member.slot, 0) + 1
        self._failed_starts[member.slot] = failed
        self._retry_at[member.slot] = time.monotonic() + min(60.0, 2.0**failed)

    def _dismiss(self, member: _Member) -> None:
        """Give an actor up; its slot is filled before the next round."""
        ray.kill(member.actor)
        if self._members.get(member.slot) is member:
            del self._members[member.slot]

    def _too_few(self, round_number: int, failing: bool) -> str:
        there = f"{len(self._crew)} of {self._least} Ray workers are there for round {round_number}"
        if failing:
            return f"{there}: they fail as they start. {self._last_cause}"
        cause = f" Last failure: {self._last_cause}" if self._last_cause else ""
        cluster: Any = ray
        has, free = _plain(cluster.cluster_resources()), _plain(cluster.available_resources())
        return (
            f"{there} after {self._settings.start_timeout_s:g} s (pool.ray.start_timeout_s). Each needs "
            f"{_bundle(self._settings)}; of {has} in the cluster, {free} are free. Add nodes, ask for less (pool.ray), "
            f"or let the number of workers vary (train.workers: {{min: 1, max: {self._most}}}).{cause}"
        )


def _bundle(settings: Ray) -> dict[str, float]:
    wanted = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
    return {name: amount for name, amount in wanted.items() if amount} or {"CPU": 0.001}  # Ray wants some resource


def _plain(resources: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if ":" not in name and "_group_" not in name}


def _as_tensor(array: Flat) -> torch.Tensor:
    """View an array of the object store as a tensor; nobody writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _cause(error: RayTaskError) -> BaseException:
    return error.cause if isinstance(error.cause, BaseException) else error


def _why_gone(error: BaseException) -> str:
    if isinstance(error, GetTimeoutError):
        return "its result could not be fetched"
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray's text begins with generalities; what killed the actor stands last.
    return lines[-1] if lines else type(error).__name__
