"""Exit codes of a command, and the signals that end it.

| exit code | meaning |
| --- | --- |
| 0 | success |
| 1 | the run failed; a killed rank is a failure too |
| 2 | the input is not valid |
| 129, 130, 131, 143 | SIGHUP, SIGINT (Ctrl-C), SIGQUIT or SIGTERM ended the command |

With any code but 0 the command prints a line `error: ...`; for an interrupted run, this line says how to resume it. A
signal that was ignored when the command started (`nohup`, a background job of a script) stays ignored.

Where it sits: `ist/cli/main.py` runs each command inside `stop_signals`; pools and launchers get texts and codes here.
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
"""Signals that end a command and can be caught."""

_NATIVE_CODE_S = 2.0


class Stopped(BaseException):
    """A signal ended this process. Not an `Exception`, so that no handler mistakes it for an ordinary error."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def exit_code(error: ISTError, received: list[signal.Signals]) -> int:
    """Return the exit code of a command that ended with an error.

    Args:
        error: The error.
        received: The stop signals that the command received, from `stop_signals`.
    """
    if isinstance(error, InterruptedRunError):
        return 128 + (received[0] if received else signal.SIGINT)
    return 2 if isinstance(error, ConfigError | DataError | ModelError) else 1


def signal_of(return_code: int) -> signal.Signals | None:
    """Return the signal that ended a child process, from its return code; None if no signal did."""
    number = -return_code if return_code < 0 else return_code - 128
    with suppress(ValueError):
        found = signal.Signals(number)
        return found if return_code < 0 or found in STOP_SIGNALS else None
    return None


def stopped_text(stopped: BaseException, folder: Path | None) -> str:
    """Return the message about a run that a signal ended: which signal, and how to resume the run.

    Args:
        stopped: A `Stopped` or a KeyboardInterrupt.
        folder: The run folder; None: there is no run to resume.
    """
    name = stopped.number.name if isinstance(stopped, Stopped) else "SIGINT"
    what = "interrupted" if name == "SIGINT" else f"ended by {name}"
    return f"{what}. Resume with: {resume_command(folder)}" if folder else what


def resume_command(folder: Path) -> str:
    """Return the command that resumes a run."""
    return f"ist train --resume {shlex.quote(str(folder))}"


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Make stop signals raise `Stopped` in the main thread, except signals that are ignored.

    Python runs a handler only between two of its own instructions. If the main thread stays in native code, for example
    waiting for a peer that does not answer, a thread ends the process.

    Yields:
        The signals received so far, in order.
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
            if signal.getsignal(number) is stop:  # the user's program may have installed its own handler
                signal.signal(number, before[number])
        signal.set_wakeup_fd(former)
        heeded.clear()

    def leave_child() -> None:
        leave()
        _restore(masks)

    # A forked child, such as a data loader's worker, gets the former handlers; until then its signals are blocked.
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
    """Ignore further stop signals, so that the command can print its error."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _restore(masks: list[set[int]]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())


def _end_anyway(read_end: int, received: list[signal.Signals], handler: Callable[..., None]) -> None:
    """End the process if a signal has arrived but its handler does not run."""
    while number := os.read(read_end, 1):
        if number[0] not in STOP_SIGNALS:
            continue
        time.sleep(_NATIVE_CODE_S)
        if not received and signal.getsignal(number[0]) is handler:
            with suppress(OSError):
                print(f"error: ended by {signal.Signals(number[0]).name}", file=sys.stderr, flush=True)
            os._exit(128 + number[0])
    os.close(read_end)
