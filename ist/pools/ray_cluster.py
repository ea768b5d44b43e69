"""Find the Ray cluster that a run is to use, or start one on this machine for the run.

Ray's token authentication guards the clusters started here: whoever cannot read the token file cannot connect.
Not here: what runs on the cluster (`ist/pools/ray_pool.py`).
"""

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.exceptions import RayError

from ist.config.schema import Config
from ist.errors import PoolError, first_line
from ist.pools.ray_guard import guarded

_KNOCK_S = 10.0
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextlib.contextmanager
def connected(config: Config, go_on: str = "") -> Iterator[None]:
    """Be connected to a Ray cluster: `pool.ray.address`, or one that lasts as long as this block.

    A connection that this process has already is used as it is, and left open. Beside one that is made here, a guard
    says so if the process is ended without a Python exception, which Ray does when the cluster is lost.

    Args:
        config: The run's configuration.
        go_on: How the run is resumed, for the guard's message.

    Raises:
        PoolError: The cluster cannot be reached, refuses this process, or could not be started.
    """
    if ray.is_initialized():
        yield
        return
    address = config.pool.ray.address
    with _own_signal_handling():
        if address is None:
            _start(config)
        else:
            _join(address)
    try:
        session = _session_folder() if address is None else ""
        # Ray reports lost workers on stdout, which is for results.
        with guarded(session, _last_words(address, go_on)), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        ray.shutdown()
    if session:  # logs of a cluster that nobody else used, of a run that went well
        shutil.rmtree(session, ignore_errors=True)


def _session_folder() -> str:
    """Return the folder of the cluster of one node that this process has started."""
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    return str(Path(node["ObjectStoreSocketName"]).parent.parent)


def _last_words(address: str | None, go_on: str) -> str:
    cluster = f"the Ray cluster at {address}" if address else "the run's own Ray cluster"
    return (
        f"error: process {os.getpid()}, which coordinates the run, ended without a Python exception: it was killed, or "
        f"Ray ended it because {cluster} was lost (its GCS or raylet stopped). {go_on}".rstrip()
    )


@contextlib.contextmanager
def _own_signal_handling() -> Iterator[None]:
    """Put back the handler of SIGTERM that Ray replaces: by one that prints a C++ stack and exits with code 15."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if in_main_thread and before is not None:  # None: not Python's, and cannot be set from here
            signal.signal(signal.SIGTERM, before)


def _start(config: Config) -> None:
    """Start a cluster on this machine, with room for all workers whatever the machine has."""
    wanted, workers = config.pool.ray, config.train.workers
    try:
        if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not any(map(os.environ.get, TOKEN_VARIABLES)):
            make_token(Path.home() / ".ray" / "auth_token")
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(workers * wanted.num_cpus)),
            resources={name: workers * amount for name, amount in wanted.resources.items()},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (RuntimeError, OSError, RayError) as error:
        raise PoolError(f"Ray could not be started on this machine: {first_line(error)}") from error


def _join(address: str) -> None:
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, ConnectionError, ValueError, RayError) as error:
        # Ray does not say whether it was refused or met something else.
        raise PoolError(
            f"the Ray cluster at {address} (pool.ray.address) does not take this process: set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN_PATH to a copy of the cluster's token file, and see that a cluster of Ray "
            f"{ray.__version__} is there ({first_line(error)})"
        ) from error


def _check_reachable(address: str) -> None:
    """Knock before Ray does, which would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not host:  # 'auto': Ray looks on this machine
        return
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
    except OSError as error:
        raise PoolError(f"no Ray cluster can be reached at {address} (pool.ray.address): {error}") from error


def make_token(path: Path) -> None:
    """Make a token file that only its owner can read, unless there is one.

    Ray would make it too, readable by everybody.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
