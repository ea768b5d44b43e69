"""The Ray pool: workers are Ray actors, which may die, be slow, join and leave; the driver coordinates.

Subnets travel through Ray's object store. The driver cuts one subnet after the other into the same memory and puts
each into the store (one copy). An actor copies it into its buffers and trains it. The result goes into the store (one
copy), and the driver merges from there without a copy. If a worker is several actors (`pool.ranks_per_worker`), the
first of them receives, passes the message on to the others, and returns the result.
Where it sits: `ist/runs/opening/methods.py` creates it; `ist/training/coordinator.py` uses it through `WorkerPool`.
Not here: connecting to a cluster (`ist/pools/ray_cluster.py`), the actor (`ist/pools/ray_actor.py`), starting and
replacing actors, deadlines (`ist/pools/ray_workers/actors.py`).
"""

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from ist.errors import PoolError, first_line
from ist.monitoring.meter import Meter
from ist.pools.ray_actor import RayWorker, as_tensor
from ist.pools.ray_workers.actors import Call, RayActors
from ist.subnet.job import Job
from ist.training.worker_state import CheckpointLocation
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.interfaces import Lost, Subnet


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
        lead, *others = self._member(subnet).actors
        what = (self._next_ticket(), round_number, subnet.slot)
        result = lead.train.remote(*what, sent, *beside)
        self._called([result, *(actor.train.remote(*what) for actor in others)], subnet)
        self._meter.sent[subnet.worker] += subnet.down_bytes

    def _result(self, call: Call[Subnet]) -> Subnet | Lost:
        sent, trained = call.sent, self._answer(call)
        if isinstance(trained, Lost):
            return trained
        layouts, member = sent.buffers.layouts, self._member(sent)
        if not isinstance(trained, np.ndarray) or trained.dtype != np.uint8 or trained.shape != (layouts.up.nbytes,):
            what = f"{trained.dtype} {trained.shape}" if isinstance(trained, np.ndarray) else type(trained).__name__
            reason = f"{member.name} on {member.where} returned {what} instead of {layouts.up.nbytes} bytes"
            return Lost(sent.worker, reason, "rejected")
        self._meter.received[sent.worker] += trained.nbytes
        return Subnet(sent.slot, MessageBuffers(layouts, flat=as_tensor(trained)), sent.sent_bytes)
