"""The mean of a vector over all ranks, sent with a few bits for each number.

Every rank quantizes its vector and sends one part to each rank, which averages it. The means are quantized again and
sent to all ranks. Each rank sends 2 (n - 1) / n times the quantized vector, the same factor as in a ring all-reduce.
Where it sits: `ist/baselines/local_sgd.py` uses it for DiLoCo in int8.
Not here: quantization (`ist/transport/quantize.py`).
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
        vector: A floating-point vector, with the same length on all ranks.
        membership: This rank.
        bits: Bits in which a number is sent, 2 to 8.

    Reference: the quantized outer gradients of Douillard et al., "Streaming DiLoCo", arXiv 2501.18512, with rounding
    to the nearest value.
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
    """Return quantized blocks as bytes: the codes of each block, followed by its scale."""
    codes, scale = quantize(blocks, bits)
    return torch.cat([codes, scale.view(-1, 1).view(torch.uint8)], dim=1).flatten()


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Undo `_packed`, up to quantization; the result has shape (blocks, BLOCK)."""
    width = packed_columns(BLOCK, bits)
    rows = packed.view(-1, width + 4)
    return dequantize(rows[:, :width], rows[:, width:].contiguous().view(torch.float32).flatten(), BLOCK, bits)
