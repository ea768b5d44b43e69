"""The mean of a vector over all ranks, sent in eight bits a number.

Every rank rounds its vector and sends each rank the part that it is to average; the means are rounded again and sent to
all: 2 (n - 1) / n bytes a number from each rank, as a ring all-reduce does with four or eight times as many.
Not here: rounding (`ist/transport/quantize.py`).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ist.distributed.process_group import Membership
from ist.transport.quantize import BLOCK, dequantize, quantize


def mean_in_int8(vector: Tensor, membership: Membership) -> tuple[Tensor, float]:
    """Return the mean of `vector` over all ranks, the same bits on each, and the bytes that this rank has sent.

    Args:
        vector: Floating point, of the same length on all ranks.
        membership: This rank.

    Reference: the quantised outer gradients of Douillard et al., "Streaming DiLoCo", arXiv 2501.18512, with eight bits
    and rounding to the nearest.
    """
    size = membership.world_size
    blocks = -(-len(vector) // (BLOCK * size)) * size
    padded = vector.new_zeros(blocks * BLOCK)
    padded[: len(vector)] = vector
    outgoing = _packed(padded.view(blocks, BLOCK)).view(size, -1)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing)
    mean = torch.stack([_unpacked(part) for part in incoming]).mean(dim=0)
    own = _packed(mean)
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own)
    whole = torch.cat([_unpacked(part) for part in parts])
    return whole.flatten()[: len(vector)].to(vector.dtype), 2.0 * (size - 1) * len(own)


def _packed(blocks: Tensor) -> Tensor:
    """Rounded blocks as bytes: each block's codes, and behind them its scale."""
    codes, scale = quantize(blocks, 8)
    return torch.cat([codes, scale.view(-1, 1).view(torch.uint8)], dim=1).flatten()


def _unpacked(packed: Tensor) -> Tensor:
    """Undo `_packed`, up to rounding: shape (blocks, BLOCK)."""
    rows = packed.view(-1, BLOCK + 4)
    return dequantize(rows[:, :BLOCK], rows[:, BLOCK:].contiguous().view(torch.float32).flatten(), BLOCK, 8)
