"""`serve`: the HTTP server. What it lets through is bounded in size and in time, and errors are JSON."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moekit.atomic import reason
from moekit.errors import UserError
from moekit.runs.writer import Writer
from moekit.serving.origins import require_own_host, require_same_origin
from moekit.serving.page import Page
from moekit.serving.requests import Limits, RefusedError, parsed
from moekit.serving.turns import GoneError, Turns
from moekit.terminal import visible

_METHODS = {"/": ("GET", "HEAD"), "/health": ("GET", "HEAD"), "/generate": ("POST",)}
_HEADER_BYTES = 1 << 16
_LINGER_SECONDS = 2.0
_SPARE_CONNECTIONS = 32
_POLICY = "default-src 'none'; frame-ancestors 'none'"


def serve(
    opened: Callable[[], Writer],
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    limits: Limits | None = None,
    ready: Callable[[Server], None] = lambda server: None,
) -> None:
    """Answer requests until an interrupt.

    ``GET /`` is a page, ``GET /health`` says what is served, and ``POST /generate`` answers ``{"text": ...,
    "from": ..., "to": ...}`` with ``{"lines": [...], "cut": [...]}``: a text for each line, with its line breaks, and
    the numbers of the lines that were too long and were cut. With ``"n_best": 3`` there are ``"hypotheses"`` too: for
    each line a list of ``{"text": ..., "score": ...}``, best first.

    Args:
        opened: opens the run; called once the port is known to be free.
        name: what the run is called.
        host: address to listen on.
        port: port to listen on; 0 = any that is free.
        limits: bounds of requests.
        ready: told when requests are answered.

    Raises:
        UserError: the address cannot be used, or the run writes no text.
    """
    server = Server(host, port, limits or Limits())
    try:
        writer = opened()
        server.open(writer, name)
        languages = f"{', '.join(writer.sources)}{' to ' + ', '.join(writer.targets) if writer.targets else ''}"
        print(f"{visible(name)} ({writer.title}: {languages}) answers at {server.url}", flush=True)
        if not _is_loopback(server.server_address[0]):
            print("Whoever reaches this machine can use it: --host 127.0.0.1 keeps it to this machine.", flush=True)
        print("Ctrl-C ends it.", flush=True)
        ready(server)
        server.turns.run()
    finally:
        server.close()


class Server(ThreadingHTTPServer):
    """The socket, and a thread for each connection; the model runs in the thread that calls ``turns.run``.

    Args:
        host: address to listen on.
        port: port to listen on; 0 = any that is free.
        limits: bounds of requests.

    Raises:
        UserError: the address cannot be used.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, limits: Limits) -> None:
        if not 0 <= port <= 65535:
            raise UserError(f"--port must be from 0 to 65535: got {port}.")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.host, self.limits = host, limits
        self.turns = Turns(limits.max_waiting, limits.max_seconds)
        self.writer: Writer
        self.name, self.page = "", Page("", {})
        self._connections, self._idle = 0, threading.Condition()
        self._thread: threading.Thread | None = None
        super().__init__((host, port), _Handler, bind_and_activate=False)
        self._claim(host, port, self.server_bind)

    def _claim(self, host: str, port: int, what: Callable[[], None]) -> None:
        try:
            what()
        except (OSError, UnicodeError) as error:
            self.server_close()
            why = reason(error) if isinstance(error, OSError) else "it is no address"
            raise UserError(f"cannot listen on {host}, port {port}: {why}. Give another --port or --host.") from None

    def server_bind(self) -> None:
        """Bind, without asking a name server for the own name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def url(self) -> str:
        """The address of the page."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def open(self, writer: Writer, name: str) -> None:
        """Take requests, which are answered by `writer`."""
        self.writer, self.name = writer, name
        self.page = Page(name, self.described())
        self._claim(self.host, self.server_port, self.server_activate)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def described(self) -> dict[str, Any]:
        """What is served, as ``GET /health`` says it."""
        return {
            "status": "ok",
            "run": self.name,
            "writes": self.writer.writes,
            "title": self.writer.title,
            "from": list(self.writer.sources),
            "to": list(self.writer.targets),
            "directions": [f"{source}-{target}" for source, target in self.writer.directions],
            "waiting": self.turns.waiting,
            "max_lines": self.limits.max_lines,
            "max_characters": self.limits.max_characters,
            "max_input_tokens": self.writer.max_input_tokens,
        }

    def close(self) -> None:
        """Refuse what waits, give its threads a moment to say so, and free the port."""
        self.turns.close()
        if self._thread is not None:
            self.shutdown()
        self.server_close()
        with self._idle:
            self._idle.wait_for(lambda: not self._connections, timeout=1.0)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, unless there are too many."""
        with self._idle:
            full = self._connections >= self.limits.max_waiting + _SPARE_CONNECTIONS
            self._connections += not full
        if not full:
            super().process_request(request, client_address)
            return
        body = _json({"error": "too many connections are open. Try again later.", "status": 503})
        head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        with contextlib.suppress(OSError):
            request.settimeout(0.1)
            request.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._idle:
                self._connections -= 1
                self._idle.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line what went wrong; a client that has left did nothing wrong."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(
                f"error: a request failed: {type(error).__name__}: {visible(str(error))}", file=sys.stderr, flush=True
            )


class _Bounded(io.RawIOBase):
    """What a client sends, up to a number of bytes and a moment: one byte now and then does not hold a thread."""

    def __init__(self, connection: socket.socket, seconds: float, size: int) -> None:
        self._connection, self._end, self._left = connection, time.monotonic() + seconds, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self._left <= 0:
            raise RefusedError(413, "the request is too large.")
        self._connection.settimeout(left)
        read = self._connection.recv_into(buffer, min(len(buffer), self._left))
        self._left -= read
        return read


class _Handler(BaseHTTPRequestHandler):
    """One request of a connection, which is closed after it."""

    server: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        limits = self.server.limits
        self.rfile.close()
        bounded = _Bounded(self.connection, limits.request_seconds, _HEADER_BYTES + limits.max_bytes)
        self.rfile = io.BufferedReader(bounded)
        self.requestline, self.request_version, self.command = "", "HTTP/1.1", ""
        self._unread = False

    def version_string(self) -> str:
        """The Server header."""
        return "moekit"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: they hold the user's text."""

    def handle(self) -> None:
        self.close_connection = True
        try:
            self._one_request()
        except RefusedError as refused:
            self._refuse(refused)
        except TimeoutError:
            seconds = self.server.limits.request_seconds
            self._refuse(RefusedError(408, f"the request did not arrive within {seconds:g} seconds."))
        except (GoneError, ConnectionError):
            pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by `parse_request` for lines and headers that are no HTTP."""
        self.request_version = "HTTP/1.1"
        self._unread = True
        raise RefusedError(code, (message or HTTPStatus(code).phrase).rstrip(".") + ".")

    def handle_expect_100(self) -> bool:
        """Nothing is asked for before the headers are looked at."""
        return True

    def _one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(_HEADER_BYTES + 1)
        if len(self.raw_requestline) > _HEADER_BYTES:
            self.send_error(414)
        if not self.raw_requestline.strip() or not self.parse_request():
            return
        self.close_connection = True
        self._unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        require_own_host(self.headers.get_all("Host", []), self.server.host)
        path = self.path.partition("?")[0]
        if path not in _METHODS:
            raise RefusedError(404, f"there is nothing at this path. There are: {', '.join(_METHODS)}.")
        if self.command not in _METHODS[path]:
            allowed = ", ".join(_METHODS[path])
            raise RefusedError(405, f"{path} takes {allowed}: got {self.command[:20]}.", {"Allow": allowed})
        if path == "/":
            self._send(200, "text/html; charset=utf-8", self.server.page.body, self.server.page.policy)
        elif path == "/health":
            self._send_json(200, self.server.described())
        else:
            self._generate()

    def _generate(self) -> None:
        server = self.server
        require_same_origin(self.headers)
        request = parsed(self._body(), server.writer, server.limits)
        written = server.turns.ask(
            lambda watch: server.writer.write(
                request.lines, request.source, request.target, watch=watch, n_best=request.n_best
            ),
            self._has_left,
        )
        answer: dict[str, Any] = {
            "lines": written.texts,
            "cut": [number + 1 for number in written.cut],
            "from": request.source,
        }
        if request.n_best is not None:
            answer["hypotheses"] = [[asdict(found) for found in texts] for texts in written.hypotheses]
        self._send_json(200, answer if request.target is None else {**answer, "to": request.target})

    def _body(self) -> bytes:
        if self.headers.get_content_type() != "application/json" or "Content-Type" not in self.headers:
            raise RefusedError(415, "Content-Type must be application/json.")
        if self.headers.get_content_charset("utf-8") != "utf-8" or "Content-Encoding" in self.headers:
            raise RefusedError(415, "the body must be UTF-8, and not compressed.")
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            raise RefusedError(411, "the request must have a Content-Length.")
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
            raise RefusedError(400, "Content-Length must be one number of bytes.")
        size, most = lengths[0].lstrip("0") or "0", self.server.limits.max_bytes
        if len(size) > 15 or int(size) > most:
            raise RefusedError(413, f"a request must have at most {most:,} bytes: got {size[:16]}.")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self.rfile.read(int(size))
        if len(body) < int(size):
            raise ConnectionAbortedError
        self._unread = False
        return body

    def _has_left(self) -> bool:
        try:
            self.connection.setblocking(False)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _refuse(self, refused: RefusedError) -> None:
        with contextlib.suppress(OSError):
            self._send_json(refused.status, {"error": str(refused), "status": refused.status}, refused.headers)
            if self._unread:
                self._linger()

    def _linger(self) -> None:
        """Read what is still on its way: to close before would take the answer away from the client."""
        self.connection.shutdown(socket.SHUT_WR)
        end, left = time.monotonic() + _LINGER_SECONDS, 16 * self.server.limits.max_bytes
        while left > 0 and (seconds := end - time.monotonic()) > 0:
            self.connection.settimeout(seconds)
            data = self.connection.recv(1 << 16)
            if not data:
                return
            left -= len(data)

    def _send_json(self, status: int, data: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        self._send(status, "application/json", _json(data), _POLICY, headers)

    def _send(self, status: int, kind: str, body: bytes, policy: str, headers: Mapping[str, str] | None = None) -> None:
        self.connection.settimeout(self.server.limits.request_seconds)
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
            "Connection": "close",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        try:
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except TimeoutError:
            raise ConnectionAbortedError from None


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"


def _is_loopback(host: Any) -> bool:
    return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
