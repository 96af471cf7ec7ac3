"""A server around a loaded ensemble: binding, running, and ending within a grace time."""

import asyncio
import http.server
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from me_local.ensemble import Ensemble
from me_local.errors import ConfigError, RunError
from me_local.jsonl import json_text
from me_local.server.app import Access, make_app
from me_local.server.connections import MOST_CONNECTIONS, Connection
from me_local.server.metrics import Metrics
from me_local.server.refusals import ApiError
from me_local.server.worker import Worker

_LARGEST_HEAD = 32 * 2**10  # bytes
_RETRY = 5  # seconds, about, until models are loaded
_CLEANUP = 2  # seconds after the grace time, in which clients are told


@dataclass(frozen=True, slots=True)
class Limits:
    """Replies that may wait; bytes of kept states; seconds for a request, and for running ones at the end.

    `keep_alive` is how many seconds a connection stays open without a request; proxies often keep theirs for 60.
    """

    queue: int = 64
    cache: int = 512 * 2**20
    timeout: float = 600.0
    grace: float = 30.0
    keep_alive: int = 75


class Server(uvicorn.Server):
    """A server for one ensemble. `ready` is called once it listens, `replied` after each reply, in another thread."""

    def __init__(
        self,
        ensemble: Ensemble,
        access: Access,
        limits: Limits,
        ready: Callable[[], None] = lambda: None,
        replied: Callable[[], None] = lambda: None,
    ) -> None:
        metrics = Metrics()
        self._worker = Worker(ensemble, metrics, queue=limits.queue, cache=limits.cache, replied=replied)
        self._grace = limits.grace
        self._ready = ready
        config = uvicorn.Config(
            make_app(self._worker, metrics, access, limits.timeout),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_LARGEST_HEAD,
            limit_concurrency=MOST_CONNECTIONS + 1,
            timeout_graceful_shutdown=round(limits.grace) + _CLEANUP,
            timeout_keep_alive=limits.keep_alive,
        )
        super().__init__(config)

    def serve_on(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT, where this is the main thread, or until `should_exit` is set."""
        if threading.current_thread() is threading.main_thread():
            # uvicorn ends gracefully by a signal and then raises it again, which would make the status that of a kill.
            signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            self.run(sockets=[listener])
        finally:
            self._worker.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin nothing new, and let what is running finish within the grace time."""
        self._worker.drain()
        ending = asyncio.get_running_loop().call_later(self._grace, self._worker.cancel)
        await super().shutdown(sockets)
        ending.cancel()


class Loading:
    """Answers on a socket while the models are loaded: 503, and when to come again. Use as a context manager."""

    def __init__(self, listener: socket.socket) -> None:
        self._server = _LoadingServer(listener.getsockname(), _NotYet, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listener
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Take up no more connections; the socket stays open for whoever comes next."""
        self._server.shutdown()
        self._thread.join()


class _LoadingServer(http.server.HTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a client that goes away is its own affair."""


class _NotYet(http.server.BaseHTTPRequestHandler):
    """The answer to every request, one after the other."""

    timeout = 1.0

    def _refuse(self) -> None:
        body = json_text(ApiError(503, "the models are still being loaded", code="loading").as_dict()).encode()
        self.send_response(503)
        self.send_header("Retry-After", str(_RETRY))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = _refuse  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def bind(host: str, port: int, *, guarded: bool) -> socket.socket:
    """A socket that listens at an address; one that other machines reach must be `guarded`.

    It listens at once, so that a second server of the port fails before it loads models: two may be bound to one. See
    `Loading` for what clients are told until then.

    Raises ConfigError for an address that others reach, RunError where it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}") from None
    except ValueError:  # from the codec of host names
        raise ConfigError(f"--host {host}: not an address or the name of a machine") from None
    if not guarded and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ConfigError(f"--host {host}: other machines can reach it; give --api-key, or --insecure if all may ask")
    # With its protocol named: asyncio turns off Nagle's algorithm, which delays pieces by 40 ms, for TCP alone.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(MOST_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise RunError(f"--host {host} --port {port}: {error.strerror}") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
