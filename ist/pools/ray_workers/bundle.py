"""The Ray actors of one worker: a single actor, or several on one node that train its subnet together.

With `pool.ranks_per_worker`, the first actor of a bundle is the lead: it exchanges the worker's messages with the
driver. Ray reserves the resources of a whole bundle on one node. The actors form a process group of their own; if one
of them is lost or fails, the group is broken, so the driver replaces the whole bundle.
Where it sits: `actors.py` starts bundles, calls their actors and replaces them.
Not here: the code of an actor (`ist/pools/ray_actor.py`), the process group (`ist/distributed/worker_group.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ist.config.runtime import Ray
from ist.errors import AbandonedRoundError, PoolError

NOWHERE = "?"
_CAUSE_TIMEOUT_S = 5.0


@dataclass
class Bundle:
    """The actors of a worker and their status.

    Attributes:
        slot: The worker slot of the run that the bundle fills; its replacement fills the same slot.
        name: The name of the lead, which is also that of the bundle.
        actors: Ray's handles of the actors; the lead is the first one.
        starting: References that Ray fulfils when the actors answer; empty after that.
        placement: The placement group of this bundle alone; None: it is part of a larger one, or is a single actor.
        where: The address of its node.
        busy: The results of a round that has continued without the bundle, and that it may still be training.
        busy_since: The time of `busy`.
        failures: The number of consecutive rounds in which its code has failed.
    """

    slot: int
    name: str
    actors: tuple[Any, ...]
    starting: Sequence[Any]
    placement: Any | None = None
    where: str = NOWHERE
    busy: Sequence[Any] = field(default=())
    busy_since: float = 0.0
    failures: int = 0

    @property
    def actor(self) -> Any:
        """The lead's handle."""
        return self.actors[0]

    @property
    def is_group(self) -> bool:
        """Whether several actors are the worker."""
        return len(self.actors) > 1

    @property
    def is_free(self) -> bool:
        """Whether the bundle has started and trains nothing."""
        return not self.starting and not self.busy

    def ping(self) -> list[Any]:
        """Return references that Ray fulfils when the actors answer, with the addresses of their nodes."""
        return [actor.where.remote() for actor in self.actors]

    def kill(self) -> None:
        """Kill the actors and release their resources.

        Raises:
            RayError: The cluster is lost.
        """
        for actor in self.actors:
            ray.kill(actor)
        if self.placement is not None:
            remove_placement_group(self.placement)


def start_bundle(
    actor_class: Any,
    arguments: Sequence[Any],
    settings: Ray,
    num_ranks: int,
    slot: int,
    name: str,
    reserved: Any | None,
) -> Bundle:
    """Start the actors of a worker.

    Args:
        actor_class: The class of the actors, made remote.
        arguments: The arguments of its constructor besides the name; see `RayWorker`.
        settings: The resources of each actor.
        num_ranks: How many actors the worker has.
        slot: The worker slot of the run.
        name: The name of the lead.
        reserved: A placement group whose bundle `slot` is for this worker; None: Ray searches a node for the worker.
    """
    placement = None
    if reserved is None and num_ranks > 1:
        placement = placement_group([resources_of(settings, num_ranks)], "STRICT_PACK")
    strategy: Any = "SPREAD"
    if reserved is not None:
        strategy = PlacementGroupSchedulingStrategy(reserved, slot)
    elif placement is not None:
        strategy = PlacementGroupSchedulingStrategy(placement, 0)
    job, *others = arguments
    actors = []
    for rank in range(num_ranks):
        own_name = f"{name}-rank-{rank}" if rank else name
        options = {
            "name": own_name,
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "resources": settings.resources,
            "scheduling_strategy": strategy,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        actors.append(actor_class.options(**options).remote(job, own_name, *others))
    bundle = Bundle(slot, name, tuple(actors), (), placement)
    if num_ranks == 1:
        bundle.starting = bundle.ping()
    else:
        meeting = bundle.actor.host_meeting.remote()
        bundle.starting = [actor.meet.remote(meeting, rank, slot) for rank, actor in enumerate(actors)]
    return bundle


def resources_of(settings: Ray, num_ranks: int = 1) -> dict[str, float]:
    """Return the resources that Ray reserves for the actors of a worker; never empty."""
    wanted = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
    return {name: num_ranks * amount for name, amount in wanted.items() if amount} or {"CPU": 0.001}


def answered(references: Sequence[Any], timeout_s: float = 0.0) -> list[Any]:
    """Return those references that Ray has fulfilled, or that have failed."""
    done, _ = ray.wait(list(references), num_returns=len(references), timeout=timeout_s, fetch_local=False)
    return list(done)


def failure(reference: Any) -> RayError | None:
    """Return the error of a call that has ended; None if it succeeded. It fetches the result."""
    try:
        ray.get(reference, timeout=_CAUSE_TIMEOUT_S)
    except RayError as error:
        return error
    return None


def was_abandoned(error: RayError) -> bool:
    """Return whether an actor has stopped because the round has continued without its worker."""
    return isinstance(error, RayTaskError) and isinstance(cause_of(error), AbandonedRoundError)


def first_failure(error: RayError, references: Sequence[Any]) -> RayError:
    """Return the error of the actor of a bundle that failed first: the others only lose their peer, at the same time.

    Args:
        error: The error of one of them.
        references: The results of all.
    """
    if not _is_consequence(error):
        return error
    errors = filter(None, map(failure, answered(references, _CAUSE_TIMEOUT_S)))
    return min([error, *errors], key=_is_consequence)


def _is_consequence(error: RayError) -> bool:
    return isinstance(error, RayTaskError) and isinstance(cause_of(error), PoolError)


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
