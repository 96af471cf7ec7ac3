"""What stands between an ensemble and a real llama-server in the tests of faults, and breaks answers on demand."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

LIMIT = 30.0  # seconds that anything may take here

Fault = Callable[["Handler", bytes], None]
"""Answers a request, with the real answer in hand, in a way of its own."""


class Between(ThreadingHTTPServer):
    """Passes requests on to `target`; those for `path` meet the `faults` first, one each, and then `always`.

    `seen` has the paths of what was asked; `gone` makes it drop each connection at once.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = target
        self.path = "/completion"
        self.faults: list[Fault | None] = []
        self.always: Fault | None = None
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.reached = threading.Event()  # by a fault
        self.release = threading.Event()  # what hangs
        self.client = httpx.Client(timeout=LIMIT)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def asked(self) -> int:
        """How often it was asked for a prediction."""
        return self.seen.count("/completion")

    def fault(self, path: str) -> Fault | None:
        if path.partition("?")[0] != self.path:
            return None
        return self.faults.pop(0) if self.faults else self.always


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Between

    def do_GET(self) -> None:
        self._pass()

    def do_POST(self) -> None:
        self._pass()

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(self.path)
        self.server.headers.append(dict(self.headers))
        fault = self.server.fault(self.path)
        if fault is not None and self.path.startswith("http://"):  # as a proxy is asked
            fault(self, b"")
            return
        answer = self.server.client.request(
            self.command, self.server.target + self.path, content=body, headers={"Content-Type": "application/json"}
        )
        if fault is None:
            self.answer(answer.content, answer.status_code)
        else:
            self.server.reached.set()
            fault(self, answer.content)

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing is written."""


def status(code: int, content: bytes = b"", **headers: str) -> Fault:
    return lambda handler, _: handler.answer(content, code, **headers)


def content(text: bytes) -> Fault:
    return lambda handler, _: handler.answer(text)


def changed(change: Callable[[Any], Any]) -> Fault:
    """The real answer, in which something is different."""

    def fault(handler: Handler, real: bytes) -> None:
        answer = json.loads(real)
        handler.answer(json.dumps(change(answer) or answer).encode())

    return fault


def dropped(handler: Handler, _: bytes) -> None:
    """The answer is lost, though the server has evaluated everything."""
    handler.close_connection = True


def cut(handler: Handler, real: bytes) -> None:
    """The connection breaks in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(real)))
    handler.end_headers()
    handler.wfile.write(real[: len(real) // 2])
    handler.close_connection = True


def hanging(handler: Handler, _: bytes) -> None:
    """Nothing comes until it is released."""
    handler.server.release.wait(LIMIT)
    handler.close_connection = True


def dripping(handler: Handler, _: bytes) -> None:
    """A byte now and then, for as long as somebody listens."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    try:
        while not handler.server.release.wait(0.05):
            handler.wfile.write(b" ")
    except OSError:
        pass
    handler.close_connection = True


def endless_headers(handler: Handler, _: bytes) -> None:
    """Headers without an end."""
    handler.send_response(200)
    try:
        for number in range(100_000):
            handler.wfile.write(f"X-{number}: {'x' * 100}\r\n".encode())
    except OSError:
        pass
    handler.close_connection = True


def huge(handler: Handler, _: bytes) -> None:
    """An answer of 100 MB."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(100 << 20))
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b" " * (1 << 20))
    except OSError:
        pass
    handler.close_connection = True


@contextmanager
def between(target: str) -> Iterator[Between]:
    server = Between(target)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join(LIMIT)
        server.client.close()
