"""A small process that outlives a Ray driver which ends without a word, and says so.

Ray ends a driver from C++ (no exception, no exit handler) when its cluster is lost, and a driver may be killed; then
the agents of a cluster of its own go on for minutes. Where it sits: `ist/pools/ray_cluster.py` starts it beside every
connection that it makes. It runs by its path and imports nothing but the standard library, so that it costs 10 MB.
Not here: anything while the driver is well; the guard waits on a pipe, and ends when it is told that all is done.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_DONE = b"d"
_GRACE_S = 5.0


@contextlib.contextmanager
def guarded(session: str, last_words: str) -> Iterator[None]:
    """Have a guard for as long as this block lasts.

    Args:
        session: Session folder of the cluster that ends with the driver, all of whose processes have files open there;
            empty: there is none.
        last_words: What the guard prints on stderr if this process ends without leaving the block.
    """
    command = [sys.executable, "-I", __file__, session, last_words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as guard:
        assert guard.stdin is not None
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):  # somebody has killed it: nothing is lost
                guard.stdin.write(_DONE)
                guard.stdin.close()


def _main(session: str, last_words: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == _DONE:
        return
    print(last_words, file=sys.stderr, flush=True)
    os.close(2)  # whoever reads it to its end waits no longer
    if session:
        time.sleep(_GRACE_S)  # most end by themselves
        for pid in _processes_of(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _processes_of(session: str) -> Iterator[int]:
    """Yield the processes that have a file of a session open, where the system tells (Linux)."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(file.readlink()).startswith(f"{session}/") for file in (folder / "fd").iterdir()):
                yield int(folder.name)


if __name__ == "__main__":
    _main(*sys.argv[1:])
