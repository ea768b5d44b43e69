"""The environment variables of a launcher (torchrun, Slurm, or `ist` itself): this process's rank, and its launcher.

Where it sits: code that needs to know whether this process is a rank asks here. It does not import torch, because the
command line needs the rank to print its errors.
Not here: forming the process group (`ist/distributed/process_group.py`), starting ranks (`ist/launch/start.py`).
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from ist.errors import ConfigError

PRIVATE_STORE = "IST_STORE"
"""Set by `ist/launch/start.py`: a file through which processes of one machine find each other, instead of a port."""

LAUNCHER = "IST_LAUNCHED"
"""Set by `ist/launch/start.py`: its process id. That process reports the errors of the ranks that it started."""

START_LIMIT = "IST_MEMORY_LIMIT"
"""Set by `ist/launch/start.py` for a process that it started under a limit: `pool.memory_limit` as it is configured."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Names the file in which torchrun and `ist/launch/start.py` look for a rank's error."""

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5
_watched: list[int] = []  # the launcher that a thread watches; at most one

_log = logging.getLogger(__name__)


def is_launched() -> bool:
    """Return whether a launcher, or the user's program by forming a process group, gave this process a rank.

    Raises:
        ConfigError: RANK and WORLD_SIZE are set, but are not valid numbers, or the rendezvous address is missing.
    """
    if _has_group():
        return True
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    rank, world_size = (_number(name) for name in ("RANK", "WORLD_SIZE"))
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE is {world_size}: ranks are 0 to WORLD_SIZE - 1. {_REMEDY}")
    missing = [name for name in _ADDRESS if name not in os.environ]
    if missing and PRIVATE_STORE not in os.environ:
        raise ConfigError(f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} is missing. {_REMEDY}")
    return True


_REMEDY = (
    "Without a launcher, run 'unset RANK WORLD_SIZE'. With a launcher, set RANK, WORLD_SIZE, MASTER_ADDR and "
    "MASTER_PORT, as torchrun does"
)


def is_rank_zero() -> bool:
    """Return whether this process is the coordinator: rank 0 of a launched job, or the only process."""
    return not is_launched() or own_rank() == 0


def own_rank() -> int:
    """Return the rank of this process in its process group, or the rank that its launcher gave it.

    Raises:
        ConfigError: It has none.
    """
    return _group().get_rank() if _has_group() else _number("RANK")


def world_size() -> int:
    """Return the number of processes in the process group, or the number that the launcher has started.

    Raises:
        ConfigError: There is neither.
    """
    return _group().get_world_size() if _has_group() else _number("WORLD_SIZE")


def ranks_of_node() -> int:
    """Return how many processes the launcher has started on each node: LOCAL_WORLD_SIZE.

    Raises:
        ConfigError: The launcher does not tell, or the nodes have different numbers.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "'pool.ranks_per_worker' is 'node', but LOCAL_WORLD_SIZE, the number of processes of a node, is not set: "
            "start the run with torchrun, or give the number of processes of a worker"
        )
    here, started = _number("LOCAL_WORLD_SIZE"), world_size()
    nodes = _number("GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in os.environ else started // here
    if nodes * here != started:
        raise ConfigError(
            f"'pool.ranks_per_worker' is 'node', but the nodes have different numbers of processes: this one has "
            f"{here} (LOCAL_WORLD_SIZE), and there are {started} on {nodes} nodes: start the same number on each node "
            "(--nproc-per-node), or give the number of processes of a worker, which divides those of every node"
        )
    return here


def is_started_by_ist() -> bool:
    """Return whether the parent process started this one by `ist/launch/start.py` and will report its error."""
    return os.environ.get(LAUNCHER) == str(os.getppid()) and ERROR_FILE in os.environ


def is_repeated_elsewhere() -> bool:
    """Return whether another rank on this machine certainly finds the same mistake in the input and prints it.

    Variables alone do not prove this, because a shell may have kept them. But torchrun starts each rank in its own
    session, which no shell does, and srun numbers its tasks.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", *_ADDRESS} <= os.environ.keys() or os.environ["LOCAL_RANK"] == "0":
        return False
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.getsid(0) == os.getpid()
    by_slurm = os.environ.get("SLURM_PROCID", "0") == os.environ["RANK"] != "0" and "SLURM_STEP_ID" in os.environ
    return by_torchrun or by_slurm


def end_with_launcher() -> None:
    """End this process when its launcher ends, for any reason.

    An orphaned rank would keep training, and write into a run that somebody resumes. A rank that a person started by
    hand is not affected. On Linux, the kernel kills a rank of `ist/launch/start.py`. On other systems and with other
    launchers, which may start a rank from a short-lived thread, a thread polls for the launcher.
    """
    has_address = PRIVATE_STORE in os.environ or os.environ.keys() >= {*_ADDRESS} or _has_group()
    if _watched or not has_address or not os.environ.keys() >= {"RANK", "WORLD_SIZE"}:
        return
    # Ranks started by hand are children of a shell, which may end before them (nohup).
    if not os.environ.keys() & {LAUNCHER, "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"}:
        return
    parent = os.getppid()
    if is_started_by_ist() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            return
    elif LAUNCHER in os.environ and PRIVATE_STORE in os.environ and not is_started_by_ist():
        _end(parent)  # the launcher ended before prctl took effect
    _watched.append(parent)
    threading.Thread(target=_watch, args=(parent,), name="ist-launcher", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    _end(parent)


def _end(parent: int) -> None:
    _log.error("rank %s: exiting, because its launcher (process %s) has ended", os.environ["RANK"], parent)
    os._exit(1)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except KeyError as error:
        raise ConfigError(f"{name} is not set: no launcher started this process. {_REMEDY}") from error
    except ValueError as error:
        raise ConfigError(f"{name} is '{os.environ[name]}': expected a number. {_REMEDY}") from error


def _has_group() -> bool:
    """Whether the user's program has already formed a process group; then no address is needed."""
    distributed = _group()
    return distributed is not None and bool(distributed.is_available() and distributed.is_initialized())


def _group() -> Any:
    """Return torch.distributed if it is imported."""
    return sys.modules.get("torch.distributed")
