"""The Ray actors that run workers: the driver starts and replaces them, calls them, and waits for their results.

Lost workers are replaced before the next round. A fixed number of workers shares a placement group, so that Ray places
all of them or none. With a range of workers, Ray places each as soon as there is room. Every worker must answer a ping
before a round starts. If workers of a fixed number repeatedly die while replacements start, the round starts with the
available workers if they are enough (`pool.min_returned`); the missing ones count as lost in that round.

Where it sits: `ist/pools/ray_pool.py` sends subnets to these actors, and `ist/pools/ray_shards/pool.py` sends pieces.
Not here: the actors of one worker (`bundle.py`), their code (`ist/pools/ray_actor.py`), what a round does about a lost
worker (`ist/training/coordinator.py`).
"""

import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group

from ist.config.schema import min_returned, ranks_per_worker
from ist.errors import PoolError, WorkerLostError, first_line
from ist.monitoring.meter import Meter
from ist.pools.ray_workers.bundle import (
    NOWHERE,
    Bundle,
    answered,
    cause_of,
    failure,
    first_failure,
    resources_of,
    start_bundle,
    was_abandoned,
    why_gone,
)
from ist.subnet.job import Job, for_one_worker, for_workers
from ist.training.worker_state import CheckpointLocation
from ist.transport.interfaces import Lost

_START_ATTEMPTS = 3
"""Consecutive errors in an actor's constructor after which its slot is given up, because the next would fail too."""
_START_DEATHS = 20
"""Consecutive deaths of starting processes after which a slot is given up; more, because the next may survive."""
_DEATHS_WHILE_WAITING = 2
"""Deaths while waiting for all workers after which a round starts with fewer, because the wait may never end."""
_POLL_S = 0.2
_PING_TIMEOUT_S = 5.0


class Addressed(Protocol):
    """What is sent to a worker of a round."""

    @property
    def worker(self) -> int:
        """The number of the worker in the round."""
        ...


_Sent = TypeVar("_Sent", bound=Addressed)


@dataclass(frozen=True, eq=False)
class Call(Generic[_Sent]):
    """A subnet that a worker trains.

    Attributes:
        sent: What was sent to the worker.
        results: Ray's references to the results of its actors; the lead's is the first one.
        ticket: The number of the call; later calls have larger ones.
        deadline: When it is late, on the monotonic clock, in seconds.
    """

    sent: _Sent
    results: tuple[Any, ...]
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
        self._ranks = ranks_per_worker(config)
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
            of_worker = resources_of(self._settings, self._ranks)  # a bundle of resources is on one node
            self._group = placement_group([of_worker] * self._max_workers, self._settings.placement)
        self._members: dict[int, Bundle] = {}
        self._round_members: list[Bundle | None] = []  # None: the round starts without this worker
        self._generation = 0
        self._ticket = -1
        self._pending: dict[Any, Call[_Sent]] = {}  # by Ray's references to the results that have not arrived
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
        if any(member.busy for member in self._members.values()):
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
            awaited = [ref for member in self._members.values() for ref in (*member.starting, *member.busy)]
            done = set(answered(awaited)) if awaited else set()
            if waiting := [ref for ref in awaited if ref not in done]:  # actors of a worker answer one after the other
                ray.wait(waiting, timeout=_POLL_S, fetch_local=False)
            elif not awaited:
                time.sleep(_POLL_S)

    def process(self, worker: int) -> str:
        """Return the name of a worker's actor; its replacement has another name."""
        member = self._round_members[worker]
        return member.name if member else f"no actor for worker {worker}"

    def _called(self, results: Sequence[Any], sent: _Sent) -> None:
        """Note a call of `_next_ticket`, whose results are awaited until its deadline."""
        call = Call(sent, tuple(results), self._ticket, time.monotonic() + self._round_s)
        self._pending |= dict.fromkeys(results, call)

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
                    if (result := self._arrived(done[0])) is not None:
                        yield result
                    del done, result
                    continue
                now = time.monotonic()
                for call in dict.fromkeys(call for call in pending.values() if call.deadline <= now):
                    self._forget(call)
                    yield self._late(call)
        finally:  # also if the round ends early
            for call in dict.fromkeys(pending.values()):
                self._abandon(call)
            pending.clear()
            self._missing.clear()

    def _arrived(self, reference: Any) -> _Sent | Lost | None:
        """Return the result of a worker; None if another actor than its lead has ended without a failure."""
        call = self._pending.pop(reference)
        if reference == call.results[0]:
            self._forget(call)
            return self._result(call)
        if (error := failure(reference)) is None:
            return None
        self._forget(call)
        return self._lost(call, error)

    def _forget(self, call: Call[_Sent]) -> None:
        for reference in call.results:
            self._pending.pop(reference, None)

    def restart(self) -> None:
        """Dismiss all actors, so that new ones start before the next round."""
        for member in list(self._members.values()):
            self._dismiss(member)

    def close(self) -> None:
        """Kill the actors and release their resources."""
        for member in self._members.values():
            with suppress(RayError):  # the cluster may be lost
                member.kill()
        if self._group:
            with suppress(RayError):
                remove_placement_group(self._group)
            self._group = None
        self._members.clear()
        self._round_members.clear()

    def _member(self, sent: _Sent) -> Bundle:
        member = self._round_members[sent.worker]
        assert member is not None
        return member

    def _result(self, call: Call[_Sent]) -> _Sent | Lost:
        """Return a worker's result."""
        raise NotImplementedError

    def _answer(self, call: Call[_Sent]) -> Any:
        """Return what the lead of a worker has returned; `Lost` if one of the worker's actors has failed or is gone."""
        lead, *others = call.results
        try:
            # The result may be on a lost node: without a timeout, this would wait forever.
            answer = ray.get(lead, timeout=self._round_s)
            ray.get(others, timeout=self._round_s)  # they end together with the lead
        except RayError as error:
            return self._lost(call, error)
        self._member(call.sent).failures = 0
        return answer

    def _lost(self, call: Call[_Sent], error: RayError) -> Lost:
        """Return why a worker is lost; it is replaced if its actors can no longer train."""
        member, error = self._member(call.sent), first_failure(error, call.results)
        if not isinstance(error, RayTaskError):
            self._dismiss(member)
            return Lost(call.sent.worker, f"{member.name} on {member.where} is gone: {why_gone(error)}")
        # The actor is alive, but its code failed: replace it after a second failure, or if others wait for it.
        member.failures += 1
        if member.failures > 1 or member.is_group:
            self._dismiss(member)
        return Lost(call.sent.worker, f"{member.name} on {member.where} failed: {first_line(cause_of(error))}")

    def _late(self, call: Call[_Sent]) -> Lost:
        sent, member = call.sent, self._member(call.sent)
        waited = f"{member.name} on {member.where} did not answer within {self._round_s:g} s"
        if not self._has_deadline:  # after pool.timeout_s, the actor is replaced
            self._dismiss(member)
            return Lost(sent.worker, waited)
        self._abandon(call)
        return Lost(sent.worker, waited, "late")

    def _abandon(self, call: Call[_Sent]) -> None:
        """Notify a worker that the round continues without it; it is free again when its actors have answered.

        The actors of a bundle agree on the step before which they stop only if there is a deadline. Otherwise the
        bundle is replaced.
        """
        member = self._member(call.sent)
        if member.is_group and not self._has_deadline:
            self._dismiss(member)
            return
        member.busy, member.busy_since = call.results, time.monotonic()
        member.actor.abandon.remote(call.ticket)

    def _fill_slots(self) -> None:
        """Start the actors of every empty slot; after failures, wait for a growing time first."""
        now = time.monotonic()
        for slot in range(self._max_workers):
            if slot in self._members or now < self._retry_at.get(slot, 0.0):
                continue
            self._generation += 1
            name = f"{self._label}-worker-{slot}-{self._generation}"
            arguments = (self._jobs[slot], self._location)
            self._members[slot] = start_bundle(
                self._class, arguments, self._settings, self._ranks, slot, name, self._group
            )

    def _dismiss_dead(self) -> int:
        """Dismiss dead actors, so that they are replaced before the round; return how many there were."""
        answers = {answer: m for m in list(self._members.values()) if m.is_free for answer in m.ping()}
        if answers:
            ray.wait(list(answers), num_returns=len(answers), timeout=_PING_TIMEOUT_S, fetch_local=False)
        dead = set()
        for answer, member in answers.items():
            # An actor without an answer may still be alive: the round finds out.
            if member.slot not in dead and answered([answer]) and failure(answer) is not None:
                dead.add(member.slot)
                self._dismiss(member)
        return len(dead)

    def _poll(self) -> int:
        """Update the status of workers that are starting, or busy with a round that has continued without them.

        Returns:
            The number of workers that have died.
        """
        dead = 0
        for member in list(self._members.values()):
            if member.busy:
                self._poll_busy(member)
            elif member.starting:
                dead += self._poll_starting(member)
        return dead

    def _poll_busy(self, member: Bundle) -> None:
        """Ping the actors when they have ended the round that has continued without them, and ignore its result."""
        done = answered(member.busy)
        errors = [failure(reference) for reference in done if reference != member.busy[0]]
        if any(error is not None and not was_abandoned(error) for error in errors):
            self._dismiss(member)  # its actors are no longer at the same step
        elif len(done) == len(member.busy):
            member.busy, member.starting = (), member.ping()
        elif time.monotonic() - member.busy_since > self._round_s:
            self._dismiss(member)  # it does not answer for a whole round

    def _poll_starting(self, member: Bundle) -> bool:
        """Note that actors have answered; return whether one has died."""
        done = answered(member.starting)
        error = next(filter(None, map(failure, done)), None)
        if error is not None:
            error = first_failure(error, member.starting)
            if member.where == NOWHERE:
                self._start_failed(member, error)
            else:
                self._dismiss(member)
            return True
        if len(done) == len(member.starting):
            member.where, member.starting = str(ray.get(member.starting[0])), ()
            self._failed_starts.pop(member.slot, None)
            self._slots_given_up.discard(member.slot)
        return False

    def _start_failed(self, member: Bundle, error: RayError) -> None:
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

    def _dismiss(self, member: Bundle) -> None:
        """Kill the actors of a worker; its slot is filled before the next round."""
        member.kill()
        if self._members.get(member.slot) is member:
            del self._members[member.slot]

    def _too_few(self, round_number: int, found: int, failing: bool) -> str:
        ready = f"{found} of {self._min_workers} Ray workers are ready for round {round_number}"
        if failing:
            return f"{ready}: workers fail as they start. {self._last_cause}"
        cause = f" Last failure: {self._last_cause}" if self._last_cause else ""
        cluster: Any = ray
        has, free = _plain(cluster.cluster_resources()), _plain(cluster.available_resources())
        wanted = resources_of(self._settings, self._ranks)
        on_one_node = " on one node" if self._ranks > 1 else ""
        return (
            f"{ready} after {self._settings.start_timeout_s:g} s (pool.ray.start_timeout_s). Each needs "
            f"{wanted}{on_one_node}; the cluster has {has}, of which {free} are free. Add nodes, request fewer "
            "resources (pool.ray), or allow fewer workers "
            f"(train.workers: {{min: 1, max: {self._max_workers}}}).{cause}"
        )


def _put_jobs(job: Job) -> list[Any]:
    """Put the run into the object store, and return a reference for each worker slot.

    A worker that has one slot to the end of the run gets its own samples only.
    """
    slots = range(job.config.train.workers)
    if for_one_worker(job, 0) is job:
        return [ray.put(for_workers(job))] * len(slots)
    return [ray.put(for_workers(for_one_worker(job, slot))) for slot in slots]


def _plain(resources: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if ":" not in name and "_group_" not in name}
