"""The Ray actor that runs a worker, or one of several actors that are a worker together (`pool.ranks_per_worker`).

Where it sits: `ist/pools/ray_workers/bundle.py` starts the actors, and `ist/pools/ray_pool.py` calls `train`.
Not here: the local steps (`ist/loops/local_loop.py`), the steps of several actors (`ist/loops/inside.py`).
"""

import warnings

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from ist.config.schema import ranks_per_worker
from ist.data.fingerprint import data_fingerprint
from ist.distributed.device import check_autocast, compute_device
from ist.distributed.process_group import peer_errors
from ist.distributed.worker_group import Meeting, WorkerGroup, host_meeting, meet
from ist.errors import PoolError
from ist.loops.part import completed
from ist.subnet.assignments import WorkerSlot
from ist.subnet.job import Job, assignments
from ist.training.worker import WorkerHost
from ist.training.worker_state import CheckpointLocation
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.message import Layout, Message

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
        self._job, self._location = job, location
        self._group: WorkerGroup | None = None
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

    @ray.method(enable_task_events=False)
    def host_meeting(self) -> Meeting:
        """Let the actors of this worker meet at this one."""
        return host_meeting(ranks_per_worker(self._job.config), self._job.config.pool.timeout_s)

    @ray.method(enable_task_events=False)
    def meet(self, meeting: Meeting, rank: int, slot: int) -> str:
        """Form the process group of this worker's actors, which all call it; return the address of their node.

        Args:
            meeting: What `host_meeting` of the lead has returned.
            rank: The number of this actor among them.
            slot: The worker slot of the run, which is the number of the worker if workers have data of their own.

        Raises:
            DataError: The actors have loaded different data of their worker.
            PoolError: The group cannot be formed.
        """
        torch.set_num_threads(self._threads)
        job = self._job
        self._group = meet(meeting, rank, ranks_per_worker(job.config), self._device, job.config.pool)
        if job.task.own_data is not None and job.task.loop is None:
            self._group.check_data(slot, data_fingerprint(job.task.own_data(slot), job.config.seed))
        self._host = WorkerHost(job, self._device, assignments(job), self._location, group=self._group)
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    # With task events, Ray would record every call, and the cluster's memory would grow with the number of rounds.
    @ray.method(enable_task_events=False)
    def train(
        self,
        ticket: int,
        round_number: int,
        slot: WorkerSlot,
        received: Flat | None = None,
        beside: Flat | None = None,
    ) -> Flat | None:
        """Train a subnet for a round.

        Args:
            ticket: The number of this attempt, for `abandon`; it grows with every attempt.
            round_number: The round, from 0.
            slot: The worker's number in the round, and its team.
            received: The message to the worker; a read-only view of the object store. None: the lead passes it on.
            beside: The message with frozen parameters that the worker does not have, also read-only.

        Returns:
            The trained message; None if another actor is the lead.

        Raises:
            PoolError: The message is not this worker's subnet of this round, or a peer is lost.
            AbandonedRoundError: The coordinator has continued the round without this worker.
        """
        torch.set_num_threads(self._threads)  # Ray calls actors on another thread than their constructor
        worker = self._host.worker(slot)
        split, neurons = worker.job.split, worker.neurons(round_number)
        layouts = message_layouts(split, worker.job.config.exchange, split.cut(neurons))
        buffers = self._buffers_for(layouts)
        expected = down_bytes(split, layouts, round_number)
        if self._leads:
            if received is None or received.shape != (expected,):
                found = None if received is None else received.shape
                raise PoolError(f"{self.name} expected a message of {expected} bytes, received {found}")
            buffers.flat[:expected].copy_(as_tensor(received))
        if self._group is not None:
            self._group.broadcast(buffers.flat[:expected])
        header = buffers.down.read_header(round_number, slot.worker)
        frozen = self._frozen(worker.frozen.layout(round_number, neurons, header.reuses_frozen), beside)
        with peer_errors(f"{self.name} lost another actor of its worker in round {round_number}"):
            completed(worker.train(round_number, buffers, frozen, lambda: self._is_over(ticket)))
        if not self._leads:
            return None
        trained: Flat = buffers.up.flat.cpu().numpy()
        return trained

    @property
    def _leads(self) -> bool:
        """Whether this actor exchanges the worker's messages with the driver."""
        return self._group is None or self._group.is_lead

    def _frozen(self, layout: Layout | None, beside: Flat | None) -> Message | None:
        """Return the message with the frozen parameters that the worker does not have; None if it has all."""
        expected, received = layout.nbytes if layout else 0, len(beside) if beside is not None else 0
        if self._leads and received != expected:
            raise PoolError(f"{self.name} expected {expected} bytes of frozen parameters, received {received}")
        if layout is None:
            return None
        if self._group is None:
            assert beside is not None
            return Message(layout, flat=as_tensor(beside))
        message = Message(layout, self._group.carrier)
        if beside is not None:
            message.flat.copy_(as_tensor(beside))
        self._group.broadcast(message.flat)
        return message

    def _is_over(self, ticket: int) -> bool:
        """Return whether the coordinator has continued without this worker; all actors of a worker stop together.

        Without a deadline, a worker of several actors is never abandoned: the driver replaces it.
        """
        is_over = self._over >= ticket
        if self._group is None or self._job.config.pool.round_deadline_s is None:
            return is_over
        return self._group.agreed(is_over)

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
