"""Live progress on stderr: a bar on a terminal, otherwise a line every few seconds.

Where it sits: an observer of a run (`ist/monitoring/observers.py`); reports and plans use its formats of numbers.
Not here: results, which go to stdout (`ist/cli/main.py`), so that a run's output can be piped.
"""

import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ist.errors import printable

_LINE_EVERY_S = 5.0
_FAULTS_AT_ONCE = 3


class PlainConsole(Console):
    """A console that prints text literally: no markup such as `[bold]`, no emoji codes, no control characters."""

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, file=file, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into a text; all strings of tables and prints pass through here."""
        return super().render_str(printable(text), **options)


class Display:
    """Shows every record; an `Observer` (`ist/monitoring/observers.py`).

    Args:
        label: Name of the run.
        num_rounds: Number of rounds of the run.
        first_round: Number of rounds that are already done.
        enabled: Whether to show anything.
        num_workers: Configured number of workers; another number of workers in a round is shown.
    """

    def __init__(
        self, label: str, num_rounds: int, first_round: int, enabled: bool, num_workers: int | None = None
    ) -> None:
        self._label = printable(label)
        self._num_rounds = num_rounds
        self._first_round = first_round
        self._num_workers = num_workers
        self._enabled = enabled
        self._started = time.monotonic()
        self._last_line = float("-inf")
        self._last_fault = float("-inf")
        self._num_hidden_faults = 0
        self._value, self._of_round = "", 0
        self._bar: Progress | None = None
        console = PlainConsole(stderr=True)
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(),
                TextColumn("{task.fields[numbers]}", markup=False), TextColumn("left"), TimeRemainingColumn(),
                console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(self._label, total=num_rounds, completed=first_round, numbers="starting")
            self._bar.start()

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a round."""
        if not self._enabled:
            return
        metric, done = record.get("metric", "accuracy"), record["round"] + 1
        if record.get(metric) is not None:
            self._value, self._of_round = f"  {metric_title(metric)} {format_metric(metric, record[metric])}", done
        self._show_faults(record)
        of_round = f" (round {self._of_round})" if self._value and self._of_round != done else ""
        numbers = (
            f"round {done}/{self._num_rounds}  loss {record['loss']:.4f}{self._value}{of_round}  "
            f"sent {format_bytes(record['sent_bytes'])}"
        )
        if self._num_workers not in (None, record["workers"]):
            numbers += f"  {record['workers']} of {self._num_workers} workers"
        if self._bar:
            self._bar.update(self._task, completed=done, numbers=numbers)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S or done == self._num_rounds:
            self._last_line = now
            left = (now - self._started) / (done - self._first_round) * (self._num_rounds - done)
            self._print(f"{self._label}: {numbers}  left {left:.0f} s")

    def _show_faults(self, record: Mapping[str, Any]) -> None:
        """Show which workers were left out of a round; of many, the first few and the number of the others."""
        faults = record.get("lost", [])
        if not faults:
            return
        now = time.monotonic()
        if now - self._last_fault < _LINE_EVERY_S:
            self._num_hidden_faults += len(faults)
            return
        self._last_fault = now
        for fault in faults[:_FAULTS_AT_ONCE]:
            self._print(
                f"{self._label}: round {record['round'] + 1}: worker {fault['worker']} was left out ({fault['kind']}): "
                f"{(fault['reason'].splitlines() or ['?'])[0]}"
            )
        self._show_hidden_faults(len(faults[_FAULTS_AT_ONCE:]))

    def _show_hidden_faults(self, more: int) -> None:
        hidden, self._num_hidden_faults = self._num_hidden_faults + more, 0
        if hidden:
            self._print(f"{self._label}: workers were left out {hidden} more times")

    def _print(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            print(printable(line), file=sys.stderr, flush=True)

    def saved(self, rounds_done: int) -> None:
        """Ignore checkpoints."""

    def close(self) -> None:
        """Show the remaining faults, and remove the bar."""
        self._show_hidden_faults(0)
        if self._bar:
            self._bar.stop()


def metric_title(name: str) -> str:
    """Return a metric's title in tables: 'P@1' for 'precision_at_1'."""
    return name.replace("precision_at_", "P@").replace("_", " ") if name != "rmse" else "RMSE"


def format_metric(name: str, value: float) -> str:
    """Format a metric's value; a fraction becomes a percentage."""
    return f"{value:.2%}" if name == "accuracy" or name.startswith("precision_at_") else f"{value:.4f}"


def format_ratio(ratio: float) -> str:
    """Format a ratio with three significant digits, or without decimals from 1,000 on."""
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"


def format_bytes(count: float) -> str:
    """Format a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
