"""Who is told about every round: the display, TensorBoard, Prometheus.

Where it sits: `ist/runs/open.py` opens the watchers in the process that records, `ist/runs/recorder.py` tells them.
Not here: what they show (`ist/monitoring/display.py`, `ist/monitoring/exporters.py`, which is imported only where it is
asked for).
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


class Watcher(Protocol):
    """Somebody who is told what a run does."""

    def show(self, record: Mapping[str, Any]) -> None:
        """Take note of a round; the record is the line of metrics.jsonl."""
        ...

    def saved(self, rounds_done: int) -> None:
        """Take note of a checkpoint after so many rounds."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


def check_watch(config: Config) -> None:
    """Check, before anything is started, that whoever is to be told can be.

    Raises:
        ConfigError: A package is missing, or `watch.metrics_host` is no address of this machine.
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


def open_watchers(
    config: Config, folder: RunFolder | None, num_rounds: int, first_round: int, progress: bool
) -> list[Watcher]:
    """Open everybody who is to be told about a run; in the process that records it, and only there.

    Args:
        config: The run.
        folder: Where TensorBoard's files go, and where earlier rounds are read, after `RunFolder.rewind`.
        num_rounds: Rounds of the whole run.
        first_round: Rounds that were done before.
        progress: Whether to show progress.

    Returns:
        The watchers; close each in the end.

    Raises:
        ConfigError: A package is missing, or there is no folder for TensorBoard.
        PoolError: The port is in use.
        RunFolderError: TensorBoard's files cannot be written.
    """
    watch = config.watch
    with ExitStack() as opened:
        watchers: list[Watcher] = []
        if watch.tensorboard:
            if folder is None:
                raise ConfigError("'watch.tensorboard' is true, but the run has no folder to write to: give run_dir")
            from ist.monitoring.exporters import TensorBoard

            watchers.append(TensorBoard(folder.path / "tensorboard", first_round))
            opened.callback(watchers[-1].close)
        if watch.metrics_port is not None:
            watchers.append(_serve_metrics(config, folder, num_rounds, first_round, progress))
            opened.callback(watchers[-1].close)
        watchers.append(Display(config.method, num_rounds, first_round, progress, config.train.workers))
        opened.pop_all()
    return watchers


def _serve_metrics(
    config: Config, folder: RunFolder | None, num_rounds: int, first_round: int, progress: bool
) -> Watcher:
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
    except ValueError as error:  # it cannot be a name of the domain name system
        raise ConfigError(
            f"'watch.metrics_host' is '{host}', which is not a host's name or address: {first_line(error)}"
        ) from error


def _refused(host: str, port: int, error: OSError) -> ISTError:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"'watch.metrics_host' is '{host}', at which this machine cannot listen ({error.strerror}): give one of "
            "its addresses, or 0.0.0.0 for all"
        )
    what = "which another program uses" if error.errno == errno.EADDRINUSE else "where this program may not listen"
    return PoolError(
        f"'watch.metrics_port' is {port}, {what} ({error.strerror}): give another one, or 0 for a free one"
    )
