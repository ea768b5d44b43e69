"""The actors that own the shards of the full network, as the driver sees them: it starts, calls and replaces them.

Where it sits: `ist/pools/ray_shards/method.py` calls all owners together.
Not here: what an owner does (`ist/pools/ray_shards/owner.py`), from where a lost owner's rows come back (`method.py`).
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ist.errors import ISTError, PoolError, first_line
from ist.evaluation.task import NO_SAMPLES
from ist.pools.ray_shards.owner import RayOwner
from ist.pools.ray_workers.bundle import cause_of, why_gone
from ist.subnet.job import Job, for_workers


class OwnersLostError(Exception):
    """Owners are gone, and their rows with them.

    Args:
        causes: Why, by owner.
    """

    def __init__(self, causes: dict[int, str]) -> None:
        super().__init__("; ".join(f"owner {owner}: {cause}" for owner, cause in causes.items()))
        self.causes = causes


class Owners:
    """All owners of a run.

    Args:
        job: The run; there are as many owners as `train.workers`.
        label: Prefix of the actors' names; must be unique in the cluster.
        owner_class: The class of the actors.

    Raises:
        PoolError: The job cannot be sent to actors.
    """

    def __init__(self, job: Job, label: str, owner_class: type = RayOwner) -> None:
        self.count = job.config.train.workers
        self._label = label
        self._timeout_s = job.config.pool.timeout_s
        self._generation = 0
        remote: Any = ray.remote
        self._class = remote(owner_class)
        alone = for_workers(job)
        task = replace(alone.task, train_data=NO_SAMPLES, loop=None, own_data=None, statistics=None, example=None)
        try:
            self._job = ray.put(replace(alone, task=task))
        except (RayError, TypeError, AttributeError) as error:
            raise PoolError(
                f"the network cannot be sent to Ray actors: {first_line(error)}. Define it in a module, not inside a "
                "function"
            ) from error
        self._actors = [self._started(owner) for owner in range(self.count)]

    def _started(self, owner: int) -> Any:
        self._generation += 1
        nodes = _nodes()
        options = {
            "name": f"{self._label}-owner-{owner}-{self._generation}",
            "num_cpus": 0,  # an owner computes only while workers wait
            # Ray spreads only actors that reserve something. In turn, so that a replica is on another node than its
            # owner; the first and the last owner may share a node.
            "scheduling_strategy": NodeAffinitySchedulingStrategy(nodes[owner % len(nodes)], soft=True),
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        return self._class.options(**options).remote(self._job, owner, self.count)

    def replace(self, owner: int) -> None:
        """Start a new actor for an owner, which has no rows yet."""
        with suppress(RayError):
            ray.kill(self._actors[owner])
        self._actors[owner] = self._started(owner)

    def begin(self, owner: int, method: str, *arguments: Any, num_returns: int = 1) -> Any:
        """Call a method of an owner; return Ray's reference to the result, or a list of references."""
        return getattr(self._actors[owner], method).options(num_returns=num_returns).remote(*arguments)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all owners with the same arguments, and return the results.

        Raises:
            ISTError: An owner's code raises it.
            OwnersLostError: Owners are gone, or do not answer within `pool.timeout_s`.
        """
        return self.answers({owner: self.begin(owner, method, *arguments) for owner in range(self.count)})

    def answers(self, references: Mapping[int, Any]) -> list[Any]:
        """Return the results of calls, by owner; see `call`."""
        found = self.outcomes(references)
        for outcome in found:
            if isinstance(outcome, RayTaskError):
                cause = cause_of(outcome)
                if isinstance(cause, ISTError):
                    raise cause
                raise PoolError(f"an owner of the network's rows failed: {first_line(cause)}") from outcome
        return found

    def outcomes(self, references: Mapping[int, Any]) -> list[Any]:
        """Return the results of calls, by owner, or Ray's error where an owner's code has failed.

        Raises:
            OwnersLostError: Owners are gone, or do not answer within `pool.timeout_s`.
        """
        ray.wait(list(references.values()), num_returns=len(references), timeout=self._timeout_s, fetch_local=False)
        found: list[Any] = []
        lost: dict[int, str] = {}
        for owner, reference in references.items():
            done, _ = ray.wait([reference], timeout=0, fetch_local=False)
            try:
                found.append(ray.get(reference, timeout=self._timeout_s if done else 0))
            except RayTaskError as error:
                found.append(error)
            except RayError as error:
                lost[owner] = why_gone(error) if done else f"it did not answer within {self._timeout_s:g} s"
        if lost:
            raise OwnersLostError(lost)
        return found

    def close(self) -> None:
        """Kill the actors."""
        for actor in self._actors:
            with suppress(RayError):  # the cluster may be lost
                ray.kill(actor)


def _nodes() -> list[str]:
    """Return the ids of the nodes that owners are spread over: those that run tasks, if any does."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    able = [node for node in alive if node["Resources"].get("CPU")] or alive
    return sorted(node["NodeID"] for node in able)
