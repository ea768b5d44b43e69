"""The interface of a worker pool: it sends subnets to workers and returns trained ones.

The algorithm of a round is in `ist/training/coordinator.py` only. `ist/pools/inline.py` runs all workers in this
process: it is the reference for the others, and serves for debugging and for a single device. `ist/pools/torchrun.py`
uses torch.distributed. The workers of `ist/pools/ray_pool.py` are Ray actors, which may join and leave.
Where it sits: between the coordinator and the pools, which implement `WorkerPool`.
Not here: loss, data, partition.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import torch

from ist.loops.part import Part
from ist.measurements import Fault
from ist.subnet.assignments import WorkerSlot
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.message import Message


@dataclass(frozen=True)
class Subnet:
    """A worker's subnet in a round.

    Attributes:
        slot: The worker.
        buffers: Its messages: the message down is written before it is sent, the message up when it is returned.
        sent_bytes: How many bytes of the message down are sent, from its start; the message up is returned completely.
        frozen: A second message to the worker with frozen parameters that it lacks; None: it lacks none.
        is_lasting: Whether a returned message stays as it is until the round ends; if not, the next one overwrites it.
    """

    slot: WorkerSlot
    buffers: MessageBuffers
    sent_bytes: int
    frozen: Message | None = None
    is_lasting: bool = True

    @property
    def down_bytes(self) -> int:
        """Bytes that are sent to the worker in total."""
        return self.sent_bytes + (self.frozen.nbytes if self.frozen else 0)

    @property
    def worker(self) -> int:
        """The number of the worker in this round."""
        return self.slot.worker


@dataclass(frozen=True)
class Lost:
    """A worker whose subnet is missing from this round: its neurons do not change.

    Attributes:
        worker: Which worker, from 0.
        reason: What happened, as text.
        kind: 'lost': the worker died, failed or cannot be reached; 'late': it missed the round's deadline; 'rejected':
            its result has another shape or round, or is not finite.
    """

    worker: int
    reason: str
    kind: Fault = "lost"


class WorkerPool(Protocol):
    """What the coordinator needs from a pool."""

    parallel: bool
    """Whether workers compute at the same time."""

    def gather(self, round_number: int) -> tuple[str, ...]:
        """Return the names of the workers that take part in a round; worker k of the round is the k-th name.

        Raises:
            WorkerLostError: There are fewer workers than the run needs.
        """
        ...

    def process(self, worker: int) -> str:
        """Return the name of the process that runs a worker of the round; a replacement process has another name."""
        ...

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        """Return memory for a worker's messages; it is valid at least until the next call.

        It may wait until messages to other workers are sent, whose memory it then returns.

        Raises:
            PoolError: A message to another worker cannot be sent; the pool can then only be closed.
        """
        ...

    def submit(self, round_number: int, subnet: Subnet) -> None:
        """Start to send a subnet to its worker, which trains it; its buffers stay in use until it is returned.

        Args:
            round_number: The round, from 0.
            subnet: The subnet of a worker that has no outstanding one.

        Raises:
            PoolError: The subnet cannot be sent; the pool can then only be closed.
        """
        ...

    def results(self) -> Generator[Subnet | Lost | Part]:
        """Yield each submitted subnet when it is returned, or `Lost`, until none is outstanding.

        If a worker of this process has to train, its part is yielded first: the caller makes its local steps before it
        asks for the next item.

        A subnet that is submitted while the results are iterated is one of them: the next round of a worker need not
        wait for the others. If the generator is closed early, the pool drops the outstanding subnets, and the round
        continues without them.
        """
        ...

    def close(self) -> None:
        """Release the workers."""
        ...


class BufferCache:
    """The buffers of each worker; a worker's buffers are replaced only when its layouts change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_worker: dict[int, MessageBuffers] = {}

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        """Return the worker's buffers."""
        found = self._by_worker.get(worker)
        if found is None or found.layouts != layouts:
            found = self._by_worker[worker] = MessageBuffers(layouts, self._device)
        return found
