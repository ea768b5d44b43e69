"""The storage of checkpoints: a local folder, or a URL that fsspec can open.

Where it sits: `ist/storage/run_folder.py` opens a storage, `ist/storage/checkpoint.py` reads and writes files in it.
Law: what is read are the bytes that were written; a file name never refers to a partial file, but while it is made by
`create`.
Not here: the meaning of the bytes (`ist/storage/checkpoint.py`).
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from ist.errors import CheckpointError, ConfigError, RunFolderError
from ist.redact import holds_secret, redacted

WHOLE_PUTS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"})
"""Protocols whose writes are atomic; with other protocols a file is written under a temporary name and renamed."""


Sink = Callable[[bytes | memoryview], object]
"""Appends data to a file that is being written."""


class Storage(Protocol):
    """A collection of files, and of folders with files (checkpoints in shards); the name of a file is 'FOLDER/FILE'."""

    def where(self, name: str = "") -> str:
        """Return the path or URL of a file, or of the storage, for messages."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names of the files and folders; an empty list if there is no such folder yet.

        Args:
            folder: A folder of the storage; default: the storage itself.

        Raises:
            RunFolderError: The storage cannot be read.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file completely, or not at all.

        Raises:
            RunFolderError: It cannot be written; an existing file of that name is unchanged.
        """
        ...

    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Write a file completely, or not at all, through a seekable file on this machine; no memory holds it whole.

        A storage behind a URL uploads it when the `with` block ends: it needs room for it in the folder of temporary
        files (TMPDIR).

        Raises:
            RunFolderError: It cannot be written; an existing file of that name is unchanged.
        """
        ...

    def reading(self, name: str) -> AbstractContextManager[Path]:
        """Return the path of a file on this machine: the file itself, or a copy of it, deleted after the `with` block.

        Raises:
            CheckpointError: There is no such file behind a URL.
            RunFolderError: It cannot be read.
        """
        ...

    def create(self, name: str) -> AbstractContextManager[Sink]:
        """Write a file piece by piece; it may be partial until the `with` block has ended.

        Raises:
            RunFolderError: It cannot be written.
        """
        ...

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is no such file.

        Raises:
            RunFolderError: The storage cannot be read.
        """
        ...

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """Return the bytes `start` to `stop` (exclusive) of a file; fewer if it ends before.

        Raises:
            CheckpointError: There is no such file.
            RunFolderError: It cannot be read.
        """
        ...

    def rename(self, name: str, new: str) -> None:
        """Rename a file or a folder.

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

    def delete_folder(self, name: str) -> None:
        """Delete a folder and its files.

        Raises:
            RunFolderError: It cannot be deleted.
        """
        ...


class LocalStorage:
    """A `Storage` in a folder on this machine; the first write creates the folder.

    Neither the folder nor a file in it may be a symbolic link, because a link can lead out of the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def where(self, name: str = "") -> str:
        """Return the path of a file, or of the folder."""
        return str(self.folder / name)

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files and folders, sorted."""
        path = self._path(folder)
        try:
            return sorted(found.name for found in path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read: {error.strerror or error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file under a temporary name, sync it to disk, and rename it."""
        with self.writing(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Write a file under a temporary name, sync it to disk, and rename it."""
        path = self._new(name)
        with _named(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                yield file

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """Return the path of a file."""
        yield self._path(name)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        """Write a file piece by piece, and sync it to disk."""
        path = self._path(name)
        with _named(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), "wb")

        def write(data: bytes | memoryview) -> None:
            with _named(path, "written"):
                file.write(data)

        try:
            yield write
            with _named(path, "written"):
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):  # closing flushes once more what could not be written
                file.close()

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is no such file."""
        path = self._path(name)
        with _named(path, "read"):
            return path.stat().st_size if path.is_file() else None

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """Return some bytes of a file."""
        path = self._path(name)
        found, filled = bytearray(stop - start), 0
        with _named(path, "read"):
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError as error:
                raise CheckpointError(f"{path}: no such checkpoint") from error
            with file:
                file.seek(start)
                while count := file.readinto(memoryview(found)[filled:]):
                    filled += count
        return found[:filled] if filled < len(found) else found

    def rename(self, name: str, new: str) -> None:
        """Rename a file or a folder."""
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

    def delete_folder(self, name: str) -> None:
        """Delete a folder and its files."""
        path = self._path(name)
        with _named(path, "deleted"):
            shutil.rmtree(path)

    def _path(self, name: str) -> Path:
        """Return a path, and refuse links on the way from the storage to it."""
        path = self._new(name)
        refuse_link(path)
        return path

    def _new(self, name: str) -> Path:
        """Return the path of a file that is replaced as a whole, and refuse links on the way to it."""
        path = self.folder / name
        for link in (self.folder, *([path.parent] if "/" in name else [])):
            refuse_link(link)
        return path


class RemoteStorage:
    """A `Storage` behind a URL: a folder, or objects with a common name prefix.

    Args:
        system: An fsspec file system.
        folder: The folder in this file system.
        url: URL of the folder, for messages.
    """

    def __init__(self, system: Any, folder: str, url: str) -> None:
        self._system = system
        self._folder = folder.rstrip("/")
        self._secret_url = url
        self._url = redacted(url.rstrip("/"))
        protocols = system.protocol if isinstance(system.protocol, list | tuple) else (system.protocol,)
        self._puts_whole = not WHOLE_PUTS.isdisjoint(protocols)

    def where(self, name: str = "") -> str:
        """Return the URL of a file, or of the folder, without passwords."""
        return f"{self._url}/{name}" if name else self._url

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files and folders, sorted."""
        with self._translated(self.where(folder), "read"):
            self._system.invalidate_cache()
            try:
                found = self._system.ls(self._path(folder) if folder else self._folder, detail=False)
            except FileNotFoundError:
                return []
        return sorted(PurePosixPath(path).name for path in found)

    def write(self, name: str, data: bytes) -> None:
        """Put an object, or write a file under a temporary name and rename it; then check its size."""
        self._put(name, len(data), lambda path: self._system.pipe_file(path, data))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Write a temporary file on this machine, and upload it when it is complete."""
        with self._temporary_file(name) as path:
            with self._on_this_machine(name), path.open("wb") as file:
                yield file
            self._put(name, path.stat().st_size, lambda target: self._system.put_file(str(path), target))

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """Download a file to a temporary one on this machine."""
        with self._temporary_file(name) as path:
            with self._translated(self.where(name), "read"):
                try:
                    self._system.get_file(self._path(name), str(path))
                except FileNotFoundError as error:
                    raise CheckpointError(f"{self.where(name)}: no such checkpoint") from error
            yield path

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        """Write a file piece by piece; then check its size. Many file systems keep a few MB of it in memory."""
        path, where = self._path(name), self.where(name)
        with self._translated(where, "written"):
            if not self._puts_whole:
                self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            file = self._system.open(path, "wb")
        num_bytes = 0

        def write(data: bytes | memoryview) -> None:
            nonlocal num_bytes
            with self._translated(where, "written"):
                file.write(data)
            num_bytes += len(data)

        try:
            yield write
        except BaseException:
            with contextlib.suppress(Exception):  # what is closed here is partial, and no checkpoint lists it
                file.close()
            raise
        with self._translated(where, "written"):
            file.close()
            self._check_size(path, num_bytes)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is no such file."""
        with self._translated(self.where(name), "read"):
            self._system.invalidate_cache()
            try:
                found: int = self._system.size(self._path(name))
            except FileNotFoundError:
                return None
        return found

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """Return some bytes of a file."""
        with self._translated(self.where(name), "read"):
            try:
                return bytearray(
                    self._system.cat_file(self._path(name), start=start, end=stop) if stop > start else b""
                )
            except FileNotFoundError as error:
                raise CheckpointError(f"{self.where(name)}: no such checkpoint") from error

    def rename(self, name: str, new: str) -> None:
        """Rename a file or a folder; object stores copy it and delete the original."""
        path = self._path(name)
        with self._translated(self.where(name), "renamed"):
            self._system.mv(path, self._path(new), **({"recursive": True} if self._system.isdir(path) else {}))

    def delete(self, name: str) -> None:
        """Delete a file."""
        with self._translated(self.where(name), "deleted"):
            self._system.rm_file(self._path(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder and its files."""
        with self._translated(self.where(name), "deleted"):
            self._system.invalidate_cache()
            self._system.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _put(self, name: str, num_bytes: int, put: Callable[[str], object]) -> None:
        """Put an object, or put a file under a temporary name and rename it; then check its size.

        Args:
            name: The name of the file.
            num_bytes: Its size.
            put: Writes the file to a path of the file system.
        """
        parent, _, file = name.rpartition("/")
        path, temporary = self._path(name), self._path(f"{parent}/.{file}.{os.getpid()}.tmp".lstrip("/"))
        with self._translated(self.where(name), "written"):
            if self._puts_whole:
                put(path)
                self._check_size(path, num_bytes)
                return
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                put(temporary)
                self._check_size(temporary, num_bytes)
                self._move(temporary, path, num_bytes)
            finally:
                with contextlib.suppress(Exception):  # after a successful rename it no longer exists
                    self._system.rm_file(temporary)

    @contextlib.contextmanager
    def _temporary_file(self, name: str) -> Iterator[Path]:
        """Return the path of an empty file on this machine, which is deleted after the `with` block."""
        with self._on_this_machine(name):
            descriptor, text = tempfile.mkstemp(prefix="ist-", suffix=f"-{name.rpartition('/')[2]}")
            os.close(descriptor)
        try:
            yield Path(text)
        finally:
            with contextlib.suppress(OSError):
                Path(text).unlink()

    @contextlib.contextmanager
    def _on_this_machine(self, name: str) -> Iterator[None]:
        """Turn an error of this machine's disk into ours, which names the folder of temporary files."""
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"{self.where(name)}: cannot be written: its copy on this machine, in {tempfile.gettempdir()} "
                f"(TMPDIR), fails: {error.strerror or error}"
            ) from error

    def _move(self, temporary: str, path: str, num_bytes: int) -> None:
        try:
            self._system.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):  # some file systems move by copying, and may leave a partial copy
                self._check_size(path, num_bytes)
            raise
        self._check_size(path, num_bytes)

    def _check_size(self, path: str, num_bytes: int) -> None:
        """Check that a newly written file is complete; delete an incomplete one."""
        self._system.invalidate_cache()
        size = self._system.info(path).get("size")
        if size is not None and size != num_bytes:
            self._system.rm_file(path)
            raise OSError(f"only {size} of {num_bytes} bytes were written")

    @contextlib.contextmanager
    def _translated(self, where: str, what: str) -> Iterator[None]:
        """Turn any file system's error into ours; each file system has its own classes of errors."""
        try:
            yield
        except RunFolderError:
            raise
        except ImportError as error:  # some file systems import their libraries on first use
            reason = redacted(str(error), self._secret_url)
            raise ConfigError(f"'checkpoint.storage': {where}: {reason}") from _safe_cause(error, self._secret_url)
        except Exception as error:
            reason = redacted(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}", self._secret_url)
            raise RunFolderError(f"{where}: cannot be {what}: {reason}") from _safe_cause(error, self._secret_url)


def run_storage(storage: str | None, folder: Path) -> Storage:
    """Open the storage of a run's checkpoints.

    Args:
        storage: `checkpoint.storage`; None: the run folder.
        folder: The run folder.

    Raises:
        ConfigError: fsspec cannot open the URL, or a package for its protocol is missing.
    """
    return LocalStorage(folder / "checkpoints") if storage is None else open_storage(storage, folder.resolve().name)


def is_url(storage: str) -> bool:
    """Return whether `checkpoint.storage` is a URL rather than a folder."""
    return "://" in storage or "::" in storage


def open_storage(storage: str, name: str) -> Storage:
    """Open a run's part of a storage.

    Args:
        storage: A folder or an fsspec URL (`checkpoint.storage`).
        name: Name of the run folder.

    Raises:
        ConfigError: fsspec cannot open the URL, or a package for its protocol is missing.
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
            f"'checkpoint.storage' is '{redacted(storage)}', but a package is missing: {reason}"
        ) from _safe_cause(error, url)
    except Exception as error:
        reason = redacted(str(error), url)
        raise ConfigError(
            f"'checkpoint.storage' is '{redacted(storage)}', which fsspec cannot open: {reason}"
        ) from _safe_cause(error, url)
    if isinstance(system, LocalFileSystem):
        return LocalStorage(Path(folder))
    return RemoteStorage(system, folder, url)


@contextlib.contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Turn an error of the operating system into ours, which names the file."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be {what}: {error.strerror or error}") from error


def refuse_link(path: Path) -> None:
    """Check that a file or folder of a run is not a symbolic link.

    Raises:
        RunFolderError: It is a symbolic link.
    """
    if path.is_symlink():
        raise RunFolderError(
            f"{path}: is a symbolic link to {path.readlink()}; links inside a run folder are not followed: replace the "
            "link by the files (to save checkpoints elsewhere, set checkpoint.storage)"
        )


_TEMPORARY = re.compile(
    r"\.(config\.yaml|metrics\.jsonl|result\.json|model\.safetensors|(worker-\d{4}\.)?round-\d{8}\.safetensors)\.\d+\.tmp"
    r"|\.shared-[0-9a-f]{8}"
)


def sweep(storage: Storage) -> None:
    """Delete temporary files of killed processes; ignore files that cannot be deleted.

    Raises:
        RunFolderError: The storage cannot be read.
    """
    for name in storage.names():
        if _TEMPORARY.fullmatch(name):
            with contextlib.suppress(RunFolderError):
                storage.delete(name)


def _safe_cause(error: Exception, url: str) -> Exception | None:
    """Return the error as a cause for a traceback, or None if the URL contains a password that it may quote."""
    return None if holds_secret(url) else error


def write_atomically(path: Path, data: bytes, private: bool = False) -> None:
    """Write a file completely, or not at all.

    Args:
        path: The file.
        data: Its contents.
        private: Whether only the owner may read it (mode 600).

    Raises:
        OSError: It cannot be written; an existing file is unchanged.
    """
    with atomic_file(path, private) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when the `with` block ends, and is deleted if the block fails.

    Args:
        path: The file.
        private: Whether only the owner may read it (mode 600).

    Raises:
        OSError: It cannot be written; an existing file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600 if private else 0o666
        )
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
