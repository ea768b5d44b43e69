"""All workers in this process, one after the other: the reference for every other pool.

Bytes are counted as if workers were processes: of those whose messages would cross a link (`remote_workers`).
"""

from collections import deque
from collections.abc import Generator

import torch

from ist.monitoring.meter import Meter
from ist.subnet.job import Job, assignments, remote_workers
from ist.training.worker import Seat
from ist.training.worker_state import Site
from ist.transport.codec import Envelope, Route
from ist.transport.interfaces import Buffers, Lost, Subnet


class InlinePool:
    """Workers as plain objects."""

    parallel = False

    def __init__(self, job: Job, device: torch.device, meter: Meter, site: Site | None = None) -> None:
        self._names = tuple(f"worker {number}" for number in range(job.config.train.workers))
        held = assignments(job)
        self._seats = [Seat(job, device, held, site) for _ in self._names]
        self._buffers = Buffers(device)
        self._meter = meter
        self._submitted: deque[tuple[int, Subnet]] = deque()
        self._remote = remote_workers(job.config)

    def gather(self, round_number: int) -> tuple[str, ...]:  # noqa: ARG002
        """All workers are always there."""
        return self._names

    def process(self, worker: int) -> str:
        """Return the name of a worker."""
        return self._names[worker]

    def envelope(self, worker: int, route: Route) -> Envelope:
        """Return a worker's envelope."""
        return self._buffers.envelope(worker, route)

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
                self._seats[subnet.worker].worker(subnet.slot).train(round_number, subnet.envelope, subnet.frozen)
                if subnet.worker in self._remote:
                    self._meter.received[subnet.worker] += subnet.envelope.up.nbytes
                yield subnet
        finally:
            self._submitted.clear()

    def close(self) -> None:
        """Nothing to let go."""
