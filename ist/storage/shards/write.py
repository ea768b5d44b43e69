"""Write a checkpoint in shards: each rank writes its files, tensor by tensor; rank 0 then makes the checkpoint valid.

A checkpoint is a folder. Its last file, `checkpoint.json`, lists all others with their sizes and checksums: a folder
without it is not a checkpoint, so a crash while writing leaves the previous checkpoint. `model.safetensors.index.json`
is the index of the network's files as Hugging Face writes it.

Where it sits: every rank calls `write_shards`; rank 0 calls `begin` before and `commit` after it.
Law: `ist/storage/shards/read.py` reads the same tensors, bit for bit.
Not here: moving tensors between ranks, which is the caller's `gather`.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from ist.errors import RunFolderError
from ist.storage.backend import Sink, Storage
from ist.storage.shards.layout import header
from ist.storage.shards.plan import MODEL, ShardFile, waves

COMMIT = "checkpoint.json"
INDEX = "model.safetensors.index.json"
FORMAT = 1


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a run of which no process holds more than its rows; one that is asked for is collected here."""

    @abstractmethod
    def write(self, rounds_done: int) -> "tuple[Sequence[ShardFile], Mapping[str, Written]]":
        """Let every rank write its files of a checkpoint.

        Args:
            rounds_done: The number of completed rounds.

        Returns:
            The plan of the files, and what each rank has written, by the name of the file.

        Raises:
            RunFolderError: A file cannot be written.
        """


class Gather(Protocol):
    """Collects the rows of a tensor, which each rank has a part of, on one rank."""

    def __call__(self, name: str, to: int) -> Tensor | None:
        """Return the whole tensor on rank `to`, None on the others. All ranks call it in the same order."""
        ...


@dataclass(frozen=True)
class Written:
    """What a file must be: its size and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


def begin(storage: Storage, folder: str) -> None:
    """Delete what an interrupted save has left in the folder of a checkpoint; rank 0 calls it before the others write.

    Raises:
        RunFolderError: It cannot be deleted.
    """
    if folder in storage.names():
        delete_shards(storage, folder)


def write_shards(
    storage: Storage, folder: str, files: Sequence[ShardFile], gather: Gather, rank: int
) -> dict[str, Written]:
    """Write this rank's files, and help the others to collect the tensors of theirs.

    No rank holds more than one whole tensor at a time.

    Args:
        storage: The storage of the run's checkpoints, which all ranks share.
        folder: The folder of the checkpoint.
        files: The plan, the same on all ranks.
        gather: Collects a tensor on the rank that writes it.
        rank: This rank.

    Returns:
        The files that this rank has written, by name.

    Raises:
        RunFolderError: A file cannot be written.
    """
    written = {}
    for wave in waves(files):
        with ExitStack() as stack:
            mine = next((file for file in wave if file.writer == rank), None)
            writer = None
            if mine is not None:
                writer = _Writer(stack.enter_context(storage.create(f"{folder}/{mine.name}")))
                writer.write(header(mine.specs, {"format": "pt"}))
            for file, name in _alternating(wave):
                tensor = gather(name, file.writer)
                if file is mine:
                    assert writer is not None
                    assert tensor is not None
                    assert (tuple(tensor.shape), tensor.dtype) == (file.specs[name].shape, file.specs[name].dtype), name
                    writer.write(values(tensor))
                del tensor
        if mine is not None and writer is not None:
            written[mine.name] = writer.result()
    return written


def commit(
    storage: Storage,
    folder: str,
    files: Sequence[ShardFile],
    written: Mapping[str, Written],
    progress: str,
) -> None:
    """Make a checkpoint valid, after all ranks have written their files; rank 0 calls it.

    Args:
        storage: The storage of the run's checkpoints.
        folder: The folder of the checkpoint.
        files: The plan.
        written: What all ranks have written, by the name of the file.
        progress: The progress entry, as text.

    Raises:
        RunFolderError: A file of another rank is not there, or the last files cannot be written.
    """
    for file in files:
        size = storage.size(f"{folder}/{file.name}")
        if size != written[file.name].bytes:
            raise RunFolderError(
                f"{storage.where(f'{folder}/{file.name}')}: rank {file.writer} wrote {written[file.name].bytes} bytes, "
                f"but rank 0 finds {'no such file' if size is None else f'{size} bytes'}: with pool.store 'sharded', "
                "all ranks must share the folder of the checkpoints: set checkpoint.storage to a folder or URL that "
                "all nodes see"
            )
    of_network = [file for file in files if file.name.startswith(f"{MODEL}-")]
    index = {
        "metadata": {"total_size": sum(file.nbytes for file in of_network)},
        "weight_map": {name: file.name for file in of_network for name in file.specs},
    }
    data = json.dumps(index, indent=2, sort_keys=True).encode()
    storage.write(f"{folder}/{INDEX}", data)
    entries = {**written, INDEX: Written(len(data), hashlib.sha256(data).hexdigest())}
    content = {
        "format": FORMAT,
        "progress": progress,
        "files": {name: asdict(entries[name]) for name in sorted(entries)},
    }
    storage.write(f"{folder}/{COMMIT}", json.dumps({**content, "sha256": content_sum(content)}, indent=2).encode())


def delete_shards(storage: Storage, folder: str) -> None:
    """Delete a checkpoint; a crash while it is being deleted leaves a folder that is not a checkpoint.

    Raises:
        RunFolderError: It cannot be deleted.
    """
    if COMMIT in storage.names(folder):
        storage.delete(f"{folder}/{COMMIT}")
    storage.delete_folder(folder)


def content_sum(content: Mapping[str, object]) -> str:
    """Return the SHA-256 of the content of `checkpoint.json`, for its entry of that name."""
    return hashlib.sha256(json.dumps(dict(content), sort_keys=True).encode()).hexdigest()


def values(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    found: memoryview = plain.view(torch.uint8).numpy().data
    return found


class _Writer:
    """Writes a file, and notes its size and checksum."""

    def __init__(self, write: Sink) -> None:
        self._write = write
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def result(self) -> Written:
        return Written(self._bytes, self._digest.hexdigest())


def _alternating(wave: Sequence[ShardFile]) -> Iterator[tuple[ShardFile, str]]:
    """Yield the tensors of a wave, one of each file in turn, so that writers are busy at once."""
    for row in zip_longest(*[[(file, name) for name in file.specs] for file in wave]):
        yield from (each for each in row if each is not None)
