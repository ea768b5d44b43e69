"""What a launcher (torchrun, Slurm, `ist` itself) told this process: its rank; and that it ends with its launcher.

Where it sits: whoever asks whether this process is a rank asks here. Torch is not imported: errors of the command line
are told by rank too.
Not here: forming the process group (`ist/distributed/process_group.py`), starting ranks (`ist/launch/start.py`).
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time

from ist.errors import ConfigError

PRIVATE_STORE = "IST_STORE"
"""Set by `ist/launch/start.py`: the file in which processes of one machine find each other, instead of at a port."""

LAUNCHER = "IST_LAUNCHED"
"""Set by `ist/launch/start.py`: its process id. It reports the errors of the ranks that it started."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The file in which torchrun, and `ist/launch/start.py`, look for a rank's error."""

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5
_watched: list[int] = []  # the launcher that a thread watches; at most one

_log = logging.getLogger(__name__)


def is_launched() -> bool:
    """Return whether a launcher gave this process a rank.

    Raises:
        ConfigError: RANK and WORLD_SIZE are set, but cannot be a launcher's: they are no numbers, or no address comes
            with them.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    rank, world_size = (_number(name) for name in ("RANK", "WORLD_SIZE"))
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE is {world_size}: ranks are 0 to WORLD_SIZE - 1. {_REMEDY}")
    missing = [name for name in _ADDRESS if name not in os.environ]
    if missing and PRIVATE_STORE not in os.environ and not _has_group():
        raise ConfigError(f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}. {_REMEDY}")
    return True


_REMEDY = (
    "Where no launcher started this process, they are left over in the shell: run 'unset RANK WORLD_SIZE'; else have "
    "the launcher set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun does"
)


def is_rank_zero() -> bool:
    """Return whether this process coordinates: rank 0 of a launched job, or the only process."""
    return not is_launched() or _number("RANK") == 0


def is_started_by_ist() -> bool:
    """Return whether `ist/launch/start.py` of the parent process started this one, and will report its error."""
    return os.environ.get(LAUNCHER) == str(os.getppid()) and ERROR_FILE in os.environ


def is_repeated_elsewhere() -> bool:
    """Return whether another rank on this machine surely finds the same fault in the input, and prints it.

    Variables alone do not show that: they may be left over in a shell. torchrun starts each rank in a session of its
    own, as no shell does; srun gives every task its number.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", *_ADDRESS} <= os.environ.keys() or os.environ["LOCAL_RANK"] == "0":
        return False
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.getsid(0) == os.getpid()
    by_slurm = os.environ.get("SLURM_PROCID", "0") == os.environ["RANK"] != "0" and "SLURM_STEP_ID" in os.environ
    return by_torchrun or by_slurm


def end_with_launcher() -> None:
    """See to it that this process ends when the process that launched it does, whatever ended that one.

    A rank that lives on would train for nobody, and write into a run that somebody resumes. One that a person started,
    with the variables of a launcher, is left alone. A rank of `ist/launch/start.py`
    is killed by the kernel, on Linux; elsewhere, and where another launcher may have started it from a thread that ends
    sooner, a thread looks.
    """
    has_address = PRIVATE_STORE in os.environ or os.environ.keys() >= {*_ADDRESS} or _has_group()
    if _watched or not has_address or not os.environ.keys() >= {"RANK", "WORLD_SIZE"}:
        return
    # Ranks that somebody starts by hand are a shell's children, which may end while they go on (nohup).
    if not os.environ.keys() & {LAUNCHER, "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"}:
        return
    parent = os.getppid()
    if is_started_by_ist() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            return
    elif LAUNCHER in os.environ and PRIVATE_STORE in os.environ and not is_started_by_ist():
        _end(parent)  # it ended before this process could ask
    _watched.append(parent)
    threading.Thread(target=_watch, args=(parent,), name="ist-launcher", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    _end(parent)


def _end(parent: int) -> None:
    _log.error("rank %s: the process that launched it (%s) has ended, and so does this one", os.environ["RANK"], parent)
    os._exit(1)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise ConfigError(f"{name} is '{os.environ[name]}', which is no number. {_REMEDY}") from error


def _has_group() -> bool:
    """Whether the user's own program has formed a process group already: then no address is needed."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_available() and distributed.is_initialized())
