"""How a command ends: exit codes, and the signals that tell it to end.

| exit code | when |
| --- | --- |
| 0 | all is done |
| 1 | the run failed; a rank that was killed is a failure too |
| 2 | the input cannot be run |
| 129, 130, 131, 143 | this command was told to end, by SIGHUP, SIGINT (Ctrl-C), SIGQUIT or SIGTERM |

All but 0 come with a line `error: ...`; for a run that was ended it says how to resume. A signal that was ignored when
the command started (`nohup`, a job in the background of a script) stays ignored.

Where it sits: `ist/cli/main.py` puts `stop_signals` around a command; pools and launchers ask here for texts and codes.
Not here: how ranks are ended (`ist/launch/ranks.py`).
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ist.errors import ConfigError, DataError, InterruptedRunError, ISTError, ModelError

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
"""What tells a command to end, and can be caught."""

_NATIVE_CODE_S = 2.0


class Stopped(BaseException):
    """A signal told this process to end; no `Exception`, so that nothing takes it for an error of its own."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def exit_code(error: ISTError, received: list[signal.Signals]) -> int:
    """Return the exit code of a command that ended with an error.

    Args:
        error: The error.
        received: The signals that told the command to end, as `stop_signals` gives them.
    """
    if isinstance(error, InterruptedRunError):
        return 128 + (received[0] if received else signal.SIGINT)
    return 2 if isinstance(error, ConfigError | DataError | ModelError) else 1


def signal_of(return_code: int) -> signal.Signals | None:
    """Return the signal of which a child process ended, or was told to end, from its return code; None: it was none."""
    number = -return_code if return_code < 0 else return_code - 128
    with suppress(ValueError):
        found = signal.Signals(number)
        return found if return_code < 0 or found in STOP_SIGNALS else None
    return None


def stopped_text(stopped: BaseException, folder: Path | None) -> str:
    """Return what is said of a run that a signal ended: which signal, and how to go on with the run.

    Args:
        stopped: A `Stopped`, or a KeyboardInterrupt.
        folder: The run folder; None: there is nothing to go on with.
    """
    name = stopped.number.name if isinstance(stopped, Stopped) else "SIGINT"
    what = "interrupted" if name == "SIGINT" else f"ended by {name}"
    return f"{what}. Go on with: {resume_command(folder)}" if folder else what


def resume_command(folder: Path) -> str:
    """Return the command that goes on with a run."""
    return f"ist train --resume {shlex.quote(str(folder))}"


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Have the signals that tell a command to end raise `Stopped` in the main thread, except those that are ignored.

    Python runs a handler only between two of its own instructions: where the main thread is in native code for
    longer, such as waiting for a peer that does not answer, the process is ended all the same.

    Returns:
        The signals that have come, in order.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise Stopped(received[-1])

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    former = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    masks: list[set[int]] = []

    def leave() -> None:
        for number in heeded:
            if signal.getsignal(number) is stop:  # the user's program may have set its own since
                signal.signal(number, before[number])
        signal.set_wakeup_fd(former)
        heeded.clear()

    def leave_child() -> None:
        leave()
        _restore(masks)

    # A data loader's worker, forked, ends as it would without this; until that is so it gets no signal.
    os.register_at_fork(
        before=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, heeded)),
        after_in_parent=lambda: _restore(masks),
        after_in_child=leave_child,
    )
    arguments = (read_end, received, stop)
    threading.Thread(target=_end_anyway, args=arguments, name="ist-signals", daemon=True).start()
    for number in heeded:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        leave()
        os.close(write_end)


def ignore_stop_signals() -> None:
    """Let nothing interrupt the last words of a command that is ending."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _restore(masks: list[set[int]]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())


def _end_anyway(read_end: int, received: list[signal.Signals], handler: Callable[..., None]) -> None:
    """End the process where a signal has come and its handler does not run."""
    while number := os.read(read_end, 1):
        if number[0] not in STOP_SIGNALS:
            continue
        time.sleep(_NATIVE_CODE_S)
        if not received and signal.getsignal(number[0]) is handler:
            with suppress(OSError):
                print(f"error: ended by {signal.Signals(number[0]).name}", file=sys.stderr, flush=True)
            os._exit(128 + number[0])
    os.close(read_end)
