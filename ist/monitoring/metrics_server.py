"""An HTTP server for a run's metrics that no client can hold up, fill up or have write on the terminal.

`prometheus_client`'s own gives every connection a thread without a limit of time, and prints a traceback where a client
goes away. Where it sits: `ist/monitoring/exporters.py` serves with it.
Not here: what is served (prometheus_client's WSGI application).
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from socketserver import ThreadingMixIn
from threading import BoundedSemaphore, Thread, Timer
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

_REQUEST_S = 10.0
_MOST_REQUESTS = 16


class _Handler(WSGIRequestHandler):
    """One request, which takes at most `_REQUEST_S`; its headers are bounded by http.server, and a body is not read."""

    def handle(self) -> None:
        """Answer, unless the client takes too long."""
        timer = Timer(_REQUEST_S, self._cut_off)
        timer.daemon = True
        timer.start()
        try:
            super().handle()
        finally:
            timer.cancel()

    def _cut_off(self) -> None:
        with suppress(OSError):  # it has ended meanwhile
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Say nothing: stderr is for progress."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = BoundedSemaphore(_MOST_REQUESTS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, or hang up where too many are being answered."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, in the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, or is too slow, is its own affair."""


def start_server(application: Callable[..., Any], host: str, port: int) -> tuple[WSGIServer, Thread]:
    """Serve a WSGI application in a thread until the server is shut down.

    Raises:
        OSError: The address or the port cannot be had.
    """
    server = _Server((host, port))
    server.set_app(application)
    thread = Thread(target=server.serve_forever, name="ist-metrics", daemon=True)
    thread.start()
    return server, thread
