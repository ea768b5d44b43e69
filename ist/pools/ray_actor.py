"""The Ray actor that runs a worker.

Where it sits: `ist/pools/ray_pool.py` starts the actors and calls `train`.
Not here: the local steps (`ist/loops/local_loop.py`).
"""

import warnings

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from ist.distributed.device import check_autocast, compute_device
from ist.errors import PoolError
from ist.loops.part import completed
from ist.subnet.assignments import WorkerSlot
from ist.subnet.job import Job, assignments
from ist.training.worker import WorkerHost
from ist.training.worker_state import CheckpointLocation
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.message import Message

Flat = NDArray[np.uint8]


class RayWorker:
    """The actor: one worker of the run.

    Args:
        job: The run, with the maximum number of workers.
        name: The actor's name.
        location: Where workers save their state; None: nowhere.
    """

    def __init__(self, job: Job, name: str, location: CheckpointLocation | None = None) -> None:
        torch.set_num_threads(job.config.pool.threads)
        self._threads = job.config.pool.threads
        # Ray does not hide the GPUs that this actor did not reserve.
        self._device = compute_device(job.config.pool) if ray.get_gpu_ids() else torch.device("cpu")
        check_autocast(job.config.train, self._device)
        self._host = WorkerHost(job, self._device, assignments(job), location)
        # The first optimizer imports much of torch: do that before the first round's time and memory are measured.
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 3))])
        self._buffers: MessageBuffers | None = None
        self._over = -1
        self.name = name

    @ray.method(concurrency_group="control", enable_task_events=False)
    def where(self) -> str:
        """Return the address of this worker's node; an answer also shows that the actor is alive."""
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    # With task events, Ray would record every call, and the cluster's memory would grow with the number of rounds.
    @ray.method(enable_task_events=False)
    def train(
        self, ticket: int, round_number: int, slot: WorkerSlot, received: Flat, beside: Flat | None = None
    ) -> Flat:
        """Train a subnet for a round.

        Args:
            ticket: The number of this attempt, for `abandon`; it grows with every attempt.
            round_number: The round, from 0.
            slot: The worker's number in the round, and its team.
            received: The message to the worker; a read-only view of the object store.
            beside: The message with frozen parameters that the worker does not have, also read-only.

        Returns:
            The trained message.

        Raises:
            PoolError: The message is not this worker's subnet of this round.
            AbandonedRoundError: The coordinator has continued the round without this worker.
        """
        torch.set_num_threads(self._threads)  # Ray calls actors on another thread than their constructor
        worker = self._host.worker(slot)
        split, neurons = worker.job.split, worker.neurons(round_number)
        layouts = message_layouts(split, worker.job.config.exchange, split.cut(neurons))
        buffers = self._buffers_for(layouts)
        expected = down_bytes(split, layouts, round_number)
        if received.shape != (expected,):
            raise PoolError(f"{self.name} expected a message of {expected} bytes, received {received.shape}")
        buffers.flat[:expected].copy_(as_tensor(received))
        header = buffers.down.read_header(round_number, slot.worker)
        layout = worker.frozen.layout(round_number, neurons, header.reuses_frozen)
        if (layout.nbytes if layout else 0) != (len(beside) if beside is not None else 0):
            raise PoolError(
                f"{self.name} expected {layout.nbytes if layout else 0} bytes of frozen parameters, received "
                f"{len(beside) if beside is not None else 0}"
            )
        frozen = Message(layout, flat=as_tensor(beside)) if layout is not None and beside is not None else None
        completed(worker.train(round_number, buffers, frozen, lambda: self._over >= ticket))
        trained: Flat = buffers.up.flat.cpu().numpy()
        return trained

    def _buffers_for(self, layouts: MessageLayouts) -> MessageBuffers:
        """Return the memory of the worker's messages, which is kept while the layouts stay the same."""
        if self._buffers is None or self._buffers.layouts != layouts:
            self._buffers = MessageBuffers(layouts, self._device)
        return self._buffers

    @ray.method(concurrency_group="control", enable_task_events=False)
    def abandon(self, ticket: int) -> None:
        """Stop training before the next local step, because the coordinator continues without this worker."""
        self._over = max(self._over, ticket)


def as_tensor(array: Flat) -> torch.Tensor:
    """View a read-only array of the object store as a tensor, which must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
