"""An error that rank 0 finds before the process group is formed, in the store through which ranks find each other.

Only rank 0 checks a run before it starts. Meanwhile the other ranks wait for it. If the check fails, they must hear of
it, and not wait until `pool.timeout_s` is over.

Where it sits: `ist/distributed/process_group.py` publishes and reads the error.
Not here: errors during a run (`failures_published`).
"""

import os
import time
from contextlib import suppress

from torch.distributed import Store  # type: ignore[attr-defined]

from ist.distributed.secret import run_secret, seal, unseal
from ist.errors import StartFailedError, first_line

_HEARING_S = 15.0
_POLL_S = 0.05
_MAX_CHARACTERS = 500
_starts: list[str] = []  # one entry for each start of this process: a program may try again after an error


def begin_start() -> None:
    """Note that this process starts a run; every rank calls it once for each run."""
    _starts.append(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def publish(store: Store, error: BaseException, world_size: int, is_host: bool) -> None:
    """Publish rank 0's error.

    Args:
        store: The store.
        error: The error.
        world_size: The number of ranks.
        is_host: Whether the store ends with this process; then it waits some seconds until all ranks have heard.
    """
    key = _key()
    store.set(key, seal(run_secret(), key, f"{type(error).__name__}: {first_line(error)}"))
    heard = [f"{key}/{rank}" for rank in range(1, world_size)]
    deadline = time.monotonic() + _HEARING_S
    while is_host and not store.check(heard) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def raise_if_failed(store: Store, rank: int) -> None:
    """Raise the error that rank 0 has published for this start, if it has.

    Raises:
        StartFailedError: It has.
    """
    key = _key()
    if not _starts or not store.check([key]):
        return
    text = unseal(run_secret(), key, store.get(key).decode(errors="replace"))
    if text is None:
        return  # a stranger may write to torchrun's store
    with suppress(RuntimeError):  # rank 0 may have ended
        store.set(f"{key}/{rank}", "heard")
    raise StartFailedError(failure_text(text))


def failure_text(cause: str) -> str:
    """Return the message of a rank that hears that rank 0 has failed before the start."""
    text = "".join(letter if letter.isprintable() else " " for letter in cause[:_MAX_CHARACTERS])
    return f"rank 0 failed before the run started: {text}"


def _key() -> str:
    return f"ist/failed/{len(_starts)}/{_starts[-1] if _starts else 0}"
