"""The server: what it answers, what it refuses and with which status, and what holds it up."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from moekit.errors import UserError
from moekit.inference.interface import Hypothesis
from moekit.runs.writer import Written
from moekit.serving import Limits, serve
from moekit.serving.page import Page
from moekit.serving.server import Server

LIMITS = Limits(max_lines=3, max_characters=50, max_waiting=1, max_seconds=5, max_bytes=4096, request_seconds=0.6)
POST = ("Content-Type: application/json",)


class Capitals:
    """Stands for a run: capital letters, "slow" until it is stopped, "fail" at once, and a cut line for "long"."""

    writes, title = "answer", "Translation"
    sources: tuple[str, ...] = ("avl", "tnd")
    targets: tuple[str, ...] = ("avl", "tnd")
    max_input_tokens, beam_size = 1024, 3

    @property
    def directions(self) -> tuple[tuple[str, str], ...]:
        return tuple((source, target) for source in self.sources for target in self.targets if source != target)

    def targets_of(self, source: str) -> tuple[str, ...]:
        return tuple(to for to in self.targets if (source, to) in self.directions) or self.targets

    def __init__(self) -> None:
        self.stopped, self.began = threading.Event(), threading.Event()

    def require_languages(self, source: str, target: str | None) -> None:
        if source not in self.sources or target not in (self.targets or (None,)):
            raise UserError("The tokenizer must know the language.")

    def write(
        self,
        lines: Sequence[str],
        source: str,
        target: str | None,
        *,
        n_best: int | None = None,
        watch: Callable[[], None],
    ) -> Written:
        self.began.set()
        if "fail" in lines:
            raise RuntimeError("out of\nmemory")
        try:
            while "slow" in lines:
                watch()
                time.sleep(0.01)
        except BaseException:
            self.stopped.set()
            raise
        texts = [line.upper().replace("|", "\n") for line in lines]
        found = [[Hypothesis(text + "!" * rank, -rank / 2) for rank in range(n_best or 1)] for text in texts]
        return Written(texts, [i for i, x in enumerate(lines) if x == "long"], found)


class Continues(Capitals):
    writes, title, sources, targets = "continuation", "Language modelling", ("en",), ()


def started(writer: Capitals, limits: Limits = LIMITS) -> Server:
    server = Server("127.0.0.1", 0, limits)
    server.open(writer, "my <run>")  # type: ignore[arg-type]
    threading.Thread(target=server.turns.run, daemon=True).start()
    return server


@pytest.fixture
def writer() -> Capitals:
    return Capitals()


@pytest.fixture
def server(writer: Capitals) -> Iterator[Server]:
    server = started(writer)
    yield server
    server.close()


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=10)


def received(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    data = b""
    while chunk := connection.recv(1 << 16):
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert int(headers["content-length"]) == len(body) or (first.startswith("HTTP/1.1 200") and not body)
    return int(first.split()[1]), headers, body


def sent(server: Server, data: bytes) -> tuple[int, dict[str, str], bytes]:
    with connected(server) as connection:
        connection.sendall(data)
        return received(connection)


def request(line: str, *headers: str, body: bytes = b"", host: str | None = "localhost") -> bytes:
    lines = [f"{line} HTTP/1.1", *([] if host is None else [f"Host: {host}"]), *headers]
    if body and not any(header.startswith("Content-Length") for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def asked(server: Server, data: Any, *headers: str, host: str = "localhost") -> tuple[int, dict[str, Any]]:
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    status, _, answer = sent(server, request("POST /generate", *(headers or POST), body=body, host=host))
    return status, json.loads(answer)


def test_answers(server: Server) -> None:
    status, answer = asked(server, {"text": "one <b>|two\r\n\nlong\n", "from": "avl", "to": "tnd"})
    assert status == 200
    assert answer == {"lines": ["ONE <B>\nTWO", "", "LONG"], "cut": [3], "from": "avl", "to": "tnd"}


def test_n_best(server: Server) -> None:
    status, answer = asked(server, {"text": "a\nb", "from": "avl", "to": "tnd", "n_best": 2})
    assert status == 200
    assert answer["lines"] == ["A", "B"]
    assert answer["hypotheses"][1] == [{"text": "B", "score": 0.0}, {"text": "B!", "score": -0.5}]
    for wrong, said in ((4, "got 4"), (0, "got 0"), (True, "got a bool"), ("2", "got a string"), (1.5, "got a float")):
        status, answer = asked(server, {"text": "a", "from": "avl", "to": "tnd", "n_best": wrong})
        assert status == 400
        assert "n_best must be a whole number from 1 to 3, the width of the beam" in answer["error"]
        assert said in answer["error"]


def test_a_language_alone_may_be_left_out() -> None:
    server = started(Continues())
    try:
        assert asked(server, {"text": "a"}) == (200, {"lines": ["A"], "cut": [], "from": "en"})
        status, answer = asked(server, {"text": "a", "to": "en"})
        assert status == 400
        assert "unknown key 'to'" in answer["error"]
    finally:
        server.close()


def test_a_target_alone_may_be_left_out(server: Server) -> None:
    """Where one alone was trained on from the language of the text."""
    assert asked(server, {"text": "a", "from": "tnd"})[1] == {"lines": ["A"], "cut": [], "from": "tnd", "to": "avl"}


def test_health(server: Server) -> None:
    status, headers, body = sent(server, request("GET /health?x=1"))
    assert status == 200
    assert headers["content-type"] == "application/json"
    found = json.loads(body)
    assert found["directions"] == ["avl-tnd", "tnd-avl"]
    assert (found["status"], found["run"], found["from"], found["waiting"]) == ("ok", "my <run>", ["avl", "tnd"], 0)
    assert sent(server, request("HEAD /health"))[2] == b""


GOOD = {"text": "a", "from": "avl", "to": "tnd"}


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        ({**GOOD, "from": "xx"}, 400, "must know the language"),
        ({"text": "a", "to": "kmb"}, 400, "from must be a language: one of avl, tnd"),
        ({**GOOD, "from": ["avl"]}, 400, "from must be a string: got list"),
        ({**GOOD, "text": " \n "}, 400, "text must not be empty"),
        ({"from": "avl", "to": "tnd"}, 400, "text must not be empty"),
        ({**GOOD, "text": None}, 400, "text must be a string"),
        ({**GOOD, "tex": "b"}, 400, "unknown key 'tex'. Did you mean 'text'?"),
        ({**GOOD, "text": "ok\n" + "x" * 51}, 413, "text, line 2 must have at most 50 characters: got 51"),
        ({**GOOD, "text": "a\n" * 4}, 413, "text must have at most 3 lines: got 4"),
        ({**GOOD, "text": "x" * 100_000}, 413, "a request must have at most 4,096 bytes"),
        ({**GOOD, "text": "a\0"}, 400, "text, line 1, character 2: text must be without NUL"),
        ({**GOOD, "text": "a\ud800"}, 400, "half of a surrogate pair, U+D800"),
        (b'{"text": ', 400, "the body must be JSON"),
        (b'{"text": "\xff"}', 400, "the body must be UTF-8: byte 11"),
        (b"[" * 4000, 400, "the body must be"),
        (b"1" * 4096, 400, "the body must be"),
        (b'["text"]', 400, "must be a JSON object"),
        (b"null", 400, "got null"),
    ],
)
def test_bodies_that_are_refused(server: Server, data: Any, status: int, words: str) -> None:
    found, answer = asked(server, data)
    assert (found, answer["status"]) == (status, status)
    assert words in answer["error"]
    assert asked(server, GOOD)[0] == 200


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (request("GET /generate"), 405, "/generate takes POST"),
        (request("DELETE /", *POST, body=b"{}"), 405, "/ takes GET, HEAD: got DELETE"),
        (request("OPTIONS /generate", "Origin: http://evil.example"), 405, "takes POST"),
        (request("GET /../etc/passwd"), 404, "nothing at this path"),
        (request("GET http://localhost/"), 404, "nothing at this path"),
        (request("GET /health", host=None), 400, "one Host header: got 0"),
        (request("GET /health", "Host: 127.0.0.1"), 400, "one Host header: got 2"),
        (request("GET /health", host="evil.example:8765"), 403, "must be this server's"),
        (request("GET /", host="localhost.evil.example"), 403, "must be this server's"),
        (request("GET /", host="localhost@evil.example"), 400, "Host header"),
        (request("GET /", host="[::1"), 400, "Host header"),
        (request("POST /generate", *POST), 411, "Content-Length"),
        (request("POST /generate", *POST, "Transfer-Encoding: chunked"), 411, "Content-Length"),
        (request("POST /generate", *POST, "Content-Length: -1"), 400, "one number of bytes"),
        (request("POST /generate", *POST, "Content-Length: 2", "Content-Length: 3"), 400, "one number of bytes"),
        (request("POST /generate", *POST, "Content-Length: " + "9" * 5000), 413, "at most 4,096 bytes"),
        (request("POST /generate", body=b"{}"), 415, "application/json"),
        (request("POST /generate", "Content-Type: text/plain", body=b"{}"), 415, "application/json"),
        (request("POST /generate", POST[0] + "; charset=utf-16", body=b"{}"), 415, "UTF-8"),
        (request("POST /generate", *POST, "Content-Encoding: gzip", body=b"{}"), 415, "not compressed"),
        (request("POST /generate", *POST, "Origin: http://evil.example", body=b"{}"), 403, "another origin"),
        (request("POST /generate", *POST, "Origin: null", body=b"{}"), 403, "another origin"),
        (request("POST /generate", *POST, "Origin: http://localhost:1", body=b"{}"), 403, "another origin"),
        (request("POST /generate", *POST, "Sec-Fetch-Site: cross-site", body=b"{}"), 403, "another site"),
        (b"no http at all\r\n\r\n", 400, "Bad request"),
        (b"GET / HTTP/9.9\r\n\r\n", 505, "Invalid HTTP version"),
        (request("GET /", *[f"X-{i}: 1" for i in range(200)]), 431, "Too many headers"),
        (b"GET /" + b"x" * 70_000, 414, "Too Long"),
        (b"GET / HTTP/1.1\r\n" + b"X: 1234567890\r\n" * 20_000, 431, ""),
    ],
)
def test_requests_that_are_refused(server: Server, data: bytes, status: int, words: str) -> None:
    found, headers, body = sent(server, data)
    assert found == status, body
    answer = json.loads(body)
    assert words.lower() in answer["error"].lower()
    assert answer["status"] == status
    assert headers["x-content-type-options"] == "nosniff"
    assert ("allow" in headers) == (status == 405)
    assert sent(server, request("GET /health"))[0] == 200


@pytest.mark.parametrize(
    "host", ["localhost:1234", "127.0.0.1", "[::1]:80", "10.0.0.7:8765", "LOCALHOST", "a.localhost"]
)
def test_its_own_names(server: Server, host: str) -> None:
    """Addresses and localhost cannot be rebound; a tunnel may give the server another port."""
    assert sent(server, request("GET /health", host=host))[0] == 200
    assert asked(server, GOOD, *POST, f"Origin: http://{host}", "Sec-Fetch-Site: same-origin", host=host)[0] == 200


def test_expects_continue(server: Server) -> None:
    body = json.dumps(GOOD).encode()
    with connected(server) as connection:
        connection.sendall(request("POST /generate", *POST, "Expect: 100-continue", f"Content-Length: {len(body)}"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert received(connection)[0] == 200


@pytest.mark.parametrize("beginning", [b"", b"GET / HT", request("POST /generate", *POST, "Content-Length: 9")])
def test_a_slow_client_is_told_so(server: Server, beginning: bytes) -> None:
    """Also one that sends a byte now and then."""
    began = time.monotonic()
    with connected(server) as connection:
        connection.sendall(beginning)
        for _ in range(4):
            time.sleep(0.1)
            connection.sendall(b"x")
        status, _, body = received(connection)
    assert status == 408
    assert "did not arrive within 0.6 seconds" in json.loads(body)["error"]
    assert time.monotonic() - began < 5


def test_one_at_a_time_and_a_short_queue(server: Server, writer: Capitals) -> None:
    with connected(server) as first, connected(server) as second:
        first.sendall(request("POST /generate", *POST, body=json.dumps({**GOOD, "text": "slow"}).encode()))
        assert writer.began.wait(5)
        second.sendall(request("POST /generate", *POST, body=json.dumps(GOOD).encode()))
        while server.turns.waiting < 1:
            time.sleep(0.01)
        status, headers, body = sent(server, request("POST /generate", *POST, body=json.dumps(GOOD).encode()))
        assert (status, headers["retry-after"]) == (503, "1")
        assert "too many requests wait: 1 at most" in json.loads(body)["error"]
        assert json.loads(sent(server, request("GET /health"))[2])["waiting"] == 1
        first.close()  # the first hangs up: it stops, and the second has its turn
        assert writer.stopped.wait(5)
        assert received(second)[0] == 200


def test_an_answer_that_takes_too_long(writer: Capitals) -> None:
    server = started(writer, Limits(max_seconds=0.2))
    try:
        status, answer = asked(server, {**GOOD, "text": "slow"})
        assert status == 504
        assert "longer than 0.2 seconds" in answer["error"]
        assert writer.stopped.wait(5)
        assert asked(server, GOOD)[0] == 200
    finally:
        server.close()


def test_a_failure_is_one_line(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    status, answer = asked(server, {**GOOD, "text": "fail"})
    assert status == 500
    assert "memory" not in answer["error"]
    assert capfd.readouterr().err == "error: an answer failed: RuntimeError: out of memory\n"
    assert asked(server, GOOD)[0] == 200


def test_clients_that_leave_are_no_failure(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    for data in (b"", b"GET", request("POST /generate", *POST, "Content-Length: 100", body=b"{"), request("GET /")):
        with connected(server) as connection:
            connection.sendall(data)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
    assert sent(server, request("GET /health"))[0] == 200
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_connections_are_bounded(server: Server) -> None:
    opened = [connected(server) for _ in range(LIMITS.max_waiting + 32)]
    try:
        time.sleep(0.2)
        status, _, body = sent(server, b"")
        assert status == 503
        assert "too many connections" in json.loads(body)["error"]
    finally:
        for connection in opened:
            connection.close()


def test_an_interrupt_refuses_what_waits(server: Server, writer: Capitals) -> None:
    with connected(server) as connection:
        connection.sendall(request("POST /generate", *POST, body=json.dumps({**GOOD, "text": "slow"}).encode()))
        assert writer.began.wait(5)
        server.close()
        status, _, body = received(connection)
    assert status == 503
    assert "the server ends" in json.loads(body)["error"]
    with pytest.raises(ConnectionRefusedError):
        connected(server)


def test_the_page_runs_nothing_but_itself(server: Server) -> None:
    status, headers, body = sent(server, request("GET /"))
    page = body.decode()
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>my &lt;run&gt;</title>" in page
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:,)|https?:|innerHTML|\son\w+=|\sstyle=""", page)
    for control in re.findall(r'<(?:textarea|select) id="(\w+)"', page):
        assert f'<label for="{control}"' in page


def test_a_name_cannot_leave_the_page() -> None:
    page = Page("</script><script>alert(1)//", {"run": "</script><script>alert(1)//", "to": ["<!--"]}).body.decode()
    assert page.count("<script") == 2
    [data] = re.findall(r'<script type="application/json" id="run">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data)["run"].startswith("</script>")


def test_ports_and_bounds_that_are_refused(server: Server) -> None:
    def never() -> Any:
        raise AssertionError("the run is opened once the port is known to be free")

    for port, words in ((server.server_port, "cannot listen on 127.0.0.1, port"), (70_000, "from 0 to 65535")):
        with pytest.raises(UserError, match=words):
            serve(never, "run", port=port)
    with pytest.raises(UserError, match="cannot listen on no such host"):
        serve(never, "run", host="no such host")
    for bound in ({"max_lines": 0}, {"max_seconds": 0.0}, {"max_seconds": float("nan")}, {"max_waiting": -1}):
        with pytest.raises(UserError, match=f"--{next(iter(bound))} must be"):
            Limits(**bound)  # type: ignore[arg-type]


def test_the_page_is_in_the_package() -> None:
    """Whatever lies under moekit is in a wheel (only-include in pyproject.toml)."""
    assert (Path(__file__).resolve().parents[2] / "moekit" / "serving" / "page.html").is_file()
