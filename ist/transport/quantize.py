"""Quantize a matrix to a few bits for each number, and dequantize it.

Each number is rounded to the nearest of 2^bits - 1 evenly spaced levels. Levels are symmetric around 0, and each row
has its own scale: its largest magnitude is a level. So the error of a number is at most half of
(largest magnitude of its row) / (2^(bits-1) - 1).
Law: a dequantized matrix that is quantized again gives the same codes.
Where it sits: `ist/transport/codec.py` encodes IST's messages with it, `ist/baselines/quantized_mean.py` the outer
gradients of DiLoCo.
Not here: which tensors are quantized, and error feedback (`ist/transport/endpoints.py`).

Shape letters: R rows, C columns, P bytes of a packed row, ceil(C * bits / 8).
"""

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


def packed_columns(columns: int, bits: int) -> int:
    """Return the bytes of a packed row of `columns` numbers."""
    return -(-columns * bits // 8)


def quantize(matrix: Tensor, bits: int, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to `bits` bits for each number.

    Args:
        matrix: Floating point, shape (R, C). A row that contains a non-finite value is dequantized to NaN as a whole.
        bits: 2 to 8.
        scale_dtype: The dtype of the scales: float32, or bfloat16, with which the largest magnitude of a row is a level
            to within 0.4 %.

    Returns:
        Codes, uint8, shape (R, P), and scales of that dtype, shape (R,).

    Reference: Seide et al., Interspeech 2014, and Dettmers, arXiv 1511.04561 (exchange in few bits); Dun et al.,
    ResIST, arXiv 2107.00961 (how few bits IST tolerates).
    """
    assert MIN_BITS <= bits <= MAX_BITS
    levels = 2 ** (bits - 1) - 1
    matrix = matrix.float()
    scale = matrix.abs().amax(dim=1) / levels if matrix.shape[1] else matrix.new_zeros(len(matrix))
    scale = torch.where(torch.isfinite(scale), scale, torch.nan).to(scale_dtype).float()
    divisor = torch.where(scale > 0, scale, 1.0)  # for a row of zeros any divisor is right
    codes = (matrix / divisor[:, None]).round_().clamp_(-levels, levels).add_(levels)
    return _pack(codes.nan_to_num_(0.0).to(torch.uint8), bits), scale.to(scale_dtype)


def dequantize(codes: Tensor, scale: Tensor, columns: int, bits: int) -> Tensor:
    """Return the dequantized matrix, float32, shape (R, `columns`); see `quantize`."""
    levels = 2 ** (bits - 1) - 1
    numbers: Tensor = _unpack(codes, columns, bits).float()
    return numbers.sub_(levels).mul_(scale[:, None])


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Keep only the lower `bits` bits of every byte: (R, C) to (R, P)."""
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
    if bits == 4:  # the frozen rest of the network is decoded in every step: do it fast
        halves = torch.stack((packed >> 4, packed & 15), dim=2)
        return halves.view(rows, -1)[:, :columns]
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, :, None] >> places) & 1).view(rows, -1)
    each = stream[:, : columns * bits].view(rows, columns, bits)
    codes: Tensor = each[:, :, 0] << (bits - 1)
    for place in range(1, bits):
        codes |= each[:, :, place] << (bits - 1 - place)
    return codes
