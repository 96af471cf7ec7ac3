"""Streams that say something while there is nothing to say, so that nobody between takes them for dead."""

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

T = TypeVar("T")

SECONDS = 10.0
"""Without a word, after which a stream says that it waits; a refusal within them is still told by its status."""


async def with_pauses(items: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """What comes, and None each time that nothing has come for SECONDS. To close it closes the source."""
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(items))
            await asyncio.wait([coming], timeout=SECONDS)
            if not coming.done():
                yield None
                continue
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield item
    finally:
        if coming:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await items.aclose()
