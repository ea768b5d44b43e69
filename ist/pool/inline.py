"""All workers in this process, one after the other: the reference for every other pool.

Bytes are counted as if every worker sat behind a link, so that they can be compared with a pool whose
coordinator is dedicated.
"""

from collections.abc import Iterator, Sequence

import torch

from ist.job import Job
from ist.meter import Meter
from ist.pool import Lost, Subnet
from ist.worker import Worker


class InlinePool:
    """Workers as plain objects."""

    parallel = False

    def __init__(self, job: Job, device: torch.device, meter: Meter) -> None:
        self._workers = [Worker(job, number, device) for number in range(job.config.train.workers)]
        self._meter = meter

    def train(self, round_number: int, subnets: Sequence[Subnet]) -> Iterator[Subnet | Lost]:
        """Train the subnets in order."""
        for subnet in subnets:
            self._meter.sent[subnet.worker] += subnet.sent_bytes
            self._workers[subnet.worker].train(round_number, subnet.message)
            self._meter.received[subnet.worker] += subnet.message.nbytes
            yield subnet

    def close(self) -> None:
        """Nothing to let go."""
