"""The mean of a vector over all ranks, sent in a few bits a number.

Every rank rounds its vector and sends each rank the part that it is to average; the means are rounded again and sent to
all: 2 (n - 1) / n times the rounded vector from each rank, as a ring all-reduce sends of the whole one.
Not here: rounding (`ist/transport/quantize.py`).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ist.config.methods import BLOCK
from ist.distributed.process_group import Membership
from ist.transport.quantize import dequantize, packed_columns, quantize


def quantized_mean(vector: Tensor, membership: Membership, bits: int) -> tuple[Tensor, float]:
    """Return the mean of `vector` over all ranks, the same bits on each, and the bytes that this rank has sent.

    Args:
        vector: Floating point, of the same length on all ranks.
        membership: This rank.
        bits: Of a number on the way, 2 to 8.

    Reference: the quantised outer gradients of Douillard et al., "Streaming DiLoCo", arXiv 2501.18512, with
    rounding to the nearest.
    """
    size = membership.world_size
    blocks = -(-len(vector) // (BLOCK * size)) * size
    padded = vector.new_zeros(blocks * BLOCK)
    padded[: len(vector)] = vector
    outgoing = _packed(padded.view(blocks, BLOCK), bits).view(size, -1)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing)
    mean = torch.stack([_unpacked(part, bits) for part in incoming]).mean(dim=0)
    own = _packed(mean, bits)
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own)
    whole = torch.cat([_unpacked(part, bits) for part in parts])
    return whole.flatten()[: len(vector)].to(vector.dtype), 2.0 * (size - 1) * len(own)


def _packed(blocks: Tensor, bits: int) -> Tensor:
    """Rounded blocks as bytes: each block's codes, and behind them its scale."""
    codes, scale = quantize(blocks, bits)
    return torch.cat([codes, scale.view(-1, 1).view(torch.uint8)], dim=1).flatten()


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Undo `_packed`, up to rounding: shape (blocks, BLOCK)."""
    width = packed_columns(BLOCK, bits)
    rows = packed.view(-1, width + 4)
    return dequantize(rows[:, :width], rows[:, width:].contiguous().view(torch.float32).flatten(), BLOCK, bits)
