"""Export a run's numbers to TensorBoard and Prometheus.

Where it sits: `ist/monitoring/observers.py` creates these callbacks if they are configured; they need the extra
`watch`.
Not here: the HTTP server (`ist/monitoring/metrics_server.py`), the numbers and their names
(`ist/measurements.py`).
"""

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ist._version import VERSION
from ist.config.methods import method_spec
from ist.errors import ConfigError, RunFolderError
from ist.measurements import FAULTS, MEASUREMENTS, Family
from ist.monitoring.callback import Callback, Record, RunStart
from ist.monitoring.metrics_server import refused, start_server

_FLUSH_EVERY_S = 10


def scalars(record: Record) -> dict[str, float]:
    """Return the numbers of a record by their names in TensorBoard."""
    faults = record.get("lost", [])
    metric = record.get("metric") or "accuracy"
    measured = {"round", *(m.name for m in MEASUREMENTS)}
    numbers = {name: value for name, value in record.items() if type(value) in (int, float)}
    found = {
        **{m.tensorboard: record.get(m.name) for m in MEASUREMENTS if m.tensorboard},
        f"{metric}/test": record.get(metric),
        **{f"{name}/test": value for name, value in numbers.items() if name not in measured},
        **{f"logged/{name}": value for name, value in record.get("logged", {}).items()},
        **{f"workers/{kind}": sum(fault["kind"] == kind for fault in faults) for kind in FAULTS},
    }
    return {name: value for name, value in found.items() if value is not None}


class TensorBoard(Callback):
    """Writes event files to tensorboard/ in the run folder. A step is a round, from 0 as in metrics.jsonl."""

    def on_start(self, run: RunStart) -> None:
        """Open the event files; entries of rounds that will be run again are hidden in existing files.

        Raises:
            ConfigError: TensorBoard cannot be imported, or there is no run folder.
            RunFolderError: The files cannot be written.
        """
        if run.run_dir is None:
            raise ConfigError("'watch.tensorboard' is true, but the run has no folder to write to: give run_dir")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"'watch.tensorboard' is true, but TensorBoard cannot be imported ({error}): pip install 'ist[watch]'"
            ) from error
        self._folder = run.run_dir / "tensorboard"
        with self._translated():
            self._writer = SummaryWriter(str(self._folder), purge_step=run.first_round, flush_secs=_FLUSH_EVERY_S)
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed

    def on_round(self, record: Record) -> None:
        """Write a round's numbers.

        Raises:
            RunFolderError: They cannot be written.
        """
        with self._translated():
            for name, value in scalars(record).items():
                self._writer.add_scalar(name, value, record["round"])

    def on_checkpoint(self, rounds_done: int) -> None:
        """Flush the files up to the checkpoint.

        Raises:
            RunFolderError: They cannot be written.
        """
        with self._translated():
            self._writer.add_scalar("checkpoint/rounds", rounds_done, rounds_done - 1)
            self._writer.flush()

    def close(self) -> None:
        """Write the remaining events."""
        try:
            with self._translated():
                self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Hide the traceback of TensorBoard's own thread; the next call here raises its error again."""
        if not (type(failure.thread).__module__.startswith("tensorboard.") and isinstance(failure.exc_value, OSError)):
            self._hook(failure)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFolderError(f"{self._folder}: cannot be written: {error.strerror or error}") from error


_ABOUT_THE_RUN = (
    Family("ist_rounds", "counter", "Rounds done, since the beginning of the run."),
    Family("ist_rounds_planned", "gauge", "Rounds of the whole run."),
    Family("ist_test_metric", "gauge", "What is reported of the full network on the test data, by name.", "name"),
    Family("ist_bytes", "counter", "Payload bytes: to_workers, from_workers, or of an all_reduce.", "direction"),
    Family("ist_workers_alive", "gauge", "Workers of the last round that were not lost in it; late ones are alive."),
    Family("ist_workers_configured", "gauge", "Workers that are configured."),
    Family("ist_faults", "counter", "Workers that were left out of a round, by kind.", "kind"),
    Family("ist_checkpoint_rounds", "gauge", "Rounds that the newest checkpoint has behind it."),
    Family("ist_last_round_timestamp_seconds", "gauge", "When the last round ended, in seconds since 1970."),
)


def families() -> list[Family]:
    """Return all metrics for Prometheus: those of measured numbers, and those about the run."""
    measured = dict.fromkeys(m.prometheus.family for m in MEASUREMENTS if m.prometheus)
    return [*measured, *_ABOUT_THE_RUN]


Values = dict[str, dict[str, float]]
"""Name of a metric -> value of its label ('' without a label) -> number."""


def add_record(values: Values, record: Record, method: str) -> Values:
    """Return the metrics after one more round.

    Args:
        values: The metrics before the round; not modified.
        record: The round's line of metrics.jsonl.
        method: `Config.method`.
    """
    new: defaultdict[str, dict[str, float]] = defaultdict(dict, {name: dict(now) for name, now in values.items()})

    for measured in MEASUREMENTS:
        shown, value = measured.prometheus, record.get(measured.name)
        if shown is not None and value is not None:
            # A total in a record covers the run so far; for other numbers, a counter adds up the rounds.
            adds = shown.family.kind == "counter" and measured.over_rounds != "total"
            before = new[shown.family.name].get(shown.label, 0) if adds else 0
            new[shown.family.name][shown.label] = before + value

    def add(name: str, amounts: Mapping[str, float]) -> None:
        for label, amount in amounts.items():
            new[name][label] = new[name].get(label, 0) + amount

    to_workers, from_workers = sum(record["bytes_to_worker"]), sum(record["bytes_from_worker"])
    faults = [fault["kind"] for fault in record.get("lost", [])]
    if method_spec(method).has_coordinator:
        add("ist_bytes", {"to_workers": to_workers, "from_workers": from_workers})
    else:
        add("ist_bytes", {"all_reduce": to_workers + from_workers})
    add("ist_faults", {kind: faults.count(kind) for kind in FAULTS})
    if record.get("metric"):
        new["ist_test_metric"] = {record["metric"]: record[record["metric"]]}
    new["ist_rounds"][""] = record["round"] + 1
    new["ist_workers_alive"][""] = record["workers"] - faults.count("lost")
    return dict(new)


class Prometheus(Callback):
    """Serves a run's metrics over HTTP during the run; also a collector of prometheus_client.

    Args:
        host: The address to listen on.
        port: The port; 0 picks a free one.
        announces: Whether to print the URL in any case; a port that was picked is always printed.
    """

    def __init__(self, host: str, port: int, announces: bool = False) -> None:
        self._host, self._port, self._announces = host, port, announces
        self.url = ""

    def on_start(self, run: RunStart) -> None:
        """Start the HTTP server; the counters of a resumed run continue.

        Raises:
            ConfigError: prometheus_client cannot be imported, or this machine does not have the address.
            PoolError: The port cannot be used.
        """
        try:
            import prometheus_client
            from prometheus_client import core
        except ImportError as error:
            raise ConfigError(
                f"'watch.metrics_port' is {self._port}, but prometheus_client cannot be imported ({error}): pip "
                "install 'ist[watch]'"
            ) from error
        self._core = core
        self._method = run.config["method"]
        self._info = {"run": run.name, "method": self._method, "version": VERSION}
        values: Values = {
            "ist_rounds": {"": run.first_round},
            "ist_rounds_planned": {"": run.num_rounds},
            "ist_workers_configured": {"": run.config["train"]["workers"]},
            "ist_faults": dict.fromkeys(FAULTS, 0),
        }
        for record in run.history:
            values = add_record(values, record, self._method)
        if run.first_round:
            values["ist_checkpoint_rounds"] = {"": run.first_round}
        self._values = values  # replaced as a whole, so that a scrape never mixes two rounds
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(self)
        application = prometheus_client.make_wsgi_app(self.registry)
        try:
            self._server, self._thread = start_server(application, self._host, self._port)
        except OSError as error:
            raise refused(self._host, self._port, error) from error
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        if self._announces or self._port == 0:
            print(f"metrics: {self.url}", file=sys.stderr, flush=True)

    def collect(self) -> Iterator[Any]:
        """Yield the current metrics."""
        core = self._core
        yield core.InfoMetricFamily("ist_run", "What is running.", value=self._info)
        values = self._values
        for family in families():
            make = core.CounterMetricFamily if family.kind == "counter" else core.GaugeMetricFamily
            made = make(family.name, family.help, labels=[family.label] if family.label else [])
            for label, value in values.get(family.name, {}).items():
                made.add_metric([label] if family.label else [], value)
            yield made

    def on_round(self, record: Record) -> None:
        """Add a round to the metrics."""
        values = add_record(self._values, record, self._method)
        self._values = values | {"ist_last_round_timestamp_seconds": {"": time.time()}}

    def on_checkpoint(self, rounds_done: int) -> None:
        """Record a checkpoint."""
        self._values = self._values | {"ist_checkpoint_rounds": {"": rounds_done}}

    def close(self) -> None:
        """Stop the HTTP server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
