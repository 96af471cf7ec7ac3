"""Streams of events: how they begin, what they say while they wait, and that they end with whoever listens."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from me_local.server.refusals import ApiError

BEAT = 15.0
"""Seconds without a word in a stream, after which it says that it goes on."""

T = TypeVar("T")


class EventStream(StreamingResponse):
    """Server-sent events; however the response ends, what makes them is closed."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[str, None]) -> None:
        super().__init__(lines, headers={"X-Accel-Buffering": "no"})  # nginx would hold pieces back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what is made."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            assert isinstance(self.body_iterator, AsyncGenerator)
            await self.body_iterator.aclose()


async def with_beats(items: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """What comes, and None wherever nothing came for a while, so that nobody takes the connection for a dead one.

    To close it closes the source.
    """
    following: asyncio.Future[T] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(items))
            while not (await asyncio.wait({following}, timeout=BEAT))[0]:
                yield None
            try:
                yield following.result()
            except StopAsyncIteration:
                return
    finally:
        if following:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await items.aclose()


async def chained(first: T, rest: AsyncGenerator[T, None]) -> AsyncIterator[T]:
    """The first, and the rest."""
    yield first
    async for item in rest:
        yield item


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is given up when the client goes away."""

    async def working() -> T:
        return await work

    task, gone = asyncio.create_task(working()), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
