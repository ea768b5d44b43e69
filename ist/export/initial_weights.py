"""Read the weights that a network starts with, one tensor at a time: files of safetensors, or a distributed checkpoint.

Where it sits: `ist/runs/build.py` opens what `model.weights` or the argument `weights` names.
Law: the tensors are those that PyTorch or transformers would load, bit for bit, in the dtypes of the network.
Not here: the format of files (`ist/storage/shards/`), putting tensors into a network (`ist/initialization/fill.py`).
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ist.errors import CheckpointError, ConfigError, RunFolderError
from ist.network.compiled import plain_name
from ist.storage.backend import LocalStorage
from ist.storage.shards.read import open_file, open_files
from ist.tensors import TensorSpec

_INDEX, _SINGLE, _DISTRIBUTED_INDEX = "model.safetensors.index.json", "model.safetensors", ".metadata"
"""By which file a folder is known: those of transformers, and the index of torch.distributed.checkpoint."""


class Saved(Protocol):
    """Tensors in files, each read when it is asked for."""

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some rows of a tensor, along its first dim."""
        ...

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the shape and dtype of every tensor, by name."""
        ...


class InitialWeights(Mapping[str, Tensor]):
    """The initial values of a network's tensors, by the names of its `state_dict`; each is read when it is asked for.

    Args:
        saved: The tensors in the files.
        names: The name in the files, by name.
        dtypes: The dtype in the network, by name.
    """

    def __init__(self, saved: Saved, names: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> None:
        self._saved = saved
        self._names = names
        self._dtypes = dtypes

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor; a tied one has the same values under each of its names.

        Raises:
            CheckpointError: The file is truncated.
            RunFolderError: The file cannot be read.
        """
        return self._saved[self._names[name]].to(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor of that name."""
        return name in self._names

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows `start` to `stop` (exclusive) of a tensor, along its first dim; nothing else is read.

        Raises:
            CheckpointError: The file is truncated.
            RunFolderError: The file cannot be read.
        """
        return self._saved.rows(self._names[name], start, stop).to(self._dtypes[name])


def open_weights(path: Path, template: nn.Module, where: str) -> InitialWeights:
    """Open the weights of a network, and check their names, shapes and dtypes; no tensor is read.

    Args:
        path: A safetensors file; or a folder of transformers (with `model.safetensors`, or several files and
            `model.safetensors.index.json`), or of torch.distributed.checkpoint.
        template: The network, on any device.
        where: The name of the key or argument, for messages.

    Raises:
        ConfigError: The file or folder cannot be read, or belongs to another network.
    """
    try:
        saved = _opened(path)
    except (CheckpointError, RunFolderError, OSError) as error:
        raise ConfigError(f"'{where}' is '{path}', which cannot be read: {error}") from error
    state = template.state_dict(keep_vars=True)
    stored = saved.specs()
    names = _names(path, template, state, stored, where)
    for name, found in names.items():
        spec, tensor = stored[found], state[name]
        if spec.shape != tuple(tensor.shape):
            raise ConfigError(
                f"'{where}' is '{path}', which does not match the network: its '{found}' is {spec.shape}, not "
                f"{tuple(tensor.shape)}"
            )
        if _kind(spec.dtype) != _kind(tensor.dtype):
            raise ConfigError(
                f"'{where}' is '{path}', which does not match the network: its '{found}' is {spec.dtype}, which cannot "
                f"become {tensor.dtype}"
            )
    dtypes = {name: state[name].dtype for name in names}
    changes = Counter((stored[found].dtype, dtypes[name]) for name, found in names.items())
    for (before, after), number in changes.items():
        if before != after:
            warnings.warn(
                f"'{where}' is '{path}', where {number} tensors are {before}: they become {after}, as in the network"
                + (" (rounded)" if after.itemsize < before.itemsize else ""),
                stacklevel=2,
            )
    return InitialWeights(saved, names, dtypes)


def _opened(path: Path) -> Saved:
    if not path.is_dir():
        return open_file(LocalStorage(path.parent), path.name)[0]
    if (path / _INDEX).is_file():
        try:
            files = {
                str(name): str(file) for name, file in json.loads((path / _INDEX).read_bytes())["weight_map"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / _INDEX}: is not the index of a folder of transformers") from error
        if outside := [file for file in files.values() if Path(file).name != file]:
            raise CheckpointError(f"{path / _INDEX}: names '{outside[0]}', which is not a file of its folder")
        return open_files(LocalStorage(path), files)
    if (path / _SINGLE).is_file():
        return open_file(LocalStorage(path), _SINGLE)[0]
    if not (path / _DISTRIBUTED_INDEX).is_file():
        raise CheckpointError(
            f"it has neither {_INDEX}, nor {_SINGLE}, nor {_DISTRIBUTED_INDEX}: give a folder of transformers with "
            "safetensors, or of torch.distributed.checkpoint"
        )
    from ist.export.distributed_checkpoint import DistributedTensors  # takes half a second to import

    return DistributedTensors(path)


def _names(
    path: Path, template: nn.Module, state: Mapping[str, Tensor], stored: Mapping[str, TensorSpec], where: str
) -> dict[str, str]:
    """Return the stored name of each tensor of a network.

    A tensor may be stored under one of its names only, if it is tied. A folder may hold the network without its head's
    prefix, or as the entry `model` of a checkpoint.

    Raises:
        ConfigError: A tensor is missing, or a file has one that the network lacks.
    """
    plain = {plain_name(name): name for name in stored}
    base = str(getattr(template, "base_model_prefix", ""))
    renamings = [plain]
    if path.is_dir():
        renamings.append({name.removeprefix("model."): found for name, found in plain.items()})
        renamings.append({f"{base}.{name}": found for name, found in plain.items()})
    known = max(renamings, key=lambda names: len(names.keys() & state.keys()))
    by_tensor = {id(tensor): known[name] for name, tensor in state.items() if name in known}
    missing = [name for name, tensor in state.items() if id(tensor) not in by_tensor]
    unknown = [found for name, found in known.items() if name not in state]
    if missing:
        raise ConfigError(
            f"'{where}' is '{path}', which does not match the network: it has no '{missing[0]}' ({len(missing)} such "
            f"tensors); it has {', '.join(sorted(stored)[:5])}"
        )
    if unknown and not path.is_dir():
        raise ConfigError(
            f"'{where}' is '{path}', which does not match the network: it has '{unknown[0]}', which the network lacks "
            f"({len(unknown)} such tensors)"
        )
    if unknown and not (path / _DISTRIBUTED_INDEX).is_file():
        warnings.warn(
            f"'{where}' is '{path}', which has '{unknown[0]}' ({len(unknown)} such tensors): the network lacks it, so "
            "it is not used",
            stacklevel=3,
        )
    return {name: by_tensor[id(tensor)] for name, tensor in state.items()}


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "real" if dtype.is_floating_point else "bool" if dtype == torch.bool else "integer"
