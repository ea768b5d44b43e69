"""Pools: who carries a subnet to a worker and back.

The algorithm exists once, in `ist/coordinator.py`; a pool only sends subnets out and gets subnets
back. `inline.py` is the oracle, the debugger and the single-device mode; `torchrun.py` uses
torch.distributed.
Not here: loss, data, partition.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ist.pool.wire import Message


@dataclass(frozen=True)
class Subnet:
    """A worker's part of the network in a round.

    Attributes:
        worker: Which worker it is for, from 0.
        message: Its tensors. A pool trains them in place: the same message comes back.
        sent_bytes: How much of the message, from its beginning, goes to the worker; all of it comes back.
    """

    worker: int
    message: Message
    sent_bytes: int


@dataclass(frozen=True)
class Lost:
    """A worker that did not come back this round: its neurons keep their values."""

    worker: int
    reason: str


class WorkerPool(Protocol):
    """What the coordinator needs of a pool."""

    parallel: bool
    """Whether workers compute at the same time."""

    def train(self, round_number: int, subnets: Sequence[Subnet]) -> Iterator[Subnet | Lost]:
        """Have every subnet trained for a round; yield each as it comes back, or `Lost`."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...
