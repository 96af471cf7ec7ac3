"""Makes replies in one thread, one at a time, in the order in which they were asked for.

The members belong to that thread. What it makes goes to the event loop step by step; whoever stops listening there
ends the reply before its next piece. Knows nothing of HTTP.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from me_local.ensemble import Ensemble
from me_local.errors import MeLocalError
from me_local.reply import Reply, ReplyStream, Step
from me_local.server.metrics import Metrics
from me_local.server.protocol import ApiError, Ask, api_error
from me_local.states import States

log = logging.getLogger(__name__)

_LONGEST_RETRY = 60  # seconds

Event = Step | Reply
Put = Callable[[Event | Exception], object]


class Worker:
    """A queue of at most `queue` replies in front of an ensemble; `cache` is the room for states, in bytes."""

    def __init__(self, ensemble: Ensemble, metrics: Metrics, *, queue: int, cache: int) -> None:
        self.ensemble = ensemble
        self._metrics = metrics
        self._queue = queue
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replies")
        self._turn = asyncio.Lock()  # fair: first come, first served
        self._waiting = 0
        self._draining = False
        self._stream: ReplyStream | None = None
        self._events: asyncio.Queue[Event | Exception] | None = None
        self._made, self._seconds = 0, 0.0
        states = States(cache)
        for member in ensemble.members:
            member.states = states
        metrics.gauge("queue_length", "Replies that wait for their turn", lambda: self._waiting)
        metrics.gauge("running", "Replies that are being made", self._turn.locked)
        metrics.gauge("cache_bytes", "Kept states of members", lambda: states.size)
        metrics.gauge("cache_states", "Kept states of members", lambda: len(states))

    @property
    def draining(self) -> bool:
        """Whether no more replies are begun."""
        return self._draining

    async def reply(self, ask: Ask, *, admitted: bool = False) -> AsyncGenerator[Event, None]:
        """The steps of a reply while they are made, and the reply at the end.

        One that is `admitted` belongs to a request that had its turn, and always finds room in the queue. To close the
        generator ends the reply. Raises ApiError.
        """
        async with self._place(admitted):
            loop = asyncio.get_running_loop()
            events: asyncio.Queue[Event | Exception] = asyncio.Queue()
            try:
                stream = await loop.run_in_executor(self._thread, self._start, ask)
            except MeLocalError as error:
                raise api_error(error) from None
            self._stream, self._events = stream, events
            self._thread.submit(self._pump, stream, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
            try:
                async for event in _until_reply(events):
                    yield event
            finally:
                stream.cancel()

    def drain(self) -> None:
        """Begin no more replies."""
        self._draining = True

    def cancel(self) -> None:
        """End the reply that is being made, and do not wait for its piece."""
        if self._stream and self._events:
            self._stream.cancel()
            self._events.put_nowait(_shutting_down())

    def close(self) -> None:
        """End what is being made, and the thread."""
        self.drain()
        self.cancel()
        self._thread.shutdown()

    @asynccontextmanager
    async def _place(self, admitted: bool) -> AsyncIterator[None]:
        """A place in the queue, and then the turn. Raises ApiError."""
        if not admitted and self._turn.locked() and self._waiting >= self._queue:
            raise ApiError(429, f"{self._waiting} replies are waiting already", code="queue_full", retry=self._retry())
        came = time.monotonic()
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            if self._draining and not admitted:
                raise _shutting_down()
            self._metrics.waited.observe(time.monotonic() - came)
            yield
        finally:
            self._turn.release()

    def _retry(self) -> int:
        """Seconds until half of those that wait should have been served."""
        mean = self._seconds / self._made if self._made else 1.0
        return max(1, min(_LONGEST_RETRY, math.ceil(mean * self._waiting / 2)))

    def _start(self, ask: Ask) -> ReplyStream:
        # A seed asks for a reply that can be had again, and that must not depend on what is in the cache.
        alone = ask.overrides.seed is not None
        raw = isinstance(ask.prompt, str)
        return self.ensemble.stream(ask.prompt, ask.overrides, raw=raw, alone=alone, top=ask.top)

    def _pump(self, stream: ReplyStream, put: Put) -> None:
        """Run a stream to its end; whatever happens, the last event is the reply or a failure."""
        try:
            try:
                for step in stream:
                    put(step)
            finally:
                self._count(stream.reply)
        except Exception as error:
            put(error)
        else:
            put(stream.reply)

    def _count(self, reply: Reply) -> None:
        self._metrics.count(reply)
        self._made, self._seconds = self._made + 1, self._seconds + reply.seconds


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")


async def _until_reply(events: "asyncio.Queue[Event | Exception]") -> AsyncGenerator[Event, None]:
    while True:
        event = await events.get()
        if isinstance(event, MeLocalError):
            raise api_error(event)
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Reply) and event.finish_reason == "cancelled":
            raise _shutting_down()
        yield event
        if isinstance(event, Reply):
            return
