"""Start the ranks of one machine, wait for them, and end them together.

Where it sits: `ist/launch/start.py` passes the commands, and turns failed ranks into the error that is reported.
Law: when `run_ranks` returns or raises, no process that it started is alive. If this process is killed, the ranks end
by themselves (`ist/distributed/environment.py`).
Not here: several machines (torchrun).
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ist.errors import PoolError

_Process: TypeAlias = "subprocess.Popen[bytes]"

_POLL_S = 0.02
_SETTLE_S = 1.0
_GRACE_S = 5.0


@dataclass(frozen=True)
class Death:
    """How a rank ended unsuccessfully.

    Attributes:
        rank: The rank.
        return_code: Its exit code, or minus the number of the signal that killed it.
        was_terminated: Whether this launcher had already terminated it, because another rank had failed.
        was_paused: Whether it was stopped (SIGSTOP) when another rank failed; known on Linux only.
    """

    rank: int
    return_code: int
    was_terminated: bool
    was_paused: bool


def run_ranks(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> list[Death]:
    """Run one process per rank until all have succeeded, or until one has failed; then end the others.

    Each process is in its own session: signals from a terminal reach only this process, which then ends the ranks.

    Args:
        commands: The command line of every rank.
        environments: The complete environment of every rank.

    Returns:
        The ranks that failed, in the order in which they ended.

    Raises:
        PoolError: The system could not start a process.
    """
    running: dict[int, _Process] = {}
    deaths: list[Death] = []
    try:
        for rank, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            running[rank] = _start(rank, command, environment)
        while running and not deaths:
            deaths += _reap(running)
            time.sleep(_POLL_S)
        # Wait a moment for ranks that failed as a consequence, or that are the cause and end later.
        settled = time.monotonic() + _SETTLE_S
        while running and time.monotonic() < settled:
            deaths += _reap(running)
            time.sleep(_POLL_S)
        paused = {rank for rank, process in running.items() if _is_paused(process.pid)}
        return deaths + _end(running, paused)
    finally:
        _end(running, set())


def _start(rank: int, command: Sequence[str], environment: Mapping[str, str]) -> _Process:
    try:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    except OSError as error:
        raise PoolError(f"rank {rank} could not be started: {error}") from error


def _reap(running: dict[int, _Process], terminated: bool = False, paused: Set[int] = frozenset()) -> list[Death]:
    """Remove processes that have ended from `running`, and return those that failed."""
    ended = {rank: code for rank, process in running.items() if (code := process.poll()) is not None}
    for rank in ended:
        del running[rank]
    return [Death(rank, code, terminated, rank in paused) for rank, code in ended.items() if code != 0]


def _end(running: dict[int, _Process], paused: Set[int]) -> list[Death]:
    """End all running ranks and their child processes; return those that failed."""
    deaths: list[Death] = []
    try:
        _signal(running, signal.SIGTERM)
        _signal(running, signal.SIGCONT)  # a paused process cannot end
        deadline = time.monotonic() + _GRACE_S
        while running and time.monotonic() < deadline:
            deaths += _reap(running, terminated=True, paused=paused)
            time.sleep(_POLL_S)
    finally:  # also after a second signal
        _signal(running, signal.SIGKILL)
        for process in running.values():
            process.wait()
        deaths += _reap(running, terminated=True, paused=paused)
    return deaths


def _signal(running: Mapping[int, _Process], number: signal.Signals) -> None:
    for process in running.values():
        with suppress(ProcessLookupError):  # it has ended in the meantime
            os.killpg(process.pid, number)


def _is_paused(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False
