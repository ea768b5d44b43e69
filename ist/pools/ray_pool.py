"""The Ray pool: workers are Ray actors, which may die, be slow, join and leave; the driver coordinates.

Subnets travel through Ray's object store. The driver cuts one subnet after the other into the same memory and puts
each into the store (one copy). An actor copies it into its buffers and trains it. The result goes into the store (one
copy), and the driver merges from there without a copy.

Lost workers are replaced before the next round. A fixed number of actors shares a placement group, so that Ray places
all of them or none. With a range of workers, Ray places each as soon as there is room. Every worker must answer a ping
before a round starts. If workers of a fixed number repeatedly die while replacements start, the round starts with the
available workers if they are enough (`pool.min_returned`); the missing ones count as lost in that round.

Where it sits: `ist/runs/opening/methods.py` creates it; `ist/training/coordinator.py` uses it through `WorkerPool`.
Not here: connecting to a cluster (`ist/pools/ray_cluster.py`), the actor (`ist/pools/ray_actor.py`), what a round does
about a lost worker (`ist/training/coordinator.py`).
"""

import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ist.config.runtime import Ray
from ist.config.schema import min_returned
from ist.errors import PoolError, WorkerLostError, first_line
from ist.monitoring.meter import Meter
from ist.pools.ray_actor import RayWorker, as_tensor
from ist.subnet.job import Job, for_one_worker, for_workers
from ist.training.worker_state import CheckpointLocation
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.interfaces import Lost, Subnet

_START_ATTEMPTS = 3
"""Consecutive errors in an actor's constructor after which its slot is given up, because the next would fail too."""
_START_DEATHS = 20
"""Consecutive deaths of starting processes after which a slot is given up; more, because the next may survive."""
_DEATHS_WHILE_WAITING = 2
"""Deaths while waiting for all workers after which a round starts with fewer, because the wait may never end."""
_POLL_S = 0.2
_NOWHERE = "?"
_PING_TIMEOUT_S = 5.0


class Addressed(Protocol):
    """What is sent to a worker of a round."""

    @property
    def worker(self) -> int:
        """The number of the worker in the round."""
        ...


_Sent = TypeVar("_Sent", bound=Addressed)


@dataclass
class _Member:
    """An actor and its status.

    Attributes:
        slot: The worker slot of the run that the actor fills; its replacement fills the same slot.
        name: The actor's name.
        actor: Ray's handle of the actor.
        starting: A reference that Ray fulfils when the actor answers; None after that.
        where: The address of its node.
        busy: The result of a round that has continued without the actor, and that it may still be training.
        busy_since: The time of `busy`.
        failures: The number of consecutive rounds in which its code has failed.
    """

    slot: int
    name: str
    actor: Any
    starting: Any | None
    where: str = _NOWHERE
    busy: Any | None = None
    busy_since: float = 0.0
    failures: int = 0

    @property
    def is_free(self) -> bool:
        return self.starting is None and self.busy is None


@dataclass(frozen=True)
class _Call(Generic[_Sent]):
    """A subnet that an actor trains.

    Attributes:
        sent: What was sent to the actor.
        ticket: The number of the call; later calls have larger ones.
        deadline: When it is late, on the monotonic clock, in seconds.
    """

    sent: _Sent
    ticket: int
    deadline: float


class RayActors(Generic[_Sent]):
    """The actors that run workers: the driver starts and replaces them, and waits for their results.

    Args:
        job: The run; its configuration has the number of workers and the resources of each.
        meter: Counts payload bytes.
        label: Prefix of the actors' names; must be unique in the cluster.
        worker_class: The class of the actors.
        location: Where workers save their state; None: nowhere.

    Raises:
        PoolError: The job cannot be sent to actors.
    """

    parallel = True

    def __init__(
        self,
        job: Job,
        meter: Meter,
        label: str,
        worker_class: type,
        location: CheckpointLocation | None = None,
    ) -> None:
        config = job.config
        self._meter = meter
        self._label = label
        self._location = location
        self._settings = config.pool.ray
        self._round_s = config.pool.round_deadline_s or config.pool.timeout_s
        self._has_deadline = config.pool.round_deadline_s is not None
        self._max_workers = config.train.workers
        self._min_workers = config.train.min_workers or self._max_workers
        self._min_after_deaths = self._min_workers if config.train.is_elastic else min_returned(config)
        remote: Any = ray.remote  # its annotations lack concurrency groups
        self._class = remote(concurrency_groups={"control": 1})(worker_class)
        try:
            self._jobs = _put_jobs(job)
        except RayError as error:
            raise PoolError(
                f"could not put the network and the data into Ray's object store: {first_line(error)}"
            ) from error
        except (TypeError, AttributeError) as error:
            raise PoolError(
                f"network, data or loss cannot be sent to Ray workers: {first_line(error)}. Define them in a module, "
                "not inside a function"
            ) from error
        self._group: Any = None
        if not config.train.is_elastic:
            self._group = placement_group([_bundle(self._settings)] * self._max_workers, self._settings.placement)
        self._members: dict[int, _Member] = {}
        self._round_members: list[_Member | None] = []  # None: the round starts without this worker
        self._generation = 0
        self._ticket = -1
        self._pending: dict[Any, _Call[_Sent]] = {}  # by Ray's reference to the result
        self._missing: list[int] = []  # workers whose subnets were submitted, but who died
        self._failed_starts: dict[int, int] = {}
        self._slots_given_up: set[int] = set()
        self._retry_at: dict[int, float] = {}
        self._last_cause = ""

    def gather(self, round_number: int) -> tuple[str, ...]:
        """Start replacements for lost workers, and wait until enough workers are ready.

        Raises:
            WorkerLostError: Too few workers are ready after `pool.ray.start_timeout_s`, or they fail as they start.
        """
        deadline = time.monotonic() + self._settings.start_timeout_s
        if any(member.busy is not None for member in self._members.values()):
            deadline += self._round_s  # busy workers may be replaced only after that time
        self._dismiss_dead()
        has_waited, deaths = False, 0
        while True:
            self._fill_slots()
            deaths += self._poll()
            free = [member for _, member in sorted(self._members.items()) if member.is_free]
            if len(free) >= (self._min_after_deaths if deaths >= _DEATHS_WHILE_WAITING else self._min_workers):
                died = self._dismiss_dead() if has_waited else 0
                if not died:
                    enough = len(free) >= self._min_workers
                    slots = [member.slot for member in free] if enough else list(range(self._max_workers))
                    there = {member.slot: member for member in free}
                    self._round_members = [there.get(slot) for slot in slots]
                    return tuple(f"worker-{slot}" for slot in slots)
                deaths += died
                continue
            failing = self._max_workers - len(self._slots_given_up) < self._min_workers
            if failing or time.monotonic() > deadline:
                raise WorkerLostError(self._too_few(round_number, len(free), failing))
            has_waited = True
            waited_for = [ref for member in self._members.values() for ref in (member.starting, member.busy) if ref]
            if waited_for:
                ray.wait(waited_for, timeout=_POLL_S, fetch_local=False)
            else:
                time.sleep(_POLL_S)

    def process(self, worker: int) -> str:
        """Return the name of a worker's actor; its replacement has another name."""
        member = self._round_members[worker]
        return member.name if member else f"no actor for worker {worker}"

    def _called(self, ref: Any, sent: _Sent) -> None:
        """Note a call of `_next_ticket`, whose result is awaited until its deadline."""
        self._pending[ref] = _Call(sent, self._ticket, time.monotonic() + self._round_s)

    def _next_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    def results(self) -> Generator[_Sent | Lost]:
        """Yield each result when it arrives; at its deadline, call `abandon` on a worker that has not answered."""
        pending = self._pending
        try:
            while self._missing or pending:
                while self._missing:
                    worker = self._missing.pop(0)
                    yield Lost(worker, "it died, and more workers died while its replacement was starting")
                left = min((call.deadline for call in pending.values()), default=0.0) - time.monotonic()
                done, _ = ray.wait(list(pending), timeout=max(0.0, left)) if pending else ([], [])
                if done:
                    yield self._result(done[0], pending.pop(done[0]).sent)
                    del done
                    continue
                for ref in [ref for ref, call in pending.items() if call.deadline <= time.monotonic()]:
                    yield self._late(ref, pending.pop(ref))
        finally:  # also if the round ends early
            for ref, call in pending.items():
                self._abandon(call, ref)
            pending.clear()
            self._missing.clear()

    def restart(self) -> None:
        """Dismiss all actors, so that new ones start before the next round."""
        for member in list(self._members.values()):
            self._dismiss(member)

    def close(self) -> None:
        """Kill the actors and release their resources."""
        for member in self._members.values():
            with suppress(RayError):  # the cluster may be lost
                ray.kill(member.actor)
        if self._group:
            with suppress(RayError):
                remove_placement_group(self._group)
            self._group = None
        self._members.clear()
        self._round_members.clear()

    def _member(self, sent: _Sent) -> _Member:
        member = self._round_members[sent.worker]
        assert member is not None
        return member

    def _result(self, ref: Any, sent: _Sent) -> _Sent | Lost:
        """Return a worker's result."""
        raise NotImplementedError

    def _answer(self, ref: Any, sent: _Sent) -> Any:
        """Return what an actor has returned; `Lost` if it has failed or is gone."""
        member = self._member(sent)
        try:
            # The result may be on a lost node: without a timeout, this would wait forever.
            answer = ray.get(ref, timeout=self._round_s)
        except RayTaskError as error:  # the actor is alive, but its code failed; replace it after a second failure
            member.failures += 1
            if member.failures > 1:
                self._dismiss(member)
            return Lost(sent.worker, f"{member.name} on {member.where} failed: {first_line(cause_of(error))}")
        except RayError as error:
            self._dismiss(member)
            return Lost(sent.worker, f"{member.name} on {member.where} is gone: {why_gone(error)}")
        member.failures = 0
        return answer

    def _late(self, ref: Any, call: _Call[_Sent]) -> Lost:
        sent, member = call.sent, self._member(call.sent)
        waited = f"{member.name} on {member.where} did not answer within {self._round_s:g} s"
        if not self._has_deadline:  # after pool.timeout_s, the actor is replaced
            self._dismiss(member)
            return Lost(sent.worker, waited)
        self._abandon(call, ref)
        return Lost(sent.worker, waited, "late")

    def _abandon(self, call: _Call[_Sent], ref: Any) -> None:
        """Notify an actor that the round continues without it; it is free again when it has answered."""
        member = self._member(call.sent)
        member.busy, member.busy_since = ref, time.monotonic()
        member.actor.abandon.remote(call.ticket)

    def _fill_slots(self) -> None:
        """Start an actor for every empty slot; after failures, wait for a growing time first."""
        now = time.monotonic()
        for slot in range(self._max_workers):
            if slot in self._members or now < self._retry_at.get(slot, 0.0):
                continue
            self._generation += 1
            name = f"{self._label}-worker-{slot}-{self._generation}"
            strategy: Any = PlacementGroupSchedulingStrategy(self._group, slot) if self._group else "SPREAD"
            actor = self._class.options(
                name=name,
                num_cpus=self._settings.num_cpus,
                num_gpus=self._settings.num_gpus,
                resources=self._settings.resources,
                scheduling_strategy=strategy,
                max_restarts=0,
                max_task_retries=0,
            ).remote(self._jobs[slot], name, self._location)
            self._members[slot] = _Member(slot, name, actor, actor.where.remote())

    def _dismiss_dead(self) -> int:
        """Dismiss dead actors, so that they are replaced before the round; return how many there were."""
        dead = 0
        answers = {member.actor.where.remote(): member for member in self._members.values() if member.is_free}
        if answers:
            ray.wait(list(answers), num_returns=len(answers), timeout=_PING_TIMEOUT_S, fetch_local=False)
        for answer, member in answers.items():
            done, _ = ray.wait([answer], timeout=0, fetch_local=False)
            try:
                if done:  # an actor without an answer may still be alive: the round finds out
                    ray.get(answer)
            except RayError:
                dead += 1
                self._dismiss(member)
        return dead

    def _poll(self) -> int:
        """Update the status of actors that are starting, or busy with a round that has continued without them.

        Returns:
            The number of actors that have died.
        """
        dead = 0
        for member in list(self._members.values()):
            ref = member.starting or member.busy
            if ref is None:
                continue
            done, _ = ray.wait([ref], timeout=0, fetch_local=False)
            if not done:
                # An abandoned actor that does not answer for a whole round is replaced.
                if member.busy is not None and time.monotonic() - member.busy_since > self._round_s:
                    self._dismiss(member)
                continue
            if member.busy is not None:  # ignore the late result, and ping the actor
                member.busy, member.starting = None, member.actor.where.remote()
                continue
            member.starting = None
            try:
                member.where = str(ray.get(ref))
            except RayError as error:
                dead += 1
                if member.where == _NOWHERE:
                    self._start_failed(member, error)
                else:
                    self._dismiss(member)
            else:
                self._failed_starts.pop(member.slot, None)
                self._slots_given_up.discard(member.slot)
        return dead

    def _start_failed(self, member: _Member, error: RayError) -> None:
        self._dismiss(member)
        cause = cause_of(error) if isinstance(error, RayTaskError) else error
        self._last_cause = f"{member.name}: {why_gone(cause)}"
        failed = self._failed_starts.get(member.slot, 0) + 1
        self._failed_starts[member.slot] = failed
        # An error in the constructor will recur, so wait longer; a process that was killed may start the next time.
        comes_again = isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed)
        if failed >= (_START_ATTEMPTS if comes_again else _START_DEATHS):
            self._slots_given_up.add(member.slot)
        self._retry_at[member.slot] = time.monotonic() + (min(60.0, 2.0**failed) if comes_again else _POLL_S)

    def _dismiss(self, member: _Member) -> None:
        """Kill an actor; its slot is filled before the next round."""
        ray.kill(member.actor)
        if self._members.get(member.slot) is member:
            del self._members[member.slot]

    def _too_few(self, round_number: int, found: int, failing: bool) -> str:
        ready = f"{found} of {self._min_workers} Ray workers are ready for round {round_number}"
        if failing:
            return f"{ready}: workers fail as they start. {self._last_cause}"
        cause = f" Last failure: {self._last_cause}" if self._last_cause else ""
        cluster: Any = ray
        has, free = _plain(cluster.cluster_resources()), _plain(cluster.available_resources())
        return (
            f"{ready} after {self._settings.start_timeout_s:g} s (pool.ray.start_timeout_s). Each needs "
            f"{_bundle(self._settings)}; the cluster has {has}, of which {free} are free. Add nodes, request fewer "
            "resources (pool.ray), or allow fewer workers "
            f"(train.workers: {{min: 1, max: {self._max_workers}}}).{cause}"
        )


class RayPool(RayActors[Subnet]):
    """The driver's side of the pool; a `WorkerPool`.

    Args:
        job: The run; its configuration has the number of workers and the resources of each.
        meter: Counts payload bytes.
        label: Prefix of the actors' names; must be unique in the cluster.
        worker_class: The class of the actors.
        location: Where workers save their state; None: nowhere.

    Raises:
        PoolError: The job cannot be sent to actors.
    """

    def __init__(
        self,
        job: Job,
        meter: Meter,
        label: str,
        worker_class: type = RayWorker,
        location: CheckpointLocation | None = None,
    ) -> None:
        super().__init__(job, meter, label, worker_class, location)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:  # noqa: ARG002
        """Return buffers for a subnet, the same memory for all workers: the object store holds a copy of each."""
        if self._scratch.nbytes < layouts.nbytes:
            self._scratch = torch.zeros(layouts.nbytes, dtype=torch.uint8)
        return MessageBuffers(layouts, flat=self._scratch)

    def submit(self, round_number: int, subnet: Subnet) -> None:
        """Put a subnet into the object store, and call its actor to train it."""
        if self._round_members[subnet.worker] is None:
            self._missing.append(subnet.worker)
            return
        try:
            sent = ray.put(subnet.buffers.flat[: subnet.sent_bytes].numpy())
            beside = [ray.put(subnet.frozen.flat.numpy())] if subnet.frozen is not None else []
        except RayError as error:
            raise PoolError(
                f"could not put a subnet of {subnet.down_bytes} bytes into Ray's object store ({first_line(error)}): "
                "enlarge the store (ray start --object-store-memory; shm_size in containers)"
            ) from error
        train = self._member(subnet).actor.train
        self._called(train.remote(self._next_ticket(), round_number, subnet.slot, sent, *beside), subnet)
        self._meter.sent[subnet.worker] += subnet.down_bytes

    def _result(self, ref: Any, sent: Subnet) -> Subnet | Lost:
        trained = self._answer(ref, sent)
        if isinstance(trained, Lost):
            return trained
        layouts, member = sent.buffers.layouts, self._member(sent)
        if not isinstance(trained, np.ndarray) or trained.dtype != np.uint8 or trained.shape != (layouts.up.nbytes,):
            what = f"{trained.dtype} {trained.shape}" if isinstance(trained, np.ndarray) else type(trained).__name__
            reason = f"{member.name} on {member.where} returned {what} instead of {layouts.up.nbytes} bytes"
            return Lost(sent.worker, reason, "rejected")
        self._meter.received[sent.worker] += trained.nbytes
        return Subnet(sent.slot, MessageBuffers(layouts, flat=as_tensor(trained)), sent.sent_bytes)


def _put_jobs(job: Job) -> list[Any]:
    """Put the run into the object store, and return a reference for each worker slot.

    A worker that has one slot to the end of the run gets its own samples only.
    """
    slots = range(job.config.train.workers)
    if for_one_worker(job, 0) is job:
        return [ray.put(for_workers(job))] * len(slots)
    return [ray.put(for_workers(for_one_worker(job, slot))) for slot in slots]


def _bundle(settings: Ray) -> dict[str, float]:
    wanted = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
    return {name: amount for name, amount in wanted.items() if amount} or {"CPU": 0.001}  # a bundle must not be empty


def _plain(resources: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if ":" not in name and "_group_" not in name}


def cause_of(error: RayTaskError) -> BaseException:
    """Return what an actor's code has raised."""
    return error.cause if isinstance(error.cause, BaseException) else error


def why_gone(error: BaseException) -> str:
    """Return in one line why an actor is gone, or its result."""
    if isinstance(error, GetTimeoutError):
        return "its result could not be fetched in time"
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray's message starts with general text; the cause of death is its last line.
    return lines[-1] if lines else type(error).__name__
