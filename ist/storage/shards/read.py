"""Read the tensors of a checkpoint without holding them all: whole, one at a time, or only some rows of each.

A checkpoint of one file (`ist/storage/checkpoint.py`) and one in shards are read alike, by any number of ranks.

Where it sits: `ist/storage/checkpoint.py` opens the newest checkpoint here; a sharded store reads its rows.
Law: the rows of all ranks, one after the other, are the tensor that was written, bit for bit.
Not here: writing (`ist/storage/shards/write.py`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ist.errors import CheckpointError
from ist.storage.backend import Storage
from ist.storage.shards.layout import LENGTH_BYTES, MOST_HEADER_BYTES, Place, parse_header, row_bytes
from ist.storage.shards.write import COMMIT, FORMAT, INDEX, content_sum
from ist.tensors import TensorSpec

_CHUNK_BYTES = 2**24
_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$"  # a file of the folder, and of no other


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class _Commit(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    progress: str
    files: dict[Annotated[str, Field(pattern=_NAME)], _File]
    sha256: str


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint, each read when it is asked for.

    Args:
        storage: The storage of the run's checkpoints.
        places: Where each tensor is, by name.
    """

    def __init__(self, storage: Storage, places: Mapping[str, Place]) -> None:
        self._storage = storage
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        """Read a whole tensor.

        Raises:
            CheckpointError: The file is truncated.
            RunFolderError: The storage cannot be read.
        """
        place = self._places[name]
        return self._read(place, place.start, place.spec.nbytes).reshape(place.spec.shape)

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor of that name, without reading it, as `Mapping` would."""
        return name in self._places

    def spec(self, name: str) -> TensorSpec:
        """Return the shape and dtype of a tensor, which is not read."""
        return self._places[name].spec

    def specs(self) -> dict[str, TensorSpec]:
        """Return the shape and dtype of every tensor, by name."""
        return {name: place.spec for name, place in self._places.items()}

    def named(self, names: Mapping[str, str]) -> "SavedTensors":
        """Return some of the tensors under other names.

        Args:
            names: The name of each tensor here, by its new name.
        """
        return SavedTensors(self._storage, {new: self._places[old] for new, old in names.items()})

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows `start` to `stop` (exclusive) of a tensor, along its first dim.

        A tensor without dims has one row, which is returned without dims. Rows beyond the last one are left out.

        Raises:
            CheckpointError: The file is truncated.
            RunFolderError: The storage cannot be read.
        """
        place = self._places[name]
        spec, each = place.spec, row_bytes(place.spec)
        num_rows = spec.shape[0] if spec.shape else 1
        start, stop = min(start, num_rows), min(max(start, stop), num_rows)
        found = self._read(place, place.start + start * each, (stop - start) * each)
        return found.reshape((stop - start, *spec.shape[1:]) if spec.shape or stop == start else ())

    def _read(self, place: Place, start: int, size: int) -> Tensor:
        data = self._storage.read(place.file, start, start + size)
        if len(data) != size:
            raise CheckpointError(f"{self._storage.where(place.file)}: truncated: it ends before byte {start + size}")
        if not size:
            return torch.empty(0, dtype=place.spec.dtype)
        return torch.frombuffer(data, dtype=place.spec.dtype)


def is_complete(storage: Storage, folder: str) -> bool:
    """Return whether a folder is a checkpoint, and not the rest of an interrupted save.

    Raises:
        RunFolderError: The storage cannot be read.
    """
    return COMMIT in storage.names(folder)


def open_shards(storage: Storage, folder: str, verify: bool = True) -> tuple[SavedTensors, str]:
    """Open a checkpoint in shards.

    Args:
        storage: The storage of the run's checkpoints.
        folder: The folder of the checkpoint.
        verify: Whether to compare the checksum of every file; reads them all, a few MB at a time.

    Returns:
        The tensors, none of which is read, and the progress entry.

    Raises:
        CheckpointError: A file is missing, truncated or altered; the message names it.
        RunFolderError: The storage cannot be read.
    """
    commit = _commit(storage, folder)
    places: dict[str, Place] = {}
    for name, expected in commit.files.items():
        path = f"{folder}/{name}"
        size = storage.size(path)
        if size is None:
            raise CheckpointError(f"{storage.where(path)}: is missing, but {COMMIT} lists it")
        if size != expected.bytes:
            raise CheckpointError(f"{storage.where(path)}: truncated or altered: {size} bytes, not {expected.bytes}")
        if verify and _sum(storage, path, size) != expected.sha256:
            raise CheckpointError(f"{storage.where(path)}: was altered: its contents do not match its checksum")
        if name != INDEX:
            places |= _places(storage, path, size)[0]
    return SavedTensors(storage, places), commit.progress


def open_file(storage: Storage, name: str) -> tuple[SavedTensors, dict[str, str]]:
    """Open a file of safetensors; its checksum is not compared.

    Returns:
        The tensors, none of which is read, and the file's metadata.

    Raises:
        CheckpointError: There is no such file, or it is truncated or not a safetensors file.
        RunFolderError: The storage cannot be read.
    """
    size = storage.size(name)
    if size is None:
        raise CheckpointError(f"{storage.where(name)}: no such checkpoint")
    places, metadata = _places(storage, name, size)
    return SavedTensors(storage, places), metadata


def open_files(storage: Storage, files: Mapping[str, str]) -> SavedTensors:
    """Open tensors in several files of safetensors; checksums are not compared.

    Args:
        storage: The storage of the files.
        files: The file of each tensor, by name.

    Raises:
        CheckpointError: A file is missing, truncated or not a safetensors file, or lacks a tensor.
        RunFolderError: The storage cannot be read.
    """
    opened = {file: open_file(storage, file)[0] for file in dict.fromkeys(files.values())}
    for name, file in files.items():
        if name not in opened[file]:
            raise CheckpointError(f"{storage.where(file)}: has no '{name}'")
    return SavedTensors(storage, {name: opened[file]._places[name] for name, file in files.items()})


def _commit(storage: Storage, folder: str) -> _Commit:
    path = f"{folder}/{COMMIT}"
    where = storage.where(path)
    size = storage.size(path)
    if size is None:
        raise CheckpointError(f"{where}: no such checkpoint")
    try:
        tree: Any = json.loads(bytes(storage.read(path, 0, size)))
        commit = _Commit.model_validate(tree)
    except ValidationError as error:
        raise CheckpointError(f"{where}: was altered: {error.errors()[0]['msg']}") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: truncated or altered: it is not JSON") from error
    if content_sum({key: value for key, value in tree.items() if key != "sha256"}) != commit.sha256:
        raise CheckpointError(f"{where}: was altered: its contents do not match its checksum")
    if commit.format != FORMAT:
        raise CheckpointError(f"{where}: has format {commit.format}, but this version of IST reads format {FORMAT}")
    return commit


def _places(storage: Storage, path: str, size: int) -> tuple[dict[str, Place], dict[str, str]]:
    length = int.from_bytes(storage.read(path, 0, LENGTH_BYTES), "little")
    try:
        if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MOST_HEADER_BYTES):
            raise ValueError("it ends in its header")
        return parse_header(bytes(storage.read(path, LENGTH_BYTES, LENGTH_BYTES + length)), path, size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{storage.where(path)}: truncated or not a safetensors file: {error}") from error


def _sum(storage: Storage, path: str, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, _CHUNK_BYTES):
        digest.update(storage.read(path, start, min(size, start + _CHUNK_BYTES)))
    return digest.hexdigest()
