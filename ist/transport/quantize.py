"""Write a matrix in a few bits a number, and read it again.

Symmetric rounding to the nearest of 2^bits - 1 evenly spaced levels, with one scale for each row: the row's largest
magnitude is a level, so a number is off by at most half of (largest magnitude) / (2^(bits-1) - 1).
Law: dequantize(*quantize(x)) is a fixed point: quantised again it gives the same codes.
Where it sits: `ist/transport/codec.py` writes IST's slices with it, `ist/baselines/quantized_mean.py` DiLoCo's outer
gradients.
Not here: which tensors, what becomes of the error.

Shape letters: R rows, C columns, P bytes of a packed row, ceil(C * bits / 8).
"""

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


def packed_columns(columns: int, bits: int) -> int:
    """Return the bytes of a packed row of so many numbers."""
    return -(-columns * bits // 8)


def quantize(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a matrix to `bits` bits a number.

    Args:
        matrix: Floating point, shape (R, C). Where a row holds something that is not finite, all of it comes back as
            NaN.
        bits: 2 to 8.

    Returns:
        Codes, uint8, shape (R, P), and scales, float32, shape (R,).

    Reference: Seide et al., Interspeech 2014, and Dettmers, arXiv 1511.04561 (few bits for exchange); Dun et al.,
    ResIST, arXiv 2107.00961 (how few IST bears).
    """
    assert MIN_BITS <= bits <= MAX_BITS
    levels = 2 ** (bits - 1) - 1
    matrix = matrix.float()
    scale = matrix.abs().amax(dim=1) / levels if matrix.shape[1] else matrix.new_zeros(len(matrix))
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    divisor = torch.where(scale > 0, scale, 1.0)  # a row of zeros: any divisor does
    codes = (matrix / divisor[:, None]).round_().clamp_(-levels, levels).add_(levels)
    return _pack(codes.nan_to_num_(0.0).to(torch.uint8), bits), scale


def dequantize(codes: Tensor, scale: Tensor, columns: int, bits: int) -> Tensor:
    """Return the rounded matrix, float32, shape (R, `columns`); see `quantize`."""
    levels = 2 ** (bits - 1) - 1
    numbers: Tensor = _unpack(codes, columns, bits).float()
    return numbers.sub_(levels).mul_(scale[:, None])


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Drop the upper bits of every byte: (R, C) to (R, P)."""
    if bits == 8:
        return codes
    rows, columns = codes.shape
    each = torch.arange(bits - 1, -1, -1, dtype=torch.uint8, device=codes.device)
    stream = codes.new_zeros(rows, packed_columns(columns, bits) * 8)
    stream[:, : columns * bits] = ((codes[:, :, None] >> each) & 1).view(rows, -1)
    octets = stream.view(rows, -1, 8)
    packed: Tensor = octets[:, :, 0] << 7
    for place in range(1, 8):
        packed |= octets[:, :, place] << (7 - place)
    return packed


def _unpack(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Undo `_pack`: (R, P) to (R, `columns`)."""
    if bits == 8:
        return packed
    rows = len(packed)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, :, None] >> places) & 1).view(rows, -1)
    each = stream[:, : columns * bits].view(rows, columns, bits)
    codes: Tensor = each[:, :, 0] << (bits - 1)
    for place in range(1, bits):
        codes |= each[:, :, place] << (bits - 1 - place)
    return codes
