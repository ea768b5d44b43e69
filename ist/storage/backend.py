"""Where checkpoints are kept: a folder, or anything that fsspec reaches by a URL.

Where it sits: `ist/storage/run_folder.py` opens a storage, `ist/storage/checkpoint.py` decides what is in it.
Law: what `write` was given is what `load` returns, and a name never stands for half of it.
Not here: what the bytes mean (`ist/storage/checkpoint.py`).
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ist.errors import CheckpointError, ConfigError, RunFolderError
from ist.redact import holds_secret, redacted

WHOLE_PUTS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"})
"""Protocols with which an object appears whole or not at all; with others it is written beside its place and moved."""


class Storage(Protocol):
    """A place that holds files side by side."""

    def where(self, name: str = "") -> str:
        """Return the path or URL of a file, or of the whole storage, for people."""
        ...

    def names(self) -> list[str]:
        """Return the names of the files, sorted; none where the place does not exist yet.

        Raises:
            RunFolderError: It cannot be read.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file: complete under its name, or not at all.

        Raises:
            RunFolderError: It cannot be written; a file of that name is as it was.
        """
        ...

    def load(self, name: str) -> Path | bytes:
        """Return a file: its path where it is on this machine, else its bytes.

        Raises:
            CheckpointError: There is no such file.
            RunFolderError: It cannot be read.
        """
        ...

    def rename(self, name: str, new: str) -> None:
        """Give a file another name.

        Raises:
            RunFolderError: It cannot be renamed.
        """
        ...

    def delete(self, name: str) -> None:
        """Delete a file.

        Raises:
            RunFolderError: It cannot be deleted.
        """
        ...


class LocalStorage:
    """A folder of this machine, made when it is first written to; a `Storage`.

    Neither the folder nor a file in it may be a symbolic link, which leads elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def where(self, name: str = "") -> str:
        """Return a path."""
        return str(self.folder / name)

    def names(self) -> list[str]:
        """Return the names of the files, sorted."""
        refuse_link(self.folder)
        try:
            return sorted(path.name for path in self.folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RunFolderError(f"{self.folder}: cannot be read: {error.strerror or error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file beside its place, have it reach the disk, and rename it."""
        path = self.folder / name
        refuse_link(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error

    def load(self, name: str) -> Path:
        """Return a file's path."""
        path = self.folder / name
        for link in (self.folder, path):
            refuse_link(link)
        return path

    def rename(self, name: str, new: str) -> None:
        """Give a file another name."""
        path = self.folder / name
        try:
            path.rename(self.folder / new)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be renamed: {error.strerror or error}") from error

    def delete(self, name: str) -> None:
        """Delete a file."""
        path = self.folder / name
        try:
            path.unlink()
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be deleted: {error.strerror or error}") from error


class RemoteStorage:
    """A folder, or the beginning of objects' names, behind a URL; a `Storage`.

    Args:
        system: An fsspec file system.
        folder: The folder in it.
        url: The same for people.
    """

    def __init__(self, system: Any, folder: str, url: str) -> None:
        self._system = system
        self._folder = folder.rstrip("/")
        self._secret_url = url
        self._url = redacted(url.rstrip("/"))
        protocols = system.protocol if isinstance(system.protocol, list | tuple) else (system.protocol,)
        self._puts_whole = not WHOLE_PUTS.isdisjoint(protocols)

    def where(self, name: str = "") -> str:
        """Return a URL."""
        return f"{self._url}/{name}" if name else self._url

    def names(self) -> list[str]:
        """Return the names of the files, sorted."""
        with self._translated(self._url, "read"):
            self._system.invalidate_cache()
            try:
                found = self._system.ls(self._folder, detail=False)
            except FileNotFoundError:
                return []
        return sorted(PurePosixPath(path).name for path in found)

    def write(self, name: str, data: bytes) -> None:
        """Put an object, or write a file beside its place and move it there; and see that all of it is there."""
        path, beside = self._path(name), self._path(f".{name}.{os.getpid()}.tmp")
        with self._translated(self.where(name), "written"):
            if self._puts_whole:
                self._system.pipe_file(path, data)
                self._check_size(path, len(data))
                return
            self._system.makedirs(self._folder, exist_ok=True)
            try:
                self._system.pipe_file(beside, data)
                self._check_size(beside, len(data))
                self._move(beside, path, len(data))
            finally:
                with contextlib.suppress(Exception):  # it is gone where all went well
                    self._system.rm_file(beside)

    def load(self, name: str) -> bytes:
        """Return a file's bytes."""
        with self._translated(self.where(name), "read"):
            try:
                found: bytes = self._system.cat_file(self._path(name))
            except FileNotFoundError as error:
                raise CheckpointError(f"{self.where(name)}: no such checkpoint") from error
        return found

    def rename(self, name: str, new: str) -> None:
        """Give a file another name; object stores copy it and delete the first."""
        with self._translated(self.where(name), "renamed"):
            self._system.mv(self._path(name), self._path(new))

    def delete(self, name: str) -> None:
        """Delete a file."""
        with self._translated(self.where(name), "deleted"):
            self._system.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _move(self, beside: str, path: str, num_bytes: int) -> None:
        try:
            self._system.mv(beside, path)
        except BaseException:
            with contextlib.suppress(Exception):  # where to move is to copy, half of a copy may be there
                self._check_size(path, num_bytes)
            raise
        self._check_size(path, num_bytes)

    def _check_size(self, path: str, num_bytes: int) -> None:
        """See that a file that was written just now is whole; one that is not is deleted."""
        self._system.invalidate_cache()
        size = self._system.info(path).get("size")
        if size is not None and size != num_bytes:
            self._system.rm_file(path)
            raise OSError(f"only {size} of {num_bytes} bytes arrived")

    @contextlib.contextmanager
    def _translated(self, where: str, what: str) -> Iterator[None]:
        """Turn an error of any file system into ours: each has classes of its own, for networks and permissions."""
        try:
            yield
        except RunFolderError:
            raise
        except ImportError as error:  # some import their libraries when they are first used
            reason = redacted(str(error), self._secret_url)
            raise ConfigError(f"'checkpoint.storage': {where}: {reason}") from _shown(error, self._secret_url)
        except Exception as error:
            reason = redacted(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}", self._secret_url)
            raise RunFolderError(f"{where}: cannot be {what}: {reason}") from _shown(error, self._secret_url)


def run_storage(storage: str | None, folder: Path) -> Storage:
    """Open where a run's checkpoints are.

    Args:
        storage: `checkpoint.storage`; None: in the run folder.
        folder: The run folder.

    Raises:
        ConfigError: The URL is not understood, or a package for its protocol is missing.
    """
    return LocalStorage(folder / "checkpoints") if storage is None else open_storage(storage, folder.resolve().name)


def is_url(storage: str) -> bool:
    """Return whether `checkpoint.storage` is a URL, and not a folder."""
    return "://" in storage or "::" in storage


def open_storage(storage: str, name: str) -> Storage:
    """Open the part of a storage that belongs to a run.

    Args:
        storage: A folder or an fsspec URL (`checkpoint.storage`).
        name: Name of the run folder.

    Raises:
        ConfigError: The URL is not understood, or a package for its protocol is missing.
    """
    if not is_url(storage):
        return LocalStorage(Path(storage) / name)
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    url = f"{storage.rstrip('/')}/{name}"
    try:
        system, folder = url_to_fs(url)
    except ImportError as error:
        reason = redacted(str(error), url)
        raise ConfigError(
            f"'checkpoint.storage' is '{redacted(storage)}', and a package is missing: {reason}"
        ) from _shown(error, url)
    except Exception as error:
        reason = redacted(str(error), url)
        raise ConfigError(
            f"'checkpoint.storage' is '{redacted(storage)}', which fsspec cannot open: {reason}"
        ) from _shown(error, url)
    if isinstance(system, LocalFileSystem):
        return LocalStorage(Path(folder))
    return RemoteStorage(system, folder, url)


def refuse_link(path: Path) -> None:
    """Check that a file or folder of a run is where it seems to be.

    Raises:
        RunFolderError: It is a symbolic link.
    """
    if path.is_symlink():
        raise RunFolderError(
            f"{path}: is a symbolic link to {path.readlink()}, and what belongs to a run is not followed out of its "
            "folder: put the files there in its place (checkpoints may be elsewhere: checkpoint.storage)"
        )


_TEMPORARY = re.compile(
    r"\.(config\.yaml|metrics\.jsonl|result\.json|model\.safetensors|(worker-\d{4}\.)?round-\d{8}\.safetensors)\.\d+\.tmp"
)


def sweep(storage: Storage) -> None:
    """Delete what was written beside its place by a process that was killed; a failure to do so is no harm.

    Raises:
        RunFolderError: The storage cannot be read.
    """
    for name in storage.names():
        if _TEMPORARY.fullmatch(name):
            with contextlib.suppress(RunFolderError):
                storage.delete(name)


def _shown(error: Exception, url: str) -> Exception | None:
    """Return an error as a cause that a traceback may show, or nothing where it quotes the password of a URL."""
    return None if holds_secret(url) else error


def write_atomically(path: Path, data: bytes, private: bool = False) -> None:
    """Write a file so that its name never stands for half of it.

    Args:
        path: Where.
        data: What.
        private: For its owner only (mode 600).

    Raises:
        OSError: The disk refuses; a file of that name is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600 if private else 0o666
        )
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
