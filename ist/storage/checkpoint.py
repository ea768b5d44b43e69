"""Save and load checkpoints: atomically, and verified by a checksum.

A checkpoint is one safetensors file: the network's tensors under their names, optimizer state under `key@name`, and
metadata with the round, counters, and a SHA-256 over everything else. It is written tensor by tensor, so that no copy
is held. If no process holds the network, the checkpoint is a folder with several such files (`ist/storage/shards/`).
Runs resume from either kind. A crash while writing leaves the previous checkpoint (`ist/storage/backend.py`). A damaged
checkpoint is renamed, and the newest intact one is used. Each worker saves its own state in a file beside the
checkpoint.

Where it sits: `ist/storage/run_folder.py` saves and loads a run here, `ist/training/worker_state.py` a worker's state.
Law: load(save(x)) == x, bit for bit. Nothing is pickled.
Not here: where files are written (`ist/storage/backend.py`), and by whom, if in shards (`ist/storage/shards/`).
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ist.config.base import NonNegativeInt
from ist.distributed.memory_limit import lifted_limit
from ist.errors import CheckpointError, RunFolderError
from ist.storage.backend import LocalStorage, Storage, atomic_file
from ist.storage.shards.layout import header, in_file_order
from ist.storage.shards.plan import ShardFile
from ist.storage.shards.read import SavedTensors, is_complete, open_file, open_shards
from ist.storage.shards.write import COMMIT, INDEX, ShardedTensors, Written, begin, commit, delete_shards, values
from ist.tensors import TensorSpec, specs_of

_log = logging.getLogger(__name__)

_FOLDER = "round-{:08d}"
_NAME = "round-{:08d}.safetensors"
_PATTERN = re.compile(r"round-\d{8}\.safetensors")
_FOLDER_PATTERN = re.compile(r"round-\d{8}")
_SHARD_PATTERN = re.compile(r"(model|state)-\d{5}-of-\d{5}\.safetensors|\.?" + re.escape(INDEX) + r"(\.\d+\.tmp)?")
_DAMAGED = ".damaged"
_NAMES = "tensors"
_MISMATCH = "the checkpoint does not match the configured network and run"
_WORKER_NAME = "worker-{}.round-{}.safetensors"


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        rounds_done: Number of completed rounds.
        totals: Counters after these rounds.
        numbers: The latest loss, accuracy and so on, for the result of a run whose earlier records are missing.
        start: Id of the incarnation (start of the run's processes) that saved it; the workers of this incarnation saved
            their state with it.
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
        storage: The storage of the run's checkpoints.
        tensors: Full tensors, on any device; those in shards are written by all ranks.
        progress: The progress of the run.
        keep: Number of checkpoints to keep, >= 1.

    Returns:
        The name of the file or folder written.

    Raises:
        RunFolderError: It cannot be written; earlier checkpoints are unchanged.
    """
    if isinstance(tensors, ShardedTensors):
        begin(storage, shards_folder(progress.rounds_done))
        return commit_shards(storage, *tensors.write(progress.rounds_done), progress, keep)
    name = _NAME.format(progress.rounds_done)
    metadata = {"progress": json.dumps(asdict(progress)), _NAMES: json.dumps(sorted(tensors))}
    with storage.writing(name) as file:
        _write(file, specs_of(tensors), tensors.__getitem__, metadata)
    _delete_old(storage, keep)
    return name


def shards_folder(rounds_done: int) -> str:
    """Return the name of the folder of a checkpoint in shards."""
    return _FOLDER.format(rounds_done)


def commit_shards(
    storage: Storage, files: Sequence[ShardFile], written: Mapping[str, Written], progress: Progress, keep: int
) -> str:
    """Make a checkpoint in shards valid, after all ranks have written their files, and delete all but the newest.

    Args:
        storage: The storage of the run's checkpoints.
        files: The plan of the files.
        written: What all ranks have written, by the name of the file.
        progress: The progress of the run.
        keep: Number of checkpoints to keep, >= 1.

    Returns:
        The name of the folder.

    Raises:
        RunFolderError: A file of another rank is not there, or rank 0 cannot write; earlier checkpoints are unchanged.
    """
    folder = shards_folder(progress.rounds_done)
    commit(storage, folder, files, written, json.dumps(asdict(progress)))
    _delete_old(storage, keep)
    return folder


def sweep_shards(storage: Storage) -> None:
    """Delete what interrupted saves have left: folders with files of a checkpoint, but without its last one.

    No other process may be saving. Folders that cannot be deleted are ignored.

    Raises:
        RunFolderError: The storage cannot be read.
    """
    for name in storage.names():
        if _FOLDER_PATTERN.fullmatch(name):
            files = storage.names(name)
            if COMMIT not in files and files and all(map(_SHARD_PATTERN.fullmatch, files)):
                with suppress(RunFolderError):
                    storage.delete_folder(name)


def _delete_old(storage: Storage, keep: int) -> None:
    for old in _checkpoints(storage)[:-keep]:
        if _FOLDER_PATTERN.fullmatch(old):
            delete_shards(storage, old)
        else:
            storage.delete(old)


def latest_checkpoint(storage: Storage) -> str | None:
    """Return the name of the newest checkpoint, or None if there is none.

    Raises:
        RunFolderError: The storage cannot be read.
    """
    return max(_checkpoints(storage), default=None)


def load_newest(storage: Storage, lazily: bool = False) -> tuple[Mapping[str, Tensor], Progress] | None:
    """Load the newest intact checkpoint; rename newer, damaged ones.

    A damaged file gets a name that is not recognized as a checkpoint, and a warning names it.

    Args:
        storage: The storage of the run's checkpoints.
        lazily: Whether to read each tensor only when it is asked for, as from a checkpoint in shards.

    Returns:
        The result of `load_checkpoint`; None if there is no checkpoint at all.

    Raises:
        CheckpointError: All checkpoints are damaged. They are not renamed.
        RunFolderError: The storage cannot be read, or a damaged file cannot be renamed.
    """
    damaged: dict[str, CheckpointError] = {}
    for name in reversed(_checkpoints(storage)):
        try:
            found = load_checkpoint(storage, name, lazily)
        except CheckpointError as error:
            damaged[name] = error
            continue
        for bad, reason in damaged.items():
            renamed = _rename_damaged(storage, bad)
            what = "folder" if _FOLDER_PATTERN.fullmatch(bad) else "file"
            _log.warning("%s. The %s was renamed to %s; resuming from %s", reason, what, renamed, name)
        return found
    if not damaged:
        return None
    newest = next(iter(damaged.values()))
    raise CheckpointError(
        f"{newest}. No checkpoint is intact ({len(damaged)} damaged): to start from the first round, delete the files "
        f"in {storage.where()}"
    )


def load_checkpoint(storage: Storage, name: str, lazily: bool = False) -> tuple[Mapping[str, Tensor], Progress]:
    """Load and verify a checkpoint.

    Args:
        storage: The storage of the run's checkpoints.
        name: The checkpoint: a file, or a folder with shards.
        lazily: Whether to read each tensor only when it is asked for; one in shards is always read so.

    Raises:
        CheckpointError: A file is missing, truncated or altered, or its progress entry is malformed or does not match
            its name.
        RunFolderError: The storage cannot be read.
    """
    where = storage.where(name)
    if in_shards := _FOLDER_PATTERN.fullmatch(name) is not None:
        saved, text = open_shards(storage, name)
        tensors: Mapping[str, Tensor] = saved
        metadata = {"progress": text}
    elif lazily:
        tensors, metadata = open_file(storage, name)
        _check_sum(tensors, metadata, where)
    else:
        with storage.reading(name) as path:
            tensors, metadata = _verified(path, where)
    try:
        progress = _PROGRESS.validate_json(metadata["progress"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"{where}: is not a checkpoint of a run ({_explain(error)})") from error
    missing = set(json.loads(metadata.get(_NAMES, "[]"))) - set(tensors)  # earlier versions did not list the names
    if missing:
        raise CheckpointError(f"{where}: was altered: '{min(missing)}' is missing ({len(missing)} tensors missing)")
    if name != (_FOLDER if in_shards else _NAME).format(progress.rounds_done):
        raise CheckpointError(
            f"{where}: its progress entry says round {progress.rounds_done}, which does not match the "
            f"{'folder' if in_shards else 'file'}'s name"
        )
    return tensors, progress


def saved_tensors(storage: Storage, rounds_done: int) -> SavedTensors:
    """Open the checkpoint of a round, which rank 0 has verified, on another rank; no tensor is read.

    Raises:
        CheckpointError: There is no such checkpoint, or a file of it is missing or truncated.
        RunFolderError: The storage cannot be read.
    """
    folder = shards_folder(rounds_done)
    if is_complete(storage, folder):
        return open_shards(storage, folder, verify=False)[0]
    return open_file(storage, _NAME.format(rounds_done))[0]


def _explain(error: KeyError | ValidationError) -> str:
    if isinstance(error, KeyError):
        return "no progress entry"
    detail = error.errors()[0]
    key = ".".join(str(part) for part in detail["loc"][:2])
    return f"its progress entry: {key}{': ' if key else ''}{detail['msg']}"


def _checkpoints(storage: Storage) -> list[str]:
    return [
        name
        for name in storage.names()
        if _PATTERN.fullmatch(name) or (_FOLDER_PATTERN.fullmatch(name) and is_complete(storage, name))
    ]


def _rename_damaged(storage: Storage, name: str) -> str:
    """Rename a damaged file or folder, so that it is not recognized as a checkpoint; return its new name."""
    existing = storage.names()
    renamed = name + _DAMAGED
    number = 1
    while renamed in existing:
        number += 1
        renamed = f"{name}{_DAMAGED}-{number}"
    storage.rename(name, renamed)
    return renamed


def check_tensors(
    found: Mapping[str, Tensor] | Mapping[str, TensorSpec], expected: Mapping[str, Tensor] | Mapping[str, TensorSpec]
) -> None:
    """Check that a part of a checkpoint has exactly the tensors that a run needs to resume.

    Args:
        found: Tensors of the checkpoint, or their specs.
        expected: Tensors with the expected names, shapes and dtypes, or specs of them.

    Raises:
        CheckpointError: A tensor is missing or unexpected, or has another shape or dtype.
    """
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{_MISMATCH}: it lacks '{missing[0]}' ({len(missing)} tensors missing)")
    for name, tensor in found.items():
        if name not in expected:
            raise CheckpointError(f"{_MISMATCH}: it contains '{name}', which this run does not have")
        shape, dtype = tuple(expected[name].shape), expected[name].dtype
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise CheckpointError(
                f"{_MISMATCH}: its '{name}' is {tuple(tensor.shape)} of {tensor.dtype}, not {shape} of {dtype}"
            )


def save_worker_state(
    storage: Storage, worker: int, rounds_done: int, tensors: Mapping[str, Tensor], of: str, keep: int
) -> None:
    """Write a worker's state beside the run's checkpoints, and delete all but its newest `keep` files.

    Args:
        storage: The storage of the run's checkpoints.
        worker: The worker; each writes its own file, before the run's checkpoint of the same round.
        rounds_done: Number of completed rounds.
        tensors: The state, on any device.
        of: A key for the neurons and the incarnation to which the state belongs.
        keep: Largest number of checkpoints of the run.

    Raises:
        RunFolderError: It cannot be written; earlier files are unchanged.
    """
    now = _worker_file(worker, rounds_done)
    with storage.writing(now) as file:
        _write(file, specs_of(tensors), tensors.__getitem__, {"of": of})
    files, existing = _WORKER_NAME.format(f"{worker:04d}", "*"), storage.names()
    mine = [name for name in existing if fnmatch(name, files)]
    temporary = [name for name in existing if fnmatch(name, f".{files}.*.tmp")]  # its process was killed while saving
    before = [name for name in mine if name < now]
    # Files of existing checkpoints stay. Later files are from an interrupted run that resumed from an earlier round.
    for old in [*temporary, *before[:-keep], *(name for name in mine if name > now)]:
        with suppress(RunFolderError):  # harmless; the next round tries again
            storage.delete(old)


def load_worker_state(storage: Storage, worker: int, rounds_done: int, of: str) -> dict[str, Tensor] | None:
    """Load a file of `save_worker_state`; None if there is none, or if its key differs from `of`.

    Raises:
        CheckpointError: The file is truncated or altered.
        RunFolderError: The storage cannot be read.
    """
    name = _worker_file(worker, rounds_done)
    if name not in storage.names():
        return None
    with storage.reading(name) as path:
        tensors, metadata = _verified(path, storage.where(name))
    return tensors if metadata.get("of") == of else None


def delete_worker_states(storage: Storage, after: int = 0) -> None:
    """Delete the state of all workers after more rounds than `after`.

    Raises:
        RunFolderError: The storage cannot be read, or a file cannot be deleted.
    """
    last = _worker_file(0, after).partition(".")[2]
    for name in storage.names():
        if fnmatch(name, _WORKER_NAME.format("*", "*")) and name.partition(".")[2] > last:
            storage.delete(name)


def _worker_file(worker: int, rounds_done: int) -> str:
    return _WORKER_NAME.format(f"{worker:04d}", f"{rounds_done:08d}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, on any device, as a safetensors file with a checksum, completely or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    stream_tensors(path, specs_of(tensors), tensors.__getitem__, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of `write_tensors` and verify its checksum.

    Returns:
        The tensors, on the CPU, and the metadata. The tensors are parts of the file, mapped into memory, until they
        are written.

    Raises:
        CheckpointError: The file is missing, truncated or altered.
    """
    return _verified(path, str(path))


def stream_tensors(
    path: Path, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the file that `write_tensors` writes, of tensors that are read one at a time.

    Args:
        path: The file.
        specs: The tensors.
        read: Returns the values of a tensor; it is called once for each, in the order of sorted names.
        metadata: Strings to store with them.

    Raises:
        OSError: The file cannot be written.
    """
    with atomic_file(path) as file:
        _write(file, specs, read, metadata)


def open_tensors(path: Path) -> SavedTensors:
    """Open a file of `write_tensors`, and verify its checksum; no more than one tensor is held at a time.

    Raises:
        CheckpointError: The file is missing, truncated or altered.
        RunFolderError: It cannot be read.
    """
    storage = LocalStorage(path.parent)
    tensors, metadata = open_file(storage, path.name)
    _check_sum(tensors, metadata, str(path))
    return tensors


def _write(
    file: BinaryIO, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors into a new file, one at a time; tied tensors are written under each name.

    The checksum adds them in the order of names, but the file has large dtypes first, so writing jumps between them.
    """
    ordered = in_file_order(dict(sorted(specs.items())))
    unknown = "0" * 64  # the checksum, which is known at the end
    checksum_key = '"sha256":"'  # no other text of a header contains it: quotes within strings are escaped
    with lifted_limit():
        first = header(ordered, {**metadata, "sha256": unknown})
        starts, start = {}, len(first)
        for name, spec in ordered.items():
            starts[name], start = start, start + spec.nbytes
        digest = _digest(metadata)
        file.write(first)
        for name in sorted(specs):
            tensor = read(name).detach().cpu().contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (specs[name].shape, specs[name].dtype), name
            _add(digest, name, tensor)
            file.seek(starts[name])
            file.write(values(tensor))
            del tensor  # before the next one is read
        file.seek(first.index(f"{checksum_key}{unknown}".encode()) + len(checksum_key))
        file.write(digest.hexdigest().encode())


def _verified(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors, metadata = _opened(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{where}: no such checkpoint") from error
    except PermissionError as error:  # not damage: another user may be able to read it
        raise RunFolderError(f"{where}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{where}: truncated or not a safetensors file: {error}") from error
    _check_sum(tensors, metadata, where)
    return tensors, metadata


def _check_sum(tensors: Mapping[str, Tensor], metadata: dict[str, str], where: str) -> None:
    """Compare the checksum of a file's tensors, which it removes from their metadata.

    Raises:
        CheckpointError: It differs.
    """
    expected = metadata.pop("sha256", None)
    if expected != _checksum(tensors, metadata):
        raise CheckpointError(f"{where}: was altered: its contents do not match its checksum")


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = _digest(metadata)
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _digest(metadata: Mapping[str, str]) -> "hashlib._Hash":
    """Start a checksum."""
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add a tensor to a checksum, in the order of sorted names."""
    digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
