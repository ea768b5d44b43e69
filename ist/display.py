"""Live progress on stderr: a bar on a terminal, a line now and then elsewhere.

Results go to stdout (`ist/cli.py`), so a run can be piped.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 5.0


class Display:
    """Shows records as they come.

    Args:
        label: What is running.
        num_rounds: Rounds of the run.
        first_round: Rounds that were done before.
        enabled: False shows nothing.
    """

    def __init__(self, label: str, num_rounds: int, first_round: int, enabled: bool) -> None:
        self._label = label
        self._num_rounds = num_rounds
        self._first_round = first_round
        self._enabled = enabled
        self._started = time.monotonic()
        self._last_line = float("-inf")
        self._accuracy = ""
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"),
                TextColumn("left"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(label, total=num_rounds, completed=first_round, numbers="starting")
            self._bar.start()

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a round."""
        if not self._enabled:
            return
        if record.get("accuracy") is not None:
            self._accuracy = f"  accuracy {record['accuracy']:.2%}"
        done = record["round"] + 1
        numbers = (
            f"round {done}/{self._num_rounds}  loss {record['loss']:.4f}{self._accuracy}  "
            f"sent {format_bytes(record['sent_bytes'])}"
        )
        if self._bar:
            self._bar.update(self._task, completed=done, numbers=numbers)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S or done == self._num_rounds:
            self._last_line = now
            left = (now - self._started) / (done - self._first_round) * (self._num_rounds - done)
            print(f"{self._label}: {numbers}  left {left:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar:
            self._bar.stop()


def format_ratio(ratio: float) -> str:
    """Return a ratio for people, with three digits or all of its whole ones."""
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"


def format_bytes(count: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
