"""One process at a time writes into a run folder.

Where it sits: whoever makes a run folder, goes back to a checkpoint or records a run holds its lock meanwhile
(`ist/storage/run_folder.py`, `ist/runs/open.py`, `ist/cli/main.py`).
Law: of two processes that write into one folder at once, one ends with an error that names the other. A process that is
killed leaves nothing that would keep the next one out: the kernel lets go of its lock.
Not here: the storage of checkpoints elsewhere (`checkpoint.storage`), which has no locks.
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
"""How long to wait for a process that is ending: who starts a run anew does so before the last one is quite gone."""

_POLL_S = 0.05


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a run folder's lock for a while; its file says who does.

    On a file system without locks a warning says so, and nothing is held. NFS has locks between machines, and other
    shared file systems may have them on each machine alone.

    Args:
        folder: An existing folder.

    Raises:
        RunFolderError: Another process holds it, or the folder is not writable.
    """
    path = folder / LOCK
    descriptor = _locked(path)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # while it is still ours: who waits for it sees that it is gone, and makes another
                path.unlink()
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be made or written: {error.strerror or error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _self().encode())
                return descriptor
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise RunFolderError(
                    f"{path.parent}: {_owner(path)} is writing into it, and only one process may: wait until that has "
                    "ended, or end it"
                ) from error
            time.sleep(_POLL_S)
        except OSError as error:
            os.close(descriptor)
            _log.warning(
                "%s: this file system has no locks (%s): see to it that no other process writes into this folder",
                path, error.strerror or error,
            )  # fmt: skip
            return None
        os.close(descriptor)


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether the file is still under its name: who held it before may have deleted it."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _self() -> str:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n"


def _owner(path: Path) -> str:
    """Return who holds a lock, as far as its file says."""
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
        return f"a process that was started by {who} which has ended,"
    except OSError:  # somebody else's
        pass
    return who
