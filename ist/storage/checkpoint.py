"""Save and load what a run needs to go on: atomically, and verified.

A checkpoint is one safetensors file: the network under its plain names, optimiser state under `key@name`, and a
metadata entry with the round, counters and a SHA-256 over everything else. It is written so that a crash leaves the
previous one (`ist/storage/backend.py`). One that is damaged all the same is set aside, and the newest whole one takes
its place. What workers keep for themselves lies beside it, a file for each.

Law: load(save(x)) == x, bit for bit. Nothing is pickled.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from ist.config.base import NonNegativeInt
from ist.distributed.memory_limit import lifted_limit
from ist.errors import CheckpointError, RunFolderError
from ist.storage.backend import Storage, write_atomically

_log = logging.getLogger(__name__)

_NAME = "round-{:08d}.safetensors"
_PATTERN = re.compile(r"round-\d{8}\.safetensors")
_DAMAGED = ".damaged"
_NAMES = "tensors"
_MISFIT = "the checkpoint does not fit the configured network and run"
_KEPT = "worker-{}.round-{}.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        rounds_done: Rounds done.
        totals: Counters at that moment.
        numbers: The latest loss, accuracy and the like, for the result of a run whose first records are elsewhere.
        start: A name for the start of the run's processes that saved it: with them, workers saved what they keep.
        config: The run's configuration, as YAML without passwords; empty in checkpoints of earlier versions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    rounds_done: NonNegativeInt = 0
    totals: dict[str, int | float] = field(default_factory=dict)
    numbers: dict[str, int | float] = field(default_factory=dict)
    start: str = ""
    config: str = ""


_PROGRESS = TypeAdapter(Progress)


def save_checkpoint(storage: Storage, tensors: Mapping[str, Tensor], progress: Progress, keep: int) -> str:
    """Write a checkpoint and delete all but the newest `keep`.

    Args:
        storage: Where the run's checkpoints live.
        tensors: Whole tensors, any device.
        progress: Where the run stands.
        keep: How many checkpoints to leave, >= 1.

    Returns:
        The name of the file written.

    Raises:
        RunFolderError: It cannot be written; earlier checkpoints are untouched.
    """
    name = _NAME.format(progress.rounds_done)
    metadata = {"progress": json.dumps(asdict(progress)), _NAMES: json.dumps(sorted(tensors))}
    storage.write(name, _serialized(tensors, metadata))
    for old in _checkpoints(storage)[:-keep]:
        storage.delete(old)
    return name


def latest_checkpoint(storage: Storage) -> str | None:
    """Return the name of the newest checkpoint, or None.

    Raises:
        RunFolderError: The storage cannot be read.
    """
    return max(_checkpoints(storage), default=None)


def load_newest(storage: Storage) -> tuple[dict[str, Tensor], Progress] | None:
    """Read the newest checkpoint that is whole, and set aside those after it, which are damaged.

    A damaged file gets another name, under which nothing looks for a checkpoint, and a warning names it.

    Returns:
        What `load_checkpoint` returns; None where there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and none of them is whole. They stay as they are.
        RunFolderError: The storage cannot be read, or a damaged file cannot be renamed.
    """
    damaged: dict[str, CheckpointError] = {}
    for name in reversed(_checkpoints(storage)):
        try:
            found = load_checkpoint(storage, name)
        except CheckpointError as error:
            damaged[name] = error
            continue
        for bad, reason in damaged.items():
            aside = _set_aside(storage, bad)
            _log.warning("%s. It is now called %s, and the run goes on from %s", reason, aside, name)
        return found
    if not damaged:
        return None
    newest = next(iter(damaged.values()))
    raise CheckpointError(
        f"{newest}. No other checkpoint is whole ({len(damaged)} damaged): to start over, delete what is in "
        f"{storage.where()}"
    )


def load_checkpoint(storage: Storage, name: str) -> tuple[dict[str, Tensor], Progress]:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: The file is missing, truncated or altered, or its progress entry is not one, or another's.
        RunFolderError: The storage cannot be read.
    """
    where = storage.where(name)
    tensors, metadata = _verified(storage.load(name), where)
    try:
        progress = _PROGRESS.validate_json(metadata["progress"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"{where}: is no checkpoint of a run ({_what_is_wrong(error)})") from error
    lacking = set(json.loads(metadata.get(_NAMES, "[]"))) - set(tensors)  # earlier versions did not note them
    if lacking:
        raise CheckpointError(f"{where}: is altered: it lacks '{min(lacking)}' ({len(lacking)} tensors missing)")
    if name != _NAME.format(progress.rounds_done):
        raise CheckpointError(f"{where}: its progress entry is of round {progress.rounds_done}, and not its name's")
    return tensors, progress


def _what_is_wrong(error: KeyError | ValidationError) -> str:
    if isinstance(error, KeyError):
        return "no progress entry"
    detail = error.errors()[0]
    key = ".".join(str(part) for part in detail["loc"][:2])
    return f"its progress entry: {key}{': ' if key else ''}{detail['msg']}"


def _checkpoints(storage: Storage) -> list[str]:
    return [name for name in storage.names() if _PATTERN.fullmatch(name)]


def _set_aside(storage: Storage, name: str) -> str:
    """Rename a damaged file, so that nothing takes it for a checkpoint; return its new name."""
    there = storage.names()
    aside = name + _DAMAGED
    number = 1
    while aside in there:
        number += 1
        aside = f"{name}{_DAMAGED}-{number}"
    storage.rename(name, aside)
    return aside


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that a part of a checkpoint holds just the tensors that a run goes on with.

    Args:
        found: What the checkpoint has.
        expected: Tensors of the names, shapes and dtypes that it must have.

    Raises:
        CheckpointError: A tensor is missing, superfluous, or of another shape or dtype.
    """
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{_MISFIT}: it lacks '{missing[0]}' ({len(missing)} tensors missing)")
    for name, tensor in found.items():
        if name not in expected:
            raise CheckpointError(f"{_MISFIT}: it holds '{name}', for which this run has no use")
        shape, dtype = tuple(expected[name].shape), expected[name].dtype
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise CheckpointError(
                f"{_MISFIT}: its '{name}' is {tuple(tensor.shape)} of {tensor.dtype}, not {shape} of {dtype}"
            )


def save_kept(
    storage: Storage, worker: int, rounds_done: int, tensors: Mapping[str, Tensor], of: str, keep: int
) -> None:
    """Write what a worker keeps beside the run's checkpoints, and delete its files of all but the newest `keep`.

    Args:
        storage: Where the run's checkpoints live.
        worker: Whose it is; every worker writes its own, before the run's checkpoint after the same round.
        rounds_done: Rounds done.
        tensors: Any device.
        of: What of the network it belongs to.
        keep: How many checkpoints of the run there are at most.

    Raises:
        RunFolderError: It cannot be written; earlier files are untouched.
    """
    now = _kept_name(worker, rounds_done)
    storage.write(now, _serialized(tensors, {"of": of}))
    files, there = _KEPT.format(f"{worker:04d}", "*"), storage.names()
    mine = [name for name in there if fnmatch(name, files)]
    killed = [name for name in there if fnmatch(name, f".{files}.*.tmp")]  # while an earlier process of it was saving
    before = [name for name in mine if name < now]
    # Those of checkpoints that are there stay. Later ones are of a run that was broken off, and went on from earlier.
    for old in [*killed, *before[:-keep], *(name for name in mine if name > now)]:
        with suppress(RunFolderError):  # no harm, and the next round tries again
            storage.delete(old)


def load_kept(storage: Storage, worker: int, rounds_done: int, of: str) -> dict[str, Tensor] | None:
    """Read what `save_kept` wrote; None where there is nothing, or it belongs to something else of the network.

    Raises:
        CheckpointError: The file is truncated or altered.
        RunFolderError: The storage cannot be read.
    """
    name = _kept_name(worker, rounds_done)
    if name not in storage.names():
        return None
    tensors, metadata = _verified(storage.load(name), storage.where(name))
    return tensors if metadata.get("of") == of else None


def forget_kept(storage: Storage, after: int = 0) -> None:
    """Delete what all workers kept beside checkpoints of more rounds than `after`.

    Raises:
        RunFolderError: The storage cannot be read, or refuses.
    """
    last = _kept_name(0, after).partition(".")[2]
    for name in storage.names():
        if fnmatch(name, _KEPT.format("*", "*")) and name.partition(".")[2] > last:
            storage.delete(name)


def _kept_name(worker: int, rounds_done: int) -> str:
    return _KEPT.format(f"{worker:04d}", f"{rounds_done:08d}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors with a checksum: complete under its name, or not at all.

    Raises:
        OSError: The disk refuses.
    """
    write_atomically(path, _serialized(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of `write_tensors` and verify its checksum.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        CheckpointError: The file is missing, truncated or altered.
    """
    return _verified(path, str(path))


def _serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():  # a tied tensor is written under each of its names
        if tensor.data_ptr() in seen:
            plain[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    with lifted_limit():
        data: bytes = save(plain, {**metadata, "sha256": _checksum(plain, metadata)})
    return data


def _verified(source: Path | bytes, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors, metadata = _parsed(source) if isinstance(source, bytes) else _opened(source)
    except FileNotFoundError as error:
        raise CheckpointError(f"{where}: no such checkpoint") from error
    except PermissionError as error:  # no damage: another user may read it
        raise RunFolderError(f"{where}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{where}: truncated or not a safetensors file: {error}") from error
    expected = metadata.pop("sha256", None)
    if expected != _checksum(tensors, metadata):
        raise CheckpointError(f"{where}: its contents do not match its checksum: it was altered")
    return tensors, metadata


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)


def _parsed(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = load(data)  # refuses what is not safetensors, so that the header can be read without care
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, dict(header.get("__metadata__", {}))


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
