"""The processes of one machine: started, watched until they are done, and ended together.

Where it sits: `ist/launch/start.py` says what to run, and turns deaths into the error that is told.
Law: when `run_ranks` returns or raises, no process that it started is alive. When this process is killed, they end by
themselves (`ist/distributed/environment.py`).
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
    """How a rank ended.

    Attributes:
        rank: Its number.
        return_code: Its exit code, or minus the number of the signal that killed it.
        was_told: Whether it had been told to end, because another had failed.
        was_paused: Whether it was stopped (SIGSTOP) when another failed; known on Linux.
    """

    rank: int
    return_code: int
    was_told: bool
    was_paused: bool


def run_ranks(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> list[Death]:
    """Run one process a rank until all have ended well, or one has failed and the others are ended.

    Each is in a session of its own: what a terminal sends reaches this process alone, which then ends them.

    Args:
        commands: The command line of every rank.
        environments: The variables of every rank, all of them.

    Returns:
        The ranks that did not end well, in the order in which they ended.

    Raises:
        PoolError: The system starts no more processes.
    """
    running: dict[int, _Process] = {}
    deaths: list[Death] = []
    try:
        for rank, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            running[rank] = _start(rank, command, environment)
        while running and not deaths:
            deaths += _reap(running)
            time.sleep(_POLL_S)
        # What failed because of it, or caused it and takes longer to end, is heard out for a moment.
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


def _reap(running: dict[int, _Process], told: bool = False, paused: Set[int] = frozenset()) -> list[Death]:
    """Take out of `running` those that have ended, and return those that failed."""
    ended = {rank: code for rank, process in running.items() if (code := process.poll()) is not None}
    for rank in ended:
        del running[rank]
    return [Death(rank, code, told, rank in paused) for rank, code in ended.items() if code != 0]


def _end(running: dict[int, _Process], paused: Set[int]) -> list[Death]:
    """End all that run, and what they started; return how those ended that did not end well."""
    deaths: list[Death] = []
    try:
        _signal(running, signal.SIGTERM)
        _signal(running, signal.SIGCONT)  # what is paused cannot end
        deadline = time.monotonic() + _GRACE_S
        while running and time.monotonic() < deadline:
            deaths += _reap(running, told=True, paused=paused)
            time.sleep(_POLL_S)
    finally:  # also where a second signal has come
        _signal(running, signal.SIGKILL)
        for process in running.values():
            process.wait()
        deaths += _reap(running, told=True, paused=paused)
    return deaths


def _signal(running: Mapping[int, _Process], number: signal.Signals) -> None:
    for process in running.values():
        with suppress(ProcessLookupError):  # ended meanwhile
            os.killpg(process.pid, number)


def _is_paused(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False
