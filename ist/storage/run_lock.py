"""The lock of a run folder: only one process at a time writes into it.

Where it sits: code that creates a run folder, resumes from a checkpoint or records a run holds the lock
(`ist/storage/run_folder.py`, `ist/runs/open.py`, `ist/cli/main.py`).
Law: if two processes want to write into one folder, one of them ends with an error that names the other. A killed
process does not block the next one, because the kernel releases its lock.
Not here: checkpoints outside the run folder (`checkpoint.storage`), which have no lock.
"""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from ist.errors import RunFolderError

_log = logging.getLogger(__name__)

LOCK = "run.lock"
WAIT_S = 3.0
"""Seconds to wait for a process that is ending; a restarted job may start before the earlier one has exited."""

_POLL_S = 0.05


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder within the context; the lock file names the holder.

    If the file system has no locks, log a warning and continue without one. NFS locks work between machines; those of
    other shared file systems may work only within one machine.

    Args:
        folder: An existing folder.

    Raises:
        RunFolderError: Another process holds the lock, or the folder is not writable.
    """
    path = folder / LOCK
    descriptor = _locked(path)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # before releasing it: a waiting process then sees no file, and creates a new one
                path.unlink()
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be created or written: {error.strerror or error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _self().encode())
                return descriptor
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise RunFolderError(
                    f"{path.parent}: {_owner(path)} is writing into this run folder: wait until that process has "
                    "ended, or end it"
                ) from error
            time.sleep(_POLL_S)
        except OSError as error:
            os.close(descriptor)
            _log.warning(
                "%s: this file system has no locks (%s): make sure that no other process writes into this folder",
                path, error.strerror or error,
            )  # fmt: skip
            return None
        os.close(descriptor)


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether the open file still has its name: the earlier holder may have deleted it."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _self() -> str:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n"


def _owner(path: Path) -> str:
    """Return the holder of a lock, according to its file."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        pid, host, since = int(owner["pid"]), str(owner["host"]), str(owner["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    who = f"process {pid} on {host}, since {since},"
    if host != socket.gethostname():
        return who
    if pid == os.getpid():
        return "another run of this process"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return f"a child process of {who} which has ended,"
    except OSError:  # it belongs to another user
        pass
    return who
