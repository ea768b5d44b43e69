"""The observers of a run: display, TensorBoard, Prometheus.

Where it sits: `ist/runs/open.py` opens the observers in the process that records the run, `ist/runs/recorder.py` sends
them every record.
Not here: what they show (`ist/monitoring/display.py`; `ist/monitoring/exporters.py`, which is imported only if
configured).
"""

import errno
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, Protocol

from ist.config.schema import Config
from ist.distributed.environment import is_rank_zero
from ist.errors import ConfigError, ISTError, PoolError, first_line
from ist.monitoring.display import Display
from ist.storage.run_folder import RunFolder


class Observer(Protocol):
    """An observer of a run."""

    def show(self, record: Mapping[str, Any]) -> None:
        """Receive the record of a round, which is a line of metrics.jsonl."""
        ...

    def saved(self, rounds_done: int) -> None:
        """Receive the number of rounds after which a checkpoint was saved."""
        ...

    def close(self) -> None:
        """Receive the end of the run."""
        ...


def check_observers(config: Config) -> None:
    """Check, before anything starts, that the configured observers can be used.

    Raises:
        ConfigError: A package is missing, or `watch.metrics_host` is not an address of this machine.
        PoolError: The port is in use.
    """
    watch = config.watch
    for package, wanted, key in (
        ("tensorboard", watch.tensorboard, "'watch.tensorboard' is true"),
        ("prometheus_client", watch.metrics_port is not None, f"'watch.metrics_port' is {watch.metrics_port}"),
    ):
        if wanted and find_spec(package) is None:
            raise ConfigError(f"{key}, but {package} is not installed: pip install 'ist[watch]'")
    if watch.metrics_port is not None and is_rank_zero():
        _check_port(watch.metrics_host, watch.metrics_port)


def open_observers(
    config: Config, folder: RunFolder | None, num_rounds: int, first_round: int, progress: bool
) -> list[Observer]:
    """Open the observers of a run; only in the process that records the run.

    Args:
        config: The configuration of the run.
        folder: The run folder, for TensorBoard's files and the records of earlier rounds, after `RunFolder.rewind`.
        num_rounds: Number of rounds of the run.
        first_round: Number of rounds that are already done.
        progress: Whether to show progress.

    Returns:
        The observers; the caller closes each of them at the end.

    Raises:
        ConfigError: A package is missing, or there is no folder for TensorBoard.
        PoolError: The port is in use.
        RunFolderError: TensorBoard's files cannot be written.
    """
    watch = config.watch
    with ExitStack() as opened:
        observers: list[Observer] = []
        if watch.tensorboard:
            if folder is None:
                raise ConfigError("'watch.tensorboard' is true, but the run has no folder to write to: give run_dir")
            from ist.monitoring.exporters import TensorBoard

            observers.append(TensorBoard(folder.path / "tensorboard", first_round))
            opened.callback(observers[-1].close)
        if watch.metrics_port is not None:
            observers.append(_serve_metrics(config, folder, num_rounds, first_round, progress))
            opened.callback(observers[-1].close)
        observers.append(Display(config.method, num_rounds, first_round, progress, config.train.workers))
        opened.pop_all()
    return observers


def _serve_metrics(
    config: Config, folder: RunFolder | None, num_rounds: int, first_round: int, progress: bool
) -> Observer:
    from ist.monitoring.exporters import Prometheus

    host, port = config.watch.metrics_host, config.watch.metrics_port
    assert port is not None
    name = folder.path.resolve().name if folder else config.name
    try:
        server = Prometheus(config, name, num_rounds, first_round, folder.records() if folder else [])
        server.serve(host, port)
    except OSError as error:
        raise _refused(host, port, error) from error
    if progress or port == 0:
        print(f"metrics: {server.url}", file=sys.stderr, flush=True)
    return server


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _refused(host, port, error) from error
    except ValueError as error:  # not a valid name in the domain name system
        raise ConfigError(
            f"'watch.metrics_host' is '{host}', which is not a host name or address: {first_line(error)}"
        ) from error


def _refused(host: str, port: int, error: OSError) -> ISTError:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"'watch.metrics_host' is '{host}', but this machine cannot listen on this address ({error.strerror}): "
            "give one of its addresses, or 0.0.0.0 for all"
        )
    what = "another program uses it" if error.errno == errno.EADDRINUSE else "this program may not listen on it"
    return PoolError(
        f"'watch.metrics_port' is {port}, but {what} ({error.strerror}): give another port, or 0 for a free one"
    )
