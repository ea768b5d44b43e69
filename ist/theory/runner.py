"""Measure the points of experiments, in several processes, and store the results.

OUT/<experiment>.jsonl has a first line with the settings, and then a line for each finished point, so an interrupted
run continues with the missing points. CSV files and figures are made from it at the end.

Where it sits: `ist/cli/theory.py` calls it.
Not here: the experiments (`experiments/`), the page (`ist/theory/page.py`).
"""

import csv
import importlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ist.config.yaml_text import parse_yaml
from ist.errors import ConfigError, ISTError, RunFolderError
from ist.storage.backend import write_atomically
from ist.theory import EXPERIMENTS
from ist.theory.experiment import Experiment, Point, Row, Section
from ist.theory.quantities.problem import SPHERE, load_problem


@dataclass(frozen=True)
class Done:
    """A finished experiment."""

    name: str
    settings: Mapping[str, Any]
    section: Section


def experiment(name: str) -> Experiment:
    """Return an experiment.

    Raises:
        ConfigError: The name is unknown.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"unknown experiment '{name}': expected one of {', '.join(EXPERIMENTS)}, or 'all'")
    module: Experiment = importlib.import_module(f"ist.theory.experiments.{name}")
    return module


def make_settings(name: str, quick: bool, data: str | None, assignments: Sequence[str]) -> Any:
    """Return an experiment's settings.

    Args:
        name: The experiment.
        quick: Whether to start from its quick settings.
        data: The location of the data set; experiments without one ignore it.
        assignments: Settings 'key=value' with values in YAML.

    Raises:
        ConfigError: A key is unknown or a value impossible.
    """
    module = experiment(name)
    values: dict[str, Any] = dict(module.QUICK) if quick else {}
    if data is not None and "data" in module.Settings.model_fields:
        values["data"] = data if data == SPHERE else str(Path(data).resolve())
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set '{assignment}': expected KEY=VALUE")
        if key not in module.Settings.model_fields:
            raise ConfigError(
                f"--set '{assignment}': the settings of {name} are {', '.join(module.Settings.model_fields)}"
            )
        values[key] = parse_yaml(text, f"--set '{assignment}'")
    try:
        return module.Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{name}: '{where}' is {first['input']!r}: {first['msg']}") from error


def describe_knobs(name: str) -> list[str]:
    """Return a line for each setting of an experiment: its name, its default, its description."""
    fields = experiment(name).Settings.model_fields.items()
    return [f"{key}={field.default}  {field.description or ''}".rstrip() for key, field in fields]


def run_experiments(
    chosen: Mapping[str, Any], out: Path, processes: int, fresh: bool, console: Console
) -> Iterator[Done]:
    """Measure the missing points, write CSV files, and describe the results.

    Args:
        chosen: Settings by experiment.
        out: The folder for files.
        processes: The number of points that are measured at once, each in its own process; 1: in this process.
        fresh: Whether to measure again the points that `out` already has.
        console: Shows the progress.

    Yields:
        Each experiment when it is finished.

    Raises:
        ConfigError: Settings are impossible, or `out` has results with other settings.
        ISTError: A point could not be measured.
        RunFolderError: A file cannot be written.
    """
    points = {name: experiment(name).points(settings) for name, settings in chosen.items()}
    for name, settings in chosen.items():
        if "data" in type(settings).model_fields:
            _check_data(name, settings)
    ready = {
        name: (experiment(name), settings, _Store(out, name, settings, fresh)) for name, settings in chosen.items()
    }
    with _pool(processes) as pool, _progress(console) as progress:
        for name, (module, settings, store) in ready.items():
            store.begin()
            _measure_missing(name, settings, points[name], store, pool, progress)
            rows = store.rows_of(points[name])
            _write_csv(out / f"{name}.csv", rows)
            yield Done(name, settings.model_dump(mode="json"), module.section(settings, rows))


def _check_data(name: str, settings: Any) -> None:
    """Load an experiment's data before any process starts."""
    try:
        for scaling in getattr(settings, "scalings", None) or [settings.scaling]:
            load_problem(settings.data, settings.samples, scaling)
    except ISTError as error:
        raise type(error)(f"{name}: {error}. Alternatively draw inputs from the sphere: --data sphere") from error


def with_measured_before(done: Sequence[Done], out: Path) -> list[Done]:
    """Return these experiments and all others for which `out` has every point, in the order of the page."""
    found = {one.name: one for one in done}
    for name in EXPERIMENTS:
        path = out / f"{name}.jsonl"
        if name in found or not path.exists():
            continue
        module = experiment(name)
        try:
            settings = module.Settings(**json.loads(path.read_text().split("\n", 1)[0])["settings"])
            store = _Store(out, name, settings, fresh=False)
        except (ConfigError, ValueError, KeyError):  # written by another version
            continue
        points = module.points(settings)
        if not store.missing(points):
            section = module.section(settings, store.rows_of(points))
            found[name] = Done(name, settings.model_dump(mode="json"), section)
    return [found[name] for name in EXPERIMENTS if name in found]


class _Store:
    """The results of an experiment: a file that grows by a line for each point."""

    def __init__(self, out: Path, name: str, settings: Any, fresh: bool) -> None:
        self._path = out / f"{name}.jsonl"
        self._out = out
        self._head = {"experiment": name, "settings": settings.model_dump(mode="json")}
        self.rows: dict[str, list[Row]] = {}
        lines = [] if fresh or not self._path.exists() else self._path.read_text().splitlines()
        for number, line in enumerate(lines):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                break  # the line is incomplete: the run was interrupted
            if number == 0:
                self._check(found)
            else:
                self.rows[found["point"]] = found["rows"]

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Return the points without results."""
        return [point for point in points if key_of(point) not in self.rows]

    def rows_of(self, points: Sequence[Point]) -> list[Row]:
        """Return the rows of points with results, in order."""
        return [row for point in points for row in self.rows[key_of(point)]]

    def begin(self) -> None:
        """Rewrite the file, without an incomplete last line."""
        lines = [self._head, *({"point": point, "rows": rows} for point, rows in self.rows.items())]
        with _naming_file(self._path):
            self._out.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add(self, point: Point, rows: Sequence[Row]) -> None:
        """Store the rows of a point."""
        self.rows[key_of(point)] = list(rows)
        with _naming_file(self._path), self._path.open("a") as file:
            file.write(json.dumps({"point": key_of(point), "rows": rows}) + "\n")

    def _check(self, head: Any) -> None:
        if head != self._head:
            before, now = head.get("settings", {}), self._head["settings"]
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            raise ConfigError(
                f"{self._path} has results with other settings ({', '.join(keys)}): give another --out, or --fresh to "
                "replace them"
            )


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Name the file in the error if it cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error


def key_of(point: Point) -> str:
    """Return a point as a line of text."""
    return json.dumps(dict(point), sort_keys=True)


def _measure_missing(
    name: str, settings: Any, points: Sequence[Point], store: _Store, pool: Executor | None, progress: Progress
) -> None:
    bar = progress.add_task(name, total=len(points))
    missing = store.missing(points)
    progress.advance(bar, len(points) - len(missing))
    for point, rows in _results(name, settings, missing, pool):
        store.add(point, rows)
        progress.advance(bar)


def _results(
    name: str, settings: Any, points: Sequence[Point], pool: Executor | None
) -> Iterator[tuple[Point, list[Row]]]:
    """Measure points, and yield each when it is finished."""
    if pool is None:
        for point in points:
            yield point, _measure(name, settings, point)
        return
    futures = {pool.submit(_measure, name, settings, point): point for point in points}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise ISTError(f"{name}: a worker process was killed; run the same command again to continue") from error
    finally:
        for future in futures:
            future.cancel()


def _measure(name: str, settings: Any, point: Point) -> list[Row]:
    return list(experiment(name).measure(settings, point))


@contextmanager
def _pool(processes: int) -> Iterator[Executor | None]:
    if processes == 1:
        yield None
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool
    except BaseException:  # an interrupt must not wait for long points
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent terminates the others


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


def default_processes() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with _naming_file(path), path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
