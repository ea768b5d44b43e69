"""The layout of a safetensors file: its header, and the bytes of each tensor.

A file of safetensors is the length of its header (8 bytes, little endian), the header (JSON: dtype, shape and range of
bytes of each tensor, and a mapping of strings), and the tensors' bytes. The shapes alone determine the header, so a
file can be written while its tensors arrive one at a time. The rows of a tensor (its first dim) are one range of bytes.

Where it sits: `ist/storage/shards/write.py` writes headers, and `ist/storage/shards/read.py` reads them.
Law: reading a header that was written gives the same specs, and safetensors reads the same file.
Not here: which tensors a file holds (`ist/storage/shards/plan.py`).
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors.torch import load, save

from ist.tensors import TensorSpec

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100 * 2**20
"""The most that safetensors accepts as the length of a header."""

_METADATA = "__metadata__"


@dataclass(frozen=True)
class Place:
    """Where the values of a tensor are.

    Attributes:
        file: The name of the file in the storage.
        spec: The tensor's shape and dtype.
        start: The position of the tensor's first byte in the file.
    """

    file: str
    spec: TensorSpec
    start: int


class _Entry(BaseModel):
    """The entry of a tensor in a header."""

    model_config = ConfigDict(extra="forbid")

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: tuple[Annotated[int, Field(ge=0)], int]


_ENTRIES = TypeAdapter(dict[str, _Entry])
_STRINGS = TypeAdapter(dict[str, str])


def in_file_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors in the order in which a file holds them: large dtypes first, so that values are aligned."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))


def header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a file, up to the values of its first tensor.

    Args:
        specs: The tensors, in the order of `in_file_order`.
        metadata: Strings to store with them.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    stop = 0
    for name, spec in specs.items():
        start, stop = stop, stop + spec.nbytes
        entries[name] = {"dtype": _dtype_name(spec.dtype), "shape": list(spec.shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # the values start at a multiple of 8
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def parse_header(text: bytes, file: str, file_bytes: int) -> tuple[dict[str, Place], dict[str, str]]:
    """Return where each tensor of a file is, and the file's metadata.

    Args:
        text: The header, without its length.
        file: The name of the file.
        file_bytes: The size of the file.

    Raises:
        ValueError: The header is not one of safetensors, or the file is not as long as it says.
    """
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError("its header is not a mapping")
    values, places = LENGTH_BYTES + len(text), {}
    try:
        metadata = _STRINGS.validate_python(tree.pop(_METADATA, {}))
        entries = _ENTRIES.validate_python(tree)
    except ValidationError as error:
        raise ValueError(f"its header: {error.errors()[0]['msg']}") from error
    end = values
    for name, entry in entries.items():
        spec = TensorSpec(tuple(entry.shape), _dtype(entry.dtype))
        start, stop = entry.data_offsets
        if stop - start != spec.nbytes:
            raise ValueError(f"its header: '{name}' has {stop - start} bytes instead of {spec.nbytes}")
        places[name] = Place(file, spec, values + start)
        end = max(end, values + stop)
    if end != file_bytes:
        raise ValueError(f"it has {file_bytes} bytes instead of {end}")
    return places, metadata


def row_bytes(spec: TensorSpec) -> int:
    """Return the bytes of a row: of one index of the first dim. A tensor without dims has one row."""
    return math.prod(spec.shape[1:]) * spec.dtype.itemsize


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    """Return the name that safetensors gives a dtype."""
    data = save({"": torch.empty(0, dtype=dtype)})
    name: str = json.loads(data[LENGTH_BYTES:])[""]["dtype"]
    return name


@functools.cache
def _dtype(name: str) -> torch.dtype:
    """Undo `_dtype_name`.

    Raises:
        ValueError: safetensors does not know the name.
    """
    text = json.dumps({"": {"dtype": name, "shape": [0], "data_offsets": [0, 0]}}).encode()
    try:
        return load(len(text).to_bytes(LENGTH_BYTES, "little") + text)[""].dtype
    except Exception as error:  # its error has no public name below all of its versions
        raise ValueError(f"its header has the unknown dtype '{name}'") from error
