"""Live progress on stderr: a bar on a terminal or in a notebook, otherwise a line every few seconds.

In a Jupyter notebook, the bar is tqdm's.
Where it sits: a callback of every run (`ist/monitoring/observers.py`); reports and plans use its formats of numbers.
Not here: results, which go to stdout (`ist/cli/main.py`), so that a run's output can be piped.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import IO, Any, Literal, Protocol

import rich.progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ist.errors import ConfigError, printable
from ist.monitoring.callback import Callback, Record, RunStart

_LINE_EVERY_S = 5.0
_FAULTS_AT_ONCE = 3
_MOST_COLUMNS = 5


class PlainConsole(Console):
    """A console that prints text literally: no markup such as `[bold]`, no emoji codes, no control characters."""

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, file=file, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into a text; all strings of tables and prints pass through here."""
        return super().render_str(printable(text), **options)


Progress = bool | Literal["tqdm"]
"""How to show progress: not at all, as it suits the output, or as a bar of tqdm."""


def check_progress(progress: Any) -> None:
    """Check a choice of progress.

    Raises:
        ConfigError: It is another value, or tqdm is not installed.
    """
    if not isinstance(progress, bool) and progress != "tqdm":
        raise ConfigError(f"progress is {progress!r}: give True, False or 'tqdm'")
    if progress == "tqdm" and find_spec("tqdm") is None:
        raise ConfigError("progress is 'tqdm', but tqdm is not installed: pip install tqdm")


class _Bar(Protocol):
    """A progress bar."""

    def update(self, done: int, numbers: str) -> None:
        """Show the number of rounds done, and the latest numbers."""
        ...

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        ...

    def close(self) -> None:
        """Remove the bar, or leave it as it is."""
        ...


class _TerminalBar:
    """A bar of rich."""

    def __init__(self, console: Console, label: str, num_rounds: int, first_round: int) -> None:
        self._bar = rich.progress.Progress(
            TextColumn("{task.description}", markup=False), BarColumn(),
            TextColumn("{task.fields[numbers]}", markup=False), TextColumn("left"), TimeRemainingColumn(),
            console=console,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=num_rounds, completed=first_round, numbers="starting")
        self._bar.start()

    def update(self, done: int, numbers: str) -> None:
        self._bar.update(self._task, completed=done, numbers=numbers)

    def print(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


class _TqdmBar:
    """A bar of tqdm: a widget in a notebook that can show widgets, otherwise text."""

    def __init__(self, label: str, num_rounds: int, first_round: int, widget: bool) -> None:
        if widget:
            from tqdm.notebook import tqdm
        else:
            from tqdm.std import tqdm
        self._bar = tqdm(total=num_rounds, initial=first_round, desc=label, unit="round")

    def update(self, done: int, numbers: str) -> None:
        self._bar.set_postfix_str(printable(numbers), refresh=False)
        self._bar.update(done - self._bar.n)

    def print(self, line: str) -> None:
        self._bar.write(printable(line), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class Display(Callback):
    """Shows every record.

    Args:
        progress: How to show progress. True: a bar of rich on a terminal, a bar of tqdm in a notebook if tqdm is
            installed, otherwise lines.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._last_line = float("-inf")
        self._last_fault = float("-inf")
        self._num_hidden_faults = 0
        self._value, self._of_round = "", 0
        self._bar: _Bar | None = None

    def on_start(self, run: RunStart) -> None:
        """Show a bar, if the output can."""
        self._label = printable(run.config["method"])
        self._num_rounds, self._first_round = run.num_rounds, run.first_round
        self._num_workers = run.config["train"]["workers"]
        self._started = time.monotonic()
        console = PlainConsole(stderr=True)
        if self._progress == "tqdm" or (self._progress and console.is_jupyter and find_spec("tqdm") is not None):
            widget = console.is_jupyter and find_spec("ipywidgets") is not None
            self._bar = _TqdmBar(self._label, run.num_rounds, run.first_round, widget)
        elif self._progress and console.is_terminal:
            self._bar = _TerminalBar(console, self._label, run.num_rounds, run.first_round)

    def on_round(self, record: Record) -> None:
        """Show a round; another number of workers than configured is shown too."""
        if not self._progress:
            return
        metric, done = record.get("metric", "accuracy"), record["round"] + 1
        if record.get(metric) is not None:
            self._value, self._of_round = f"  {metric_title(metric)} {format_metric(metric, record[metric])}", done
        self._show_faults(record)
        of_round = f" (round {self._of_round})" if self._value and self._of_round != done else ""
        shown = f"loss {record['loss']:.4f}{self._value}{of_round}  sent {format_bytes(record['sent_bytes'])}"
        if self._num_workers != record["workers"]:
            shown += f"  {record['workers']} of {self._num_workers} workers"
        numbers = f"round {done}/{self._num_rounds}  {shown}"
        if self._bar:
            self._bar.update(done, numbers)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S or done == self._num_rounds:
            self._last_line = now
            left = (now - self._started) / (done - self._first_round) * (self._num_rounds - done)
            self._print(f"{self._label}: {numbers}  left {left:.0f} s")

    def _show_faults(self, record: Record) -> None:
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
            self._bar.print(line)
        else:
            print(printable(line), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the remaining faults, and end the bar."""
        self._show_hidden_faults(0)
        if self._bar:
            self._bar.close()


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


def memory_cells(processes: Mapping[str, Mapping[str, int]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the titles and the rows of a table of memory in MB: a column for each process and a row for each part.

    Args:
        processes: For each process, bytes by part.
    """
    parts = dict.fromkeys(part for process in processes.values() for part in process)
    rows = [(part, *(_megabytes(held[part]) if part in held else "" for held in processes.values())) for part in parts]
    sums = ("sum", *(_megabytes(sum(held.values())) for held in processes.values()))
    return ["", *processes], [*rows, sums]


def memory_tables(title: str, processes: Mapping[str, Mapping[str, int]]) -> Iterator[Table]:
    """Yield tables of `memory_cells`, each as narrow as a terminal."""
    names = list(processes)
    for start in range(0, len(names), _MOST_COLUMNS):
        titles, rows = memory_cells({name: processes[name] for name in names[start : start + _MOST_COLUMNS]})
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for number, name in enumerate(titles):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        yield table


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"
