"""The sockets of connections to engines: a wait at one has an end, and is over at once where the user has had enough.

httpcore limits each read by itself, so that an engine that sends a byte now and then would hold a reply for ever.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore

from me_local.model import EvaluationInterruptedError

_LOOK = 0.1  # seconds between two looks at whether the user has had enough


class Patience(threading.local):
    """What the request of this thread waits for: `until` a time of `time.monotonic`, or until it is `interrupted`."""

    def __init__(self) -> None:
        self.until = 0.0
        self.interrupted: Callable[[], bool] = bool


class Stream(httpcore.NetworkStream):
    """A socket; `opened` is when it was connected, by `time.monotonic`."""

    def __init__(self, stream: httpcore.NetworkStream, patience: Patience) -> None:
        self.opened = time.monotonic()
        self._stream = stream
        self._patience = patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Some bytes; raises httpcore.ReadTimeout and EvaluationInterruptedError."""
        while True:
            left = self._patience.until - time.monotonic()
            try:
                return self._stream.read(max_bytes, max(0.001, min(_LOOK, left)))
            except httpcore.ReadTimeout:
                if self._patience.interrupted():
                    raise EvaluationInterruptedError("stopped while an engine was at work") from None
                if left <= _LOOK:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send bytes; raises httpcore.WriteTimeout."""
        self._stream.write(buffer, max(0.001, self._patience.until - time.monotonic()))

    def close(self) -> None:
        """Close it."""
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """The same, encrypted."""
        return Stream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._patience)

    def get_extra_info(self, info: str) -> Any:
        """What is known of the socket."""
        return self._stream.get_extra_info(info)


class Backend(httpcore.NetworkBackend):
    """Opens such sockets."""

    def __init__(self, patience: Patience) -> None:
        self._backend = httpcore.SyncBackend()
        self._patience = patience

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """A connected socket; raises what httpcore raises."""
        stream = self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        return Stream(stream, self._patience)
