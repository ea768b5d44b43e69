"""All workers in this process, one after the other: the reference for every other pool.

Bytes are counted as if workers were processes: of those whose messages would cross a link (`remote_workers`).
"""

from collections import deque
from collections.abc import Generator

import torch

from ist.monitoring.meter import Meter
from ist.subnet.job import Job, assignments, remote_workers
from ist.training.worker import WorkerHost
from ist.training.worker_state import CheckpointLocation
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.interfaces import BufferCache, Lost, Subnet


class InlinePool:
    """Workers as plain objects."""

    parallel = False

    def __init__(
        self, job: Job, device: torch.device, meter: Meter, location: CheckpointLocation | None = None
    ) -> None:
        self._names = tuple(f"worker {number}" for number in range(job.config.train.workers))
        held = assignments(job)
        self._hosts = [WorkerHost(job, device, held, location) for _ in self._names]
        self._cache = BufferCache(device)
        self._meter = meter
        self._submitted: deque[tuple[int, Subnet]] = deque()
        self._remote = remote_workers(job.config)

    def gather(self, round_number: int) -> tuple[str, ...]:  # noqa: ARG002
        """All workers are always there."""
        return self._names

    def process(self, worker: int) -> str:
        """Return the name of a worker."""
        return self._names[worker]

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        """Return a worker's buffers."""
        return self._cache.buffers(worker, layouts)

    def submit(self, round_number: int, subnet: Subnet) -> None:
        """Note a subnet; it is trained when its result is asked for."""
        if subnet.worker in self._remote:
            self._meter.sent[subnet.worker] += subnet.down_bytes
        self._submitted.append((round_number, subnet))

    def results(self) -> Generator[Subnet | Lost]:
        """Train the subnets, in the order in which they were submitted."""
        try:
            while self._submitted:
                round_number, subnet = self._submitted.popleft()
                self._hosts[subnet.worker].worker(subnet.slot).train(round_number, subnet.buffers, subnet.frozen)
                if subnet.worker in self._remote:
                    self._meter.received[subnet.worker] += subnet.buffers.up.nbytes
                yield subnet
        finally:
            self._submitted.clear()

    def close(self) -> None:
        """Nothing to let go."""
