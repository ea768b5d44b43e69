"""Connect to the Ray cluster of a run, or start one on this machine for the run.

Where it sits: `ist/runs/open.py` connects before it creates the pool.
Ray's token authentication protects clusters started here: only users who can read the token file can connect.
Not here: the actors on the cluster (`ist/pools/ray_workers/actors.py`).
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

from ist.config.schema import Config, ranks_per_worker
from ist.errors import PoolError, first_line
from ist.pools.ray_guard import guarded

_CONNECT_TIMEOUT_S = 10.0
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextlib.contextmanager
def connected(config: Config, resume_hint: str = "") -> Iterator[None]:
    """Connect to the Ray cluster at `pool.ray.address`, or to a new one that ends with this block.

    If the process is already connected, that connection is used and stays open. For a new connection, a guard process
    prints a message if this process ends without a Python exception, as it does when Ray loses the cluster.

    Args:
        config: The run's configuration.
        resume_hint: How to resume the run, for the guard's message.

    Raises:
        PoolError: The cluster cannot be reached, refuses the connection, or cannot be started.
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
        # Ray reports lost workers on stdout, but ist prints only results there.
        with guarded(session, _message_of_a_lost_cluster(address, resume_hint)), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        ray.shutdown()
    if session:  # the logs of the run's own cluster; kept if the run fails
        shutil.rmtree(session, ignore_errors=True)


def _session_folder() -> str:
    """Return the session folder of the one-node cluster that this process has started."""
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    return str(Path(node["ObjectStoreSocketName"]).parent.parent)


def _message_of_a_lost_cluster(address: str | None, resume_hint: str) -> str:
    cluster = f"the Ray cluster at {address}" if address else "the run's own Ray cluster"
    return (
        f"error: process {os.getpid()}, which coordinates the run, ended without a Python exception: it was killed, or "
        f"Ray ended it because {cluster} was lost (its GCS or raylet stopped). {resume_hint}".rstrip()
    )


@contextlib.contextmanager
def _own_signal_handling() -> Iterator[None]:
    """Restore the SIGTERM handler that Ray replaces with one that prints a C++ stack and exits with code 15."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if in_main_thread and before is not None:  # None: installed by C code, and Python cannot restore it
            signal.signal(signal.SIGTERM, before)


def _start(config: Config) -> None:
    """Start a cluster on this machine, with resources for all workers, also if the machine has fewer."""
    wanted, actors = config.pool.ray, config.train.workers * ranks_per_worker(config)
    try:
        if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not any(map(os.environ.get, TOKEN_VARIABLES)):
            make_token(Path.home() / ".ray" / "auth_token")
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(actors * wanted.num_cpus)),
            resources={name: actors * amount for name, amount in wanted.resources.items()},
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
        # Ray's error is the same for a wrong token and for other causes, so name all remedies.
        raise PoolError(
            f"could not join the Ray cluster at {address} (pool.ray.address): {first_line(error)}. Set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a copy of the cluster's token file, and check that the "
            f"cluster runs Ray {ray.__version__}"
        ) from error


def _check_reachable(address: str) -> None:
    """Open and close a connection to the cluster first, because Ray would retry an unreachable address for minutes."""
    host, _, port = address.rpartition(":")
    if not host:  # 'auto': Ray searches for a cluster on this machine
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise PoolError(f"could not reach a Ray cluster at {address} (pool.ray.address): {error}") from error


def make_token(path: Path) -> None:
    """Create a token file that only its owner can read, unless the file exists.

    Ray would create it too, but readable by all users.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
