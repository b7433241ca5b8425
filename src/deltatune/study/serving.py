"""A page that shows a running study and updates itself, served to this machine alone.

Two paths are answered, each with what is known here; no part of a request names a file. Another
site's script could reach a local server under a name of its own that it points at this machine (DNS
rebinding), so a request must name this server as its host.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer

from deltatune.core.errors import DeltatuneError, StateError
from deltatune.study.store import Store
from deltatune.study.watching import snapshot

__all__ = ["PageServer"]

HOST = "127.0.0.1"
FRESH = 0.5  # seconds that a look at the store serves all who ask

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src"
    " 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageServer(ThreadingHTTPServer):
    """Serves `/`, the page, and `/state.json`, a `Snapshot`, on 127.0.0.1.

    Args:
        store: of the study.
        port: to listen on; 0 for any that is free.

    Raises:
        StateError: the port cannot be listened on.
    """

    daemon_threads = True

    def __init__(self, store: Store, port: int = 0) -> None:
        self._store, self._lock = store, threading.Lock()
        self._state, self._until = b"", 0.0
        self.page = (Path(__file__).parent / "watch.html").read_bytes()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise StateError(
                f"Cannot serve a page on {HOST}:{port}: {error.strerror}. Give another port, or "
                "none for any that is free."
            ) from error

    def server_bind(self) -> None:
        """Binds the port; looks for no name of this machine, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    @property
    def address(self) -> str:
        """What a browser is given."""
        return f"http://{HOST}:{self.server_port}/"

    @property
    def hosts(self) -> frozenset[str]:
        """What a request may call this server."""
        return frozenset(f"{name}:{self.server_port}" for name in (HOST, "localhost"))

    def state(self) -> bytes:
        """Returns the study at this moment as JSON. Raises DataError if the store is damaged."""
        with self._lock:  # a store is read by one at a time
            if time.monotonic() >= self._until:
                self._state = json.dumps(asdict(snapshot(self._store)), allow_nan=False).encode()
                self._until = time.monotonic() + FRESH
            return self._state


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: PageServer
    server_version, sys_version = "deltatune", ""
    timeout = 10.0  # seconds for a request to come in

    def do_GET(self) -> None:
        """Answers the two paths, to those who mean this server."""
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"This is another host.\n")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html", self.server.page)
        elif self.path == "/state.json":
            try:
                self._answer(HTTPStatus.OK, "application/json", self.server.state())
            except DeltatuneError as error:
                content = json.dumps({"error": str(error)}).encode()
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "application/json", content)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There is / and /state.json.\n")

    def end_headers(self) -> None:
        """Adds what every answer says, those to requests that are refused too."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the terminal shows the study."""

    def _answer(self, code: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
