"""Weights as a checkpoint of torch.distributed.checkpoint (DCP), and back.

PyTorch stores the index of such a checkpoint, the file `.metadata`, as a pickle. This file reads it with an unpickler
that knows only the classes of an index, so that a foreign checkpoint cannot run code. PyTorch reads the tensors with
`weights_only=True`.

Where it sits: `ist export --to dcp` writes one; `model.weights: FOLDER` reads one (`ist/runs/build.py`).
Law: reading what was written gives the same tensors, bit for bit.
Not here: the weights of a run (`weights.py`).
"""

import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ist.errors import CheckpointError, first_line
from ist.tensors import TensorSpec

_INDEX = ".metadata"
_PREFIXES = ("", "model.")
"""Prefixes of a network's tensors: a checkpoint of its state dict, or of {"model": state dict, ...}."""

_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
"""The names that the index of a checkpoint uses, by module; dtypes of torch too."""


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of a checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it uses '{module}.{name}', which no index of a checkpoint needs")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """PyTorch's reader of a folder, with an index that was read by `_IndexUnpickler`."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        self._index.storage_meta = StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index


class _Planner(DefaultSavePlanner):
    """PyTorch's planner, with tensors that are read when they are written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._read(index.fqn)


def write_distributed(specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], path: Path) -> None:
    """Write tensors as a checkpoint of torch.distributed.checkpoint, of which any number of ranks load their parts.

    No more than two tensors are held at a time: each is in a file of its own, because PyTorch holds the tensors of a
    file until it has written the file.

    Args:
        specs: The tensors by name.
        read: Returns the values of a tensor, on the CPU.
        path: The folder to create.
    """
    state = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    writer = FileSystemWriter(path, single_file_per_rank=False)
    with _in_one_process():
        save(state, storage_writer=writer, planner=_Planner(read), **_alone(save))


def read_distributed(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of a network from a checkpoint of torch.distributed.checkpoint; other entries stay unread.

    Args:
        path: The folder.
        expected: Tensors with the expected names and shapes.

    Returns:
        Tensors with the names, shapes and dtypes of `expected`.

    Raises:
        CheckpointError: It is not such a checkpoint, it is damaged, or a tensor is missing or has another shape.
    """
    index = _index(path)
    found = index.state_dict_metadata
    prefix = max(_PREFIXES, key=lambda prefix: sum(prefix + name in found for name in expected))
    if missing := [name for name in expected if prefix + name not in found]:
        raise CheckpointError(
            f"{path}: has no '{missing[0]}' ({len(missing)} tensors missing); it has {', '.join(sorted(found)[:5])}"
        )
    for name, tensor in expected.items():
        entry = found[prefix + name]
        shape = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else "no tensor"
        if shape != tuple(tensor.shape):
            raise CheckpointError(f"{path}: its '{prefix + name}' is {shape}, not {tuple(tensor.shape)}")
    values = {prefix + name: torch.empty_like(tensor, device="cpu") for name, tensor in expected.items()}
    _read(path, index, values)
    return {name: values[prefix + name] for name in expected}


def _read(path: Path, index: Metadata, into: dict[str, Tensor]) -> None:
    """Read tensors of a checkpoint into others.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    try:
        with _in_one_process():
            load(into, storage_reader=_Reader(path, index), **_alone(load))
    except CheckpointException as error:  # it is not an Exception
        cause = next((found[0] for found in error.failures.values()), error)
        raise CheckpointError(
            f"{path}: is damaged, and cannot be read: {type(cause).__name__} {first_line(cause)}"
        ) from error


class DistributedTensors:
    """The tensors of a checkpoint of torch.distributed.checkpoint, each read when it is asked for.

    Args:
        path: The folder.

    Raises:
        CheckpointError: It is not such a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = _index(path)
        self._specs = {
            name: TensorSpec(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: The checkpoint is damaged.
        """
        spec = self._specs[name]
        values = {name: torch.empty(spec.shape, dtype=spec.dtype)}
        _read(self._path, self._index, values)
        return values[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a tensor, along its first dim; the tensor is read, because the format has no rows.

        Raises:
            CheckpointError: The checkpoint is damaged.
        """
        found = self[name]
        return found[start:stop].clone() if found.dim() else found

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the shape and dtype of every tensor, by name."""
        return self._specs


def _index(path: Path) -> Metadata:
    file = path / _INDEX
    try:
        with file.open("rb") as stream:
            index = _IndexUnpickler(stream).load()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: has no {_INDEX}, so it is not a checkpoint of torch.distributed.checkpoint"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{file}: is not the index of a checkpoint: {first_line(error)}") from error
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{file}: is not the index of a checkpoint, but a {type(index).__name__}")
    return index


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Leave out PyTorch's warning that it works in one process, which is what we ask for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _alone(function: Any) -> dict[str, Any]:
    """Return the option that keeps PyTorch from talking to other ranks, which do not take part."""
    return {"no_dist": True} if "no_dist" in inspect.signature(function).parameters else {}
