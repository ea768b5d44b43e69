"""A worker of the Ray pool: the actor.

Not here: who calls it (`ist/pools/ray_pool.py`), the local steps (`ist/training/worker.py`).
"""

import warnings

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from ist.distributed.device import compute_device
from ist.errors import PoolError
from ist.optimization import optimizers
from ist.subnet.assignments import WorkerSlot
from ist.subnet.job import Job, assignments
from ist.training.worker import WorkerHost
from ist.training.worker_state import CheckpointLocation
from ist.transport.codec import MessageBuffers
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.message import Message

Flat = NDArray[np.uint8]


class RayWorker:
    """The actor: one worker of the run.

    Args:
        job: The run, for as many workers as there may be.
        name: What the actor is called.
        location: Where workers save what they keep; None: nowhere.
    """

    def __init__(self, job: Job, name: str, location: CheckpointLocation | None = None) -> None:
        torch.set_num_threads(job.config.pool.threads)
        self._threads = job.config.pool.threads
        # Ray does not hide the GPUs that this actor did not reserve.
        self._device = compute_device(job.config.pool) if ray.get_gpu_ids() else torch.device("cpu")
        self._host = WorkerHost(job, self._device, assignments(job), location)
        # The first optimiser imports much of torch: neither the first round's time nor the subnet's memory.
        optimizers.build_optimizer(job.config.train.optimizer, [torch.nn.Parameter(torch.zeros(2, 3))])
        self._buffers: MessageBuffers | None = None
        self._over = -1
        self.name = name

    @ray.method(concurrency_group="control", enable_task_events=False)
    def where(self) -> str:
        """Return the address of the node that this worker runs on: a sign of life."""
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    # Ray's record of every call would have the cluster's memory grow with the number of rounds.
    @ray.method(enable_task_events=False)
    def train(
        self, ticket: int, round_number: int, slot: WorkerSlot, received: Flat, beside: Flat | None = None
    ) -> Flat:
        """Train a subnet for a round.

        Args:
            ticket: What `abandon` calls this attempt; later attempts have larger ones.
            round_number: The round, from 0.
            slot: Which worker of which team this is in the round.
            received: The part of the message that was sent; read-only, as it lies in the object store.
            beside: Frozen parameters that this worker lacks, likewise.

        Returns:
            The trained message.

        Raises:
            PoolError: What was received is not this round's subnet of this worker.
            AbandonedRoundError: The round went on without this worker.
        """
        torch.set_num_threads(self._threads)  # actors run on a thread of their own
        worker = self._host.worker(slot)
        split, neurons = worker.job.split, worker.neurons(round_number)
        layouts = message_layouts(split, worker.job.config.exchange, split.cut(neurons))
        if self._buffers is None or self._buffers.layouts != layouts:
            self._buffers = MessageBuffers(layouts, self._device)
        buffers = self._buffers
        expected = down_bytes(split, layouts, round_number)
        if received.shape != (expected,):
            raise PoolError(f"{self.name} expected a message of {expected} bytes, received {received.shape}")
        buffers.flat[:expected].copy_(as_tensor(received))
        header = buffers.down.read_header(round_number, slot.worker)
        layout = worker.frozen.layout(neurons, header.reuses_frozen)
        if (layout.nbytes if layout else 0) != (len(beside) if beside is not None else 0):
            raise PoolError(
                f"{self.name} expected {layout.nbytes if layout else 0} bytes of frozen parameters, received "
                f"{len(beside) if beside is not None else 0}"
            )
        frozen = Message(layout, flat=as_tensor(beside)) if layout is not None and beside is not None else None
        worker.train(round_number, buffers, frozen, lambda: self._over >= ticket)
        trained: Flat = buffers.up.flat.cpu().numpy()
        return trained

    @ray.method(concurrency_group="control", enable_task_events=False)
    def abandon(self, ticket: int) -> None:
        """Be told that a round goes on without this worker: its next local step will not be made."""
        self._over = max(self._over, ticket)


def as_tensor(array: Flat) -> torch.Tensor:
    """View an array of the object store as a tensor; nobody writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
