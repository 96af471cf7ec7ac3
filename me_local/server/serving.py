"""A server around an ensemble: binding, running, signals, and ending within a grace time."""

import asyncio
import http.server
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable

import uvicorn

from me_local.errors import ConfigError, RunError
from me_local.jsonl import json_text
from me_local.server.app import Access, make_app
from me_local.server.connections import MOST_CONNECTIONS, Connection
from me_local.server.keeping import Keeper, Limits
from me_local.server.refusals import ApiError

_LARGEST_HEAD = 32 * 2**10  # bytes
_RETRY = 5  # seconds, about, until models are loaded
_CLEANUP = 2  # seconds after the grace time, in which clients are told


class Server(uvicorn.Server):
    """A server for the ensemble that `keeper` has, which it closes at the end. `ready` is called once it listens."""

    def __init__(
        self, keeper: Keeper, access: Access, limits: Limits, ready: Callable[[], None] = lambda: None
    ) -> None:
        self._keeper = keeper
        self._grace = limits.grace
        self._ready = ready
        self._in_terminal = _has_terminal()
        config = uvicorn.Config(
            make_app(keeper, access, limits.timeout),
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
            self._keeper.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._keeper.begin()
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin nothing new, and let what is running finish within the grace time."""
        self._keeper.drain()
        ending = asyncio.get_running_loop().call_later(self._grace, self._keeper.cancel)
        await super().shutdown(sockets)
        ending.cancel()

    def _hang_up(self) -> None:
        """Reload; or end, where the signal says that the terminal was closed in which the server was started."""
        if self._in_terminal and not _has_terminal():
            self.handle_exit(signal.SIGTERM, None)
        else:
            self._keeper.reload_soon()


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


def _has_terminal() -> bool:
    """Whether this process belongs to a terminal that is there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
