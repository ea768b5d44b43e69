"""Read the IDX format of MNIST and its relatives, plain or gzipped.

Format: two zero bytes, a type code, the number of dims, each dim as a big-endian uint32, then
the values. Reference: Y. LeCun, the MNIST database, "file formats for the MNIST database".
Where it sits: `fashion_mnist.py` reads its files with it.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ist.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> Tensor:
    """Return the uint8 tensor stored in an IDX file.

    Args:
        path: The file; gzipped if its name ends in `.gz`.

    Raises:
        DataError: The file cannot be read, is truncated, or has another format.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path}: not an IDX file of unsigned bytes (starts with {raw[:4].hex() or 'nothing'})")
    header_bytes = 4 + 4 * raw[3]
    if len(raw) < header_bytes:
        raise DataError(f"{path}: truncated in its header ({len(raw)} bytes)")
    shape = struct.unpack(f">{raw[3]}I", raw[4:header_bytes])
    expected = header_bytes + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise DataError(f"{path}: has {len(raw)} bytes, but its header {tuple(shape)} requires {expected}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header_bytes).reshape(shape).copy())
