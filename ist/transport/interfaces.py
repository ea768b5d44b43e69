"""Pools: who carries a subnet to a worker and back.

The algorithm exists once, in `ist/training/coordinator.py`; a pool only sends subnets out and gets subnets
back. `ist/pools/inline.py` is the oracle, the debugger and the single-device mode; `ist/pools/torchrun.py` uses
torch.distributed; the workers of `ist/pools/ray_pool.py` are Ray actors, which may come and go.
Not here: loss, data, partition.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import torch

from ist.measurements import Fault
from ist.subnet.assignments import WorkerSlot
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.message import Message


@dataclass(frozen=True)
class Subnet:
    """A worker's part of the network in a round.

    Attributes:
        slot: Whose it is.
        buffers: Its messages: the one to the worker is written before it leaves, the other when it is back.
        sent_bytes: How much of the message down, from its beginning, goes to the worker; all of the other comes back.
        frozen: A message that goes to the worker beside it, with frozen parameters that it lacks; None: it has them.
    """

    slot: WorkerSlot
    buffers: MessageBuffers
    sent_bytes: int
    frozen: Message | None = None

    @property
    def down_bytes(self) -> int:
        """Bytes that go to the worker, in all."""
        return self.sent_bytes + (self.frozen.nbytes if self.frozen else 0)

    @property
    def worker(self) -> int:
        """The number of the worker in this round."""
        return self.slot.worker


@dataclass(frozen=True)
class Lost:
    """A worker whose subnet is left out of this round: its neurons keep their values.

    Attributes:
        worker: Which worker, from 0.
        reason: What happened, for people.
        kind: 'lost': it died, failed or cannot be reached; 'late': it missed the round's deadline; 'rejected': what it
            returned is of another shape or round, or not finite.
    """

    worker: int
    reason: str
    kind: Fault = "lost"


class WorkerPool(Protocol):
    """What the coordinator needs of a pool."""

    parallel: bool
    """Whether workers compute at the same time."""

    def gather(self, round_number: int) -> tuple[str, ...]:
        """Return the names of the workers that are there for a round; worker k of the round is the k-th of them.

        Raises:
            WorkerLostError: There are fewer than the run needs.
        """
        ...

    def process(self, worker: int) -> str:
        """Return a name of the process that is a worker of the round; who takes its place has another name."""
        ...

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        """Return memory for a worker's messages; in use until the next is asked for, or longer."""
        ...

    def submit(self, round_number: int, subnet: Subnet) -> None:
        """Have a subnet trained for a round: begin to send it, and return; its buffers stay in use until it is back.

        Args:
            round_number: The round, from 0.
            subnet: Of a worker that has none outstanding.

        Raises:
            PoolError: It cannot be sent.
        """
        ...

    def results(self) -> Generator[Subnet | Lost]:
        """Yield each submitted subnet as it comes back, or `Lost`, until none is outstanding.

        Closed early, it gives up the subnets that are outstanding: the round goes on without them.
        """
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class BufferCache:
    """The buffers of each worker; they are replaced only when its layouts change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_worker: dict[int, MessageBuffers] = {}

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        """Return the worker's buffers."""
        found = self._by_worker.get(worker)
        if found is None or found.layouts != layouts:
            found = self._by_worker[worker] = MessageBuffers(layouts, self._device)
        return found
