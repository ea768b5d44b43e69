"""Blocks of memory that hold one message after the other, so that a coordinator holds few messages at a time.

Where it sits: `ist/pools/torchrun.py` sends subnets from these blocks, and receives results into them, if
`pool.message_buffers` is set.
Not here: memory that a worker's messages keep for the whole run (`BufferCache` in `ist/transport/interfaces.py`).
"""

from collections import deque
from collections.abc import Callable

import torch

from ist.transport.codec import MessageBuffers, MessageLayouts


class Block:
    """A block of memory, and what has to end before it can be overwritten.

    Attributes:
        flat: The memory, uint8.
        layouts: The layouts of the message that it held last; None: it is new.
        finish: Waits until the memory is not used any more.
    """

    def __init__(self) -> None:
        self.flat = torch.empty(0, dtype=torch.uint8)
        self.layouts: MessageLayouts | None = None
        self.finish: Callable[[], None] = _nothing


class ReusedMemory:
    """A fixed number of blocks.

    Args:
        count: The number of blocks.
        device: The device of the memory.

    Example:
        >>> memory = ReusedMemory(1, torch.device("cpu"))
        >>> block = memory.take()
        >>> memory.take() is None
        True
        >>> memory.sending(block, lambda: print("sent"))
        >>> memory.take() is block
        sent
        True
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = count
        self._device = device
        self._made = 0
        self._free: list[Block] = []
        self._sending: deque[Block] = deque()

    def take(self) -> Block | None:
        """Return a block that may be overwritten: a free one, or that of the oldest message, once it is sent.

        Returns:
            None if all blocks are in use, and no message is being sent.

        Raises:
            PoolError: The oldest message cannot be sent.
        """
        if self._free:
            return self._free.pop()
        if self._made < self._count:
            return self.another()
        if not self._sending:
            return None
        block = self._sending.popleft()
        block.finish()
        block.finish = _nothing  # it refers to what was sent
        return block

    def another(self) -> Block:
        """Return a new block, even if there are as many as there should be."""
        self._made += 1
        return Block()

    def buffers(self, block: Block, layouts: MessageLayouts) -> MessageBuffers:
        """Return the messages of some layouts in a block; the padding between their tensors holds zeros."""
        if block.flat.nbytes < layouts.nbytes:
            block.flat = torch.zeros(layouts.nbytes, dtype=torch.uint8, device=self._device)
        elif block.layouts != layouts or not layouts.is_plain:  # the padding must not send what was there before
            block.flat.zero_()
        block.layouts = layouts
        return MessageBuffers(layouts, flat=block.flat[: layouts.nbytes])

    def sending(self, block: Block, finish: Callable[[], None]) -> None:
        """Note that a block holds a message that is being sent.

        Args:
            block: The block.
            finish: Waits until the message is sent.
        """
        block.finish = finish
        self._sending.append(block)

    def give_back(self, block: Block) -> None:
        """Take back a block that may be overwritten; one that is too many is dropped."""
        if self._made > self._count:
            self.drop()
        else:
            self._free.append(block)

    def drop(self) -> None:
        """Forget a block that is lost, because something may still write to it."""
        self._made -= 1

    def wait(self) -> None:
        """Wait until all messages are sent.

        Raises:
            PoolError: One of them cannot be sent.
        """
        while self._sending:
            block = self._sending.popleft()
            block.finish()
            block.finish = _nothing
            self.give_back(block)


def _nothing() -> None:
    pass
