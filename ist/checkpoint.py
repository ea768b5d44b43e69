"""Save and load what a run needs to go on: atomically, and verified.

A checkpoint is one safetensors file: the network under its plain names, optimiser state under
`key@name`, and a metadata entry with the round, counters and a SHA-256 over everything else. It is
written beside its place and renamed into it, so that a crash leaves the previous one.

Law: load(save(x)) == x, bit for bit. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ist.errors import CheckpointError, RunFolderError

_PATTERN = "round-*.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: rounds done, and its counters at that moment."""

    rounds_done: int = 0
    totals: dict[str, float] = field(default_factory=dict)


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], progress: Progress, keep: int) -> Path:
    """Write a checkpoint and delete all but the newest `keep`.

    Args:
        folder: Where checkpoints live; made if missing.
        tensors: Whole tensors, any device.
        progress: Where the run stands.
        keep: How many checkpoints to leave, >= 1.

    Returns:
        The file written.

    Raises:
        RunFolderError: The disk is full or not writable; earlier checkpoints are untouched.
    """
    path = folder / f"round-{progress.rounds_done:08d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"progress": json.dumps(asdict(progress))})
        for old in sorted(folder.glob(_PATTERN))[:-keep]:
            old.unlink()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a folder, or None."""
    return max(folder.glob(_PATTERN), default=None)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: The file is missing, truncated or altered.
    """
    tensors, metadata = read_tensors(path)
    try:
        progress = Progress(**json.loads(metadata["progress"]))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: is no checkpoint of a run (no progress entry)") from error
    return tensors, progress


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors with a checksum: complete under its name, or not at all.

    Raises:
        OSError: The disk refuses.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():  # a tied tensor is written under each of its names
        if tensor.data_ptr() in seen:
            plain[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    data = save(plain, {**metadata, "sha256": _checksum(plain, metadata)})
    write_atomically(path, data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for half of it.

    Raises:
        OSError: The disk refuses; a file of that name is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of `write_tensors` and verify its checksum.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        CheckpointError: The file is missing, truncated or altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from error
    expected = metadata.pop("sha256", None)
    if expected != _checksum(tensors, metadata):
        raise CheckpointError(
            f"{path}: its contents do not match its checksum: it was altered. Delete it to fall back to an earlier one"
        )
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
