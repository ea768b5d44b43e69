"""The inline pool: all workers in this process, one after the other; the reference for every other pool.

Where it sits: `ist/runs/opening/methods.py` creates it for `pool.kind: inline`.
It counts the bytes that the same run would send with a process for each worker (`remote_workers`).
Not here: the workers' training (`ist/training/worker.py`).
"""

from collections import deque
from collections.abc import Generator

import torch

from ist.loops.batch_source import BatchSources
from ist.loops.part import LoopMemory, Part
from ist.monitoring.meter import Meter
from ist.subnet.job import Job, assignments, remote_workers
from ist.training.worker import WorkerHost
from ist.training.worker_state import CheckpointLocation
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.interfaces import BufferCache, Lost, Subnet


class InlinePool:
    """A `WorkerPool` whose workers are objects in this process."""

    parallel = False

    def __init__(
        self, job: Job, device: torch.device, meter: Meter, location: CheckpointLocation | None = None
    ) -> None:
        self._names = tuple(f"worker {number}" for number in range(job.config.train.workers))
        held = assignments(job)
        owners: dict[int, BatchSources] = {}
        self._hosts = [WorkerHost(job, device, held, location, LoopMemory(BatchSources(owners))) for _ in self._names]
        self._cache = BufferCache(device)
        self._meter = meter
        self._submitted: deque[tuple[int, Subnet]] = deque()
        self._remote = remote_workers(job.config)

    def gather(self, round_number: int) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of all workers, which are always available."""
        return self._names

    def process(self, worker: int) -> str:
        """Return the name of a worker."""
        return self._names[worker]

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        """Return a worker's buffers."""
        return self._cache.buffers(worker, layouts)

    def submit(self, round_number: int, subnet: Subnet) -> None:
        """Queue a subnet; `results` trains it."""
        if subnet.worker in self._remote:
            self._meter.sent[subnet.worker] += subnet.down_bytes
        self._submitted.append((round_number, subnet))

    def results(self) -> Generator[Subnet | Lost | Part]:
        """Yield the parts and the subnets, in the order in which they were submitted."""
        try:
            while self._submitted:
                round_number, subnet = self._submitted.popleft()
                worker = self._hosts[subnet.worker].worker(subnet.slot)
                yield from worker.train(round_number, subnet.buffers, subnet.frozen)
                if subnet.worker in self._remote:
                    self._meter.received[subnet.worker] += subnet.buffers.up.nbytes
                yield subnet
        finally:
            self._submitted.clear()

    def close(self) -> None:
        """Release what the workers hold."""
        for host in self._hosts:
            host.close()
