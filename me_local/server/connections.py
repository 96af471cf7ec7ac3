"""Connections that take up room without asking anything: how long, and how many of them.

uvicorn reads HTTP (by h11, which limits the size of a head), and closes connections on which no further request comes.
It waits for ever for a first request, for the rest of a head, and for a reader that has stopped; here these end.
"""

import asyncio
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 256
_HEAD_SECONDS = 10.0  # until the head of a request is complete
_WRITE_SECONDS = 30.0  # until a reader that has stopped goes on


class Connection(H11Protocol):
    """A connection of uvicorn's, with time limits. Where there are too many, the one idle for longest makes room."""

    idle_since = 0.0
    _head: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it up, and close another one if there are too many."""
        super().connection_made(transport)
        self._watch()
        opened = [each for each in self.connections if isinstance(each, Connection) and not each.transport.is_closing()]
        if len(opened) > MOST_CONNECTIONS:
            idle = [other for other in opened if other.idle]
            min(idle, key=lambda other: other.idle_since, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget its time limits."""
        for timer in (self._head, self._write):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Go on reading."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Be idle again; for how long, uvicorn sees to."""
        super().on_response_complete()
        self.idle_since = time.monotonic()

    def pause_writing(self) -> None:
        """Wait for the reader, but not for ever."""
        super().pause_writing()
        self._write = self._write or self.loop.call_later(_WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The reader goes on."""
        super().resume_writing()
        if self._write:
            self._write.cancel()
            self._write = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if self.idle and not self._head:
            self.idle_since = time.monotonic()
            self._head = self.loop.call_later(_HEAD_SECONDS, self.transport.abort)
        elif self._head and not self.idle:
            self._head.cancel()
            self._head = None
