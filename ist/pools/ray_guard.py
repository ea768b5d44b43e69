"""The guard: a small process that prints an error message if the Ray driver ends without a Python exception.

When a Ray cluster is lost, Ray ends the driver from C++, without an exception or exit handler; a driver may also be
killed. The processes of the driver's own cluster would then run for minutes, so the guard also ends them.
Where it sits: `ist/pools/ray_cluster.py` starts a guard for every connection that it makes. The guard runs this file as
a script and imports only the standard library, so it needs only 10 MB. While the driver runs, the guard waits on a
pipe; it exits when the driver reports a normal end.
Not here: starting and stopping a cluster normally (`ist/pools/ray_cluster.py`).
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
def guarded(session: str, message: str) -> Iterator[None]:
    """Run a guard process during this block.

    Args:
        session: Session folder of the driver's own cluster, whose processes all have files open there; empty if the
            driver has no cluster of its own.
        message: The message that the guard prints on stderr if this process ends inside the block.
    """
    command = [sys.executable, "-I", __file__, session, message]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as guard:
        assert guard.stdin is not None
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):  # the guard was killed, which does no harm
                guard.stdin.write(_DONE)
                guard.stdin.close()


def _main(session: str, message: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == _DONE:
        return
    print(message, file=sys.stderr, flush=True)
    os.close(2)  # a reader of stderr gets its end now
    if session:
        time.sleep(_GRACE_S)  # most processes end without help
        for pid in _processes_of(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _processes_of(session: str) -> Iterator[int]:
    """Yield the ids of processes that have a file of a session open; on Linux only."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(file.readlink()).startswith(f"{session}/") for file in (folder / "fd").iterdir()):
                yield int(folder.name)


if __name__ == "__main__":
    _main(*sys.argv[1:])
