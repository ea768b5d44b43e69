"""The workers of a run whose network is in shards: Ray actors that get the pieces of their subnets from its owners.

The pieces are in Ray's object store: a worker fetches them from the owners, and the owners fetch the trained pieces
from it. Only the driver knows the references; it never fetches a piece.
Where it sits: `ist/pools/ray_shards/method.py` sends the pieces to the workers.
Not here: starting and replacing actors, deadlines (`ist/pools/ray_workers/actors.py`), the actor (`worker.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ist.monitoring.meter import Meter
from ist.pools.ray_shards.worker import RayShardWorker
from ist.pools.ray_workers.actors import Call, RayActors
from ist.subnet.assignments import WorkerSlot
from ist.subnet.job import Job
from ist.training.worker_state import CheckpointLocation
from ist.transport.interfaces import Lost
from ist.transport.message import Header


@dataclass(frozen=True)
class Trained:
    """A worker's subnet in pieces.

    Attributes:
        slot: The worker.
        pieces: Ray's references to the trained pieces, by owner.
        header: The header of the trained subnet; None: it is not trained yet.
    """

    slot: WorkerSlot
    pieces: Sequence[Any]
    header: Header | None = None

    @property
    def worker(self) -> int:
        """The number of the worker in the round."""
        return self.slot.worker


class ShardWorkers(RayActors[Trained]):
    """The actors that train subnets in pieces.

    Args:
        job: The run; its configuration has the number of workers and the resources of each.
        meter: Counts payload bytes to workers.
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
        worker_class: type = RayShardWorker,
        location: CheckpointLocation | None = None,
    ) -> None:
        super().__init__(job, meter, label, worker_class, location)

    def submit(self, round_number: int, slot: WorkerSlot, pieces: Sequence[Any], sent_bytes: int) -> None:
        """Call a worker's actor to train a subnet.

        Args:
            round_number: The round, from 0.
            slot: The worker.
            pieces: Ray's references to the pieces, by owner.
            sent_bytes: The bytes of all pieces.
        """
        if self._round_members[slot.worker] is None:
            self._missing.append(slot.worker)
            return
        train = self._member(Trained(slot, ())).actor.train_pieces.options(num_returns=1 + len(pieces))
        header, *trained = train.remote(self._next_ticket(), round_number, slot, *pieces)
        self._called([header], Trained(slot, trained))
        self._meter.sent[slot.worker] += sent_bytes

    def _result(self, call: Call[Trained]) -> Trained | Lost:
        header = self._answer(call)
        return header if isinstance(header, Lost) else replace(call.sent, header=header)
