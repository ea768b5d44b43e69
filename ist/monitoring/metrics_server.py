"""An HTTP server for a run's metrics with limits: no client can block it, exhaust it, or make it print.

`prometheus_client`'s own server starts a thread per connection without a time limit, and prints a traceback when a
client disconnects.

Where it sits: `ist/monitoring/exporters.py` serves metrics with it.
Not here: the served content (prometheus_client's WSGI application).
"""

import errno
import socket
from collections.abc import Callable
from contextlib import suppress
from socketserver import ThreadingMixIn
from threading import BoundedSemaphore, Thread, Timer
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from ist.errors import ConfigError, ISTError, PoolError, first_line

_REQUEST_S = 10.0
_MOST_REQUESTS = 16


class _Handler(WSGIRequestHandler):
    """One request of at most `_REQUEST_S` seconds; http.server limits its headers, and a body is not read."""

    def handle(self) -> None:
        """Answer a request, unless the client is too slow."""
        timer = Timer(_REQUEST_S, self._cut_off)
        timer.daemon = True
        timer.start()
        try:
            super().handle()
        finally:
            timer.cancel()

    def _cut_off(self) -> None:
        with suppress(OSError):  # it has ended in the meantime
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Print nothing: stderr is for progress."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = BoundedSemaphore(_MOST_REQUESTS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a new thread, or close the connection if there are too many requests."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer in the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that disconnect or are too slow."""


def start_server(application: Callable[..., Any], host: str, port: int) -> tuple[WSGIServer, Thread]:
    """Serve a WSGI application in a thread until the server is shut down.

    Raises:
        OSError: The address or the port cannot be used.
    """
    server = _Server((host, port))
    server.set_app(application)
    thread = Thread(target=server.serve_forever, name="ist-metrics", daemon=True)
    thread.start()
    return server, thread


def check_port(host: str, port: int) -> None:
    """Check that this program can listen on an address.

    Raises:
        ConfigError: This machine does not have the address.
        PoolError: The port cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise refused(host, port, error) from error
    except ValueError as error:  # not a valid name in the domain name system
        raise ConfigError(
            f"'watch.metrics_host' is '{host}', which is not a host name or address: {first_line(error)}"
        ) from error


def refused(host: str, port: int, error: OSError) -> ISTError:
    """Return the error that names the key whose value the operating system refuses."""
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"'watch.metrics_host' is '{host}', but this machine cannot listen on this address ({error.strerror}): "
            "give one of its addresses, or 0.0.0.0 for all"
        )
    what = "another program uses it" if error.errno == errno.EADDRINUSE else "this program may not listen on it"
    return PoolError(
        f"'watch.metrics_port' is {port}, but {what} ({error.strerror}): give another port, or 0 for a free one"
    )
