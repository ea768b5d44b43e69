"""The torchrun pool: workers are the ranks of a torch.distributed process group.

Rank 0 coordinates. It is also worker 0, unless the coordinator is dedicated: then rank r is worker r - 1. In a round
every worker receives one message (and, if it lacks frozen parameters, a second one) and returns one. If a worker is
several ranks (`pool.ranks_per_worker`), the first of them receives, passes the message on to the others, and returns
the result.
Where it sits: `ist/runs/open.py` creates `TorchrunPool` on rank 0, and `RankWorker` on every other rank.
Not here: starting processes (`ist/launch/start.py`, or torchrun itself), forming the process group
(`ist/distributed/process_group.py`).
"""

from collections import deque
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ist.config.schema import first_worker_rank, num_processes, ranks_per_worker
from ist.distributed.environment import world_size
from ist.distributed.process_group import Membership, PeerWatch, peer_errors
from ist.distributed.worker_group import WorkerGroup
from ist.errors import ConfigError, PoolError
from ist.loops.part import Part
from ist.monitoring.meter import Meter
from ist.rng import Indices
from ist.subnet.job import Job, assignments, slot_of, with_workers
from ist.subnet.split_model import ShapeKeys
from ist.training.worker import Worker
from ist.training.worker_state import CheckpointLocation
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.interfaces import BufferCache, Lost, Subnet
from ist.transport.message import Message
from ist.transport.reused_memory import Block, ReusedMemory


def for_world_size(job: Job) -> Job:
    """Return the job with the number of workers that the number of started processes gives.

    Raises:
        ConfigError: The configuration needs another number of processes; the message names both numbers.
    """
    started, needed = world_size(), num_processes(job.config)
    spare, ranks = first_worker_rank(job.config), ranks_per_worker(job.config)
    least = job.config.train.min_workers or job.config.train.workers
    possible, rest = divmod(started - spare, ranks)
    if not rest and least <= possible < job.config.train.workers:
        return with_workers(job, possible)
    if started != needed:
        of_several = f", pool.ranks_per_worker is {ranks}" if ranks > 1 else ""
        raise ConfigError(
            f"{started} processes were started (WORLD_SIZE), but train.workers is {job.config.train.workers}"
            f"{of_several} and pool.coordinator is '{job.config.pool.coordinator}', which makes {needed}: start "
            f"{needed} processes"
            + ("" if rest or possible < 1 else f", or give --workers {possible} (workers={possible} in Python)")
            + (", or --set pool.coordinator=trains" if spare else "")
        )
    return job


class Channel:
    """Sends and receives flat buffers, and counts their bytes.

    Gloo can send only CPU memory, so CUDA buffers are staged through pinned memory.
    """

    def __init__(self, membership: Membership, meter: Meter) -> None:
        self._membership = membership
        self._meter = meter
        self._stages: dict[int, Tensor] = {}

    def send(self, flats: Sequence[tuple[int, int, Tensor]]) -> list[dist.Work]:
        """Start sending (rank, worker, flat) buffers; they must not change before the returned works are done."""
        return _begin(self._sending(flats))

    def receive(self, flats: Sequence[tuple[int, int, Tensor]]) -> list[dist.Work]:
        """Start receiving (rank, worker, flat) buffers; call `finish` for each when its work is done."""
        return _begin(self._receiving(flats))

    def swap(
        self, sends: Sequence[tuple[int, int, Tensor]], receives: Sequence[tuple[int, int, Tensor]]
    ) -> tuple[list[dist.Work], list[dist.Work]]:
        """Start to send and to receive buffers in one batch, which NCCL needs if both sides do both.

        Returns:
            The works of the sends, and one for each receive; see `send` and `receive`.
        """
        operations = [*self._sending(sends), *self._receiving(receives)]
        works = _begin(operations)
        if len(works) == len(operations):
            return works[: len(sends)], works[len(sends) :]
        return works, works * len(receives)  # NCCL makes one work of a batch

    def finish(self, worker: int, flat: Tensor) -> None:
        """Count a received buffer, and copy it to the GPU if it was staged."""
        staged = self._staged(flat)
        if staged is not flat:
            flat.copy_(staged)
        self._meter.received[worker] += flat.nbytes

    def _sending(self, flats: Sequence[tuple[int, int, Tensor]]) -> list[dist.P2POp]:
        operations = []
        for rank, worker, flat in flats:
            staged = self._staged(flat)
            if staged is not flat:
                staged.copy_(flat)
            operations.append(dist.P2POp(dist.isend, staged, rank))
            self._meter.sent[worker] += flat.nbytes
        return operations

    def _receiving(self, flats: Sequence[tuple[int, int, Tensor]]) -> list[dist.P2POp]:
        return [dist.P2POp(dist.irecv, self._staged(flat), rank) for rank, _, flat in flats]

    def _staged(self, flat: Tensor) -> Tensor:
        if flat.device.type == "cpu" or self._membership.backend == "nccl":
            return flat
        stage = self._stages.get(flat.data_ptr())
        if stage is None or stage.nbytes < flat.nbytes:
            stage = torch.empty(flat.nbytes, dtype=torch.uint8, pin_memory=True)
            self._stages[flat.data_ptr()] = stage
        return stage[: flat.nbytes]


class TorchrunPool:
    """The coordinator's side of the pool, on rank 0; a `WorkerPool`.

    Args:
        job: The run.
        membership: This rank.
        meter: Counts payload bytes.
        location: Where workers save their state; None: nowhere.
        group: The ranks of rank 0's worker; None: it is one rank, or none.
    """

    parallel = True

    def __init__(
        self,
        job: Job,
        membership: Membership,
        meter: Meter,
        location: CheckpointLocation | None = None,
        group: WorkerGroup | None = None,
    ) -> None:
        self._channel = Channel(membership, meter)
        self._early = membership.backend == "gloo"
        self._carrier = membership.carrier
        self._ranks = ranks_per_worker(job.config)
        self._first_rank = _first_rank(job, membership)
        self._group = group
        self._local = _worker(job, 0, membership, location, group) if self._rank(0) == 0 else None
        self._names = tuple(f"rank {self._rank(worker)}" for worker in range(job.config.train.workers))
        self._cache = BufferCache(membership.device)
        most, num_remote = job.config.pool.message_buffers, sum(map(self._is_remote, range(job.config.train.workers)))
        self._memory = ReusedMemory(most, membership.device) if most is not None and most < num_remote else None
        self._taken: dict[int, Block] = {}  # by worker, until its subnet is submitted
        self._peers = PeerWatch(membership)
        self._own: tuple[int, Subnet] | None = None  # worker 0's subnet, if rank 0 is a worker
        self._outstanding: list[Subnet] = []
        self._sends: list[dist.Work] = []
        self._receives: list[dist.Work] = []

    def gather(self, round_number: int) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of all ranks, which are always available: torch.distributed ends the run if one is lost."""
        return self._names

    def process(self, worker: int) -> str:
        """Return the name of a worker's rank, which is the same process during the whole run."""
        return self._names[worker]

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        """Return a worker's buffers; with `pool.message_buffers`, memory that the message of another worker had."""
        if self._memory is None or not self._is_remote(worker):
            return self._cache.buffers(worker, layouts)
        block = self._taken[worker] = self._memory.take() or self._memory.another()
        return self._memory.buffers(block, layouts)

    def submit(self, round_number: int, subnet: Subnet) -> None:
        """Start sending a subnet with gloo; with NCCL, `results` sends all subnets together.

        With `pool.message_buffers`, the result is received only when there is memory for it.
        """
        if not self._is_remote(subnet.worker):
            self._own = round_number, subnet
            return
        if self._memory is not None:
            unused = MessageBuffers(subnet.buffers.layouts, flat=torch.empty(0, dtype=torch.uint8))
            self._outstanding.append(replace(subnet, buffers=unused, frozen=None))  # both are held until they are sent
            works, rank = self._send([subnet]), self._rank(subnet.worker)
            self._memory.sending(self._taken.pop(subnet.worker), lambda: wait_for_all(works, f"rank {rank}"))
            return
        self._outstanding.append(subnet)
        if self._early:
            self._sends += self._send([subnet])
            # With gloo, post the receives now, so that results arrive while this rank trains. A result overwrites the
            # memory of the subnet that was sent, which is safe: it cannot arrive before the worker has the subnet.
            self._receives += self._channel.receive([self._back(subnet)])

    def results(self) -> Generator[Subnet | Lost | Part]:
        """Yield worker 0's part if rank 0 is a worker, and then the results of all workers."""
        while self._own is not None or self._outstanding:
            yield from self._batch() if self._memory is None else self._batch_in_turn(self._memory)

    def _batch(self) -> Iterator[Subnet | Lost | Part]:
        """Yield the results of the subnets that are submitted by now."""
        remote, receives = self._outstanding, self._receives
        if not self._early:
            self._sends += self._send(remote)
        sends, self._sends = self._sends, []
        self._outstanding, self._receives = [], []
        yield from self._train_own()
        if not self._early:  # a pending NCCL receive would use the GPU while this rank trains
            receives = self._channel.receive([self._back(subnet) for subnet in remote])
        # NCCL coalesces a batch into one work.
        works = [[work] for work in receives]
        waits = works if len(receives) == len(remote) else [receives] + [[]] * (len(remote) - 1)
        for subnet, waited in zip(remote, waits, strict=True):
            try:
                wait_for_all(waited, f"rank {self._rank(subnet.worker)}")
            except PoolError as error:
                yield Lost(subnet.worker, str(error))
                continue
            self._channel.finish(subnet.worker, subnet.buffers.up.flat)
            yield subnet
        wait_for_all(sends, "sending subnets")

    def _batch_in_turn(self, memory: ReusedMemory) -> Iterator[Subnet | Lost | Part]:
        """Yield the results of the subnets that are submitted by now; as many arrive at once as there are blocks.

        They are received in the order in which their workers have received subnets. All other results wait.
        """
        waiting, self._outstanding = deque(self._outstanding), []
        arriving: deque[tuple[Subnet, Block, list[dist.Work]]] = deque()

        def receive() -> None:
            while waiting and (block := memory.take()) is not None:
                sent = waiting.popleft()
                subnet = replace(sent, buffers=memory.buffers(block, sent.buffers.layouts), is_lasting=False)
                arriving.append((subnet, block, self._channel.receive([self._back(subnet)])))

        receive()
        yield from self._train_own()
        while arriving:
            subnet, block, works = arriving.popleft()
            try:
                wait_for_all(works, f"rank {self._rank(subnet.worker)}")
            except PoolError as error:
                memory.drop()
                yield Lost(subnet.worker, str(error))
            else:
                self._channel.finish(subnet.worker, subnet.buffers.up.flat)
                yield subnet
                memory.give_back(block)
            receive()
        memory.wait()

    def _train_own(self) -> Iterator[Subnet | Part]:
        """Train the subnet of rank 0's worker, if it has one that is submitted."""
        own, self._own = self._own, None
        if own is None:
            return
        assert self._local is not None
        round_number, subnet = own
        if self._group is not None:
            self._group.broadcast(subnet.buffers.flat[: subnet.sent_bytes])
            if subnet.frozen is not None:
                self._group.broadcast(subnet.frozen.flat)
        yield from self._local.train(round_number, subnet.buffers, subnet.frozen, self._peers.is_over)
        yield subnet

    def _send(self, subnets: Sequence[Subnet]) -> list[dist.Work]:
        """Start sending subnets, and in a second batch the messages with frozen parameters.

        The header of the first message gives the size of the second.
        """
        first = [(self._rank(s.worker), s.worker, s.buffers.flat[: s.sent_bytes]) for s in subnets]
        beside = [(self._rank(s.worker), s.worker, s.frozen.flat.to(self._carrier)) for s in subnets if s.frozen]
        return self._channel.send(first) + self._channel.send(beside)

    def _back(self, subnet: Subnet) -> tuple[int, int, Tensor]:
        """Return the rank, the worker and the buffer of a result."""
        return self._rank(subnet.worker), subnet.worker, subnet.buffers.up.flat

    def close(self) -> None:
        """Release what rank 0's worker holds; the process group outlives the run."""
        if self._local is not None:
            self._local.close()

    def _is_remote(self, worker: int) -> bool:
        return self._rank(worker) != 0

    def _rank(self, worker: int) -> int:
        return self._first_rank + worker * self._ranks


class RankWorker:
    """The worker's side of the pool, on every rank that does not coordinate; a `Follower`.

    Args:
        job: The run.
        membership: This rank.
        location: Where workers save their state; None: nowhere.
        group: The ranks of its worker; None: this rank alone.
    """

    def __init__(
        self,
        job: Job,
        membership: Membership,
        location: CheckpointLocation | None = None,
        group: WorkerGroup | None = None,
    ) -> None:
        self._job = job
        self._number = (membership.rank - _first_rank(job, membership)) // ranks_per_worker(job.config)
        self._worker = _worker(job, self._number, membership, location, group)
        self._group = group
        self._channel = Channel(membership, Meter())
        self._peers = PeerWatch(membership)
        self._carrier = membership.carrier
        self._buffers = WorkerBuffers(job, membership.device)

    def train_round(self, round_number: int) -> Generator[Part]:
        """Receive a subnet, yield its part, and send the result.

        Raises:
            PoolError: The coordinator is lost, or its message is not this round's subnet.
        """
        neurons = self._worker.neurons(round_number)
        buffers = self._buffers.of(neurons)
        incoming = buffers.flat[: down_bytes(self._job.split, buffers.layouts, round_number)]
        gone = f"worker {self._number} lost the coordinator (rank 0) in round {round_number}"
        self._receive(incoming, gone)
        header = buffers.down.read_header(round_number, self._number)
        layout = self._worker.frozen.layout(round_number, neurons, header.reuses_frozen)
        frozen = Message(layout, self._carrier) if layout is not None else None
        if frozen is not None:
            self._receive(frozen.flat, gone)
        with peer_errors(f"worker {self._number} lost a rank of its own in round {round_number}"):
            yield from self._worker.train(round_number, buffers, frozen, self._peers.is_over)
        if self._group is None or self._group.is_lead:
            wait_for_all(self._channel.send([(0, self._number, buffers.up.flat)]), gone)

    def _receive(self, flat: Tensor, gone: str) -> None:
        """Receive a message: the worker's first rank from the coordinator, the others from the first one."""
        if self._group is None or self._group.is_lead:
            wait_for_all(self._channel.receive([(0, self._number, flat)]), gone)
            self._channel.finish(self._number, flat)
        if self._group is not None:
            self._group.broadcast(flat)

    def close(self) -> None:
        """Release what the worker holds; the process group outlives the run."""
        self._worker.close()


class WorkerBuffers:
    """The memory of the messages of one worker, kept while the layouts stay the same.

    Args:
        job: The run.
        device: The device of the memory.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self._job = job
        self._device = device
        self._keys = ShapeKeys(job.split)
        self._key: Hashable = None
        self._buffers: MessageBuffers | None = None

    def of(self, neurons: Sequence[Indices]) -> MessageBuffers:
        """Return the buffers for the messages of a round; the previous ones if the layouts are the same."""
        key = self._keys.of(neurons)
        if self._buffers is None or self._key != key:
            self._key = key
            split = self._job.split
            layouts = message_layouts(split, self._job.config.exchange, split.cut(neurons))
            if self._buffers is None or layouts != self._buffers.layouts:
                self._buffers = MessageBuffers(layouts, self._device)
        return self._buffers


def _first_rank(job: Job, membership: Membership) -> int:
    """Return the first rank of worker 0."""
    return membership.world_size - job.config.train.workers * ranks_per_worker(job.config)


def _worker(
    job: Job, number: int, membership: Membership, location: CheckpointLocation | None, group: WorkerGroup | None
) -> Worker:
    """Create the worker of a rank for the whole run."""
    return Worker(job, slot_of(job, number), membership.device, assignments(job), location, group=group)


def _begin(operations: list[dist.P2POp]) -> list[dist.Work]:
    with peer_errors("a peer is gone"):
        return dist.batch_isend_irecv(operations) if operations else []


def wait_for_all(works: Sequence[dist.Work], what: str) -> None:
    """Wait for transfers; the error of a lost peer starts with `what`."""
    with peer_errors(what):
        for work in works:
            work.wait()
