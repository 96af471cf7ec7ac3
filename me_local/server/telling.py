"""What happens to the replies of a request, as the lines of a stream, or together once all have ended."""

from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

from me_local.decoding.reply import Reply
from me_local.echoes import Echo
from me_local.jsonl import json_text
from me_local.server.answers import Answer
from me_local.server.making import Event
from me_local.server.messages_answers import MessageAnswer
from me_local.server.refusals import ApiError, unexpected
from me_local.server.responses_answers import ResponseAnswer
from me_local.server.streams import chained

Events = AsyncGenerator[tuple[int, Event], None]
Beating = AsyncGenerator[tuple[int, Event] | None, None]


async def lines(
    answer: Answer, first: tuple[int, Event] | None, events: Beating, *, chat: bool, usage: bool
) -> AsyncGenerator[str, None]:
    """The chunks of an answer as server-sent events; a failure is the last of them."""
    replies: dict[int, Reply] = {}
    offsets: dict[int, int] = {}  # of the choices that have begun, in characters
    try:
        async for heard in chained(first, events):
            if heard is None:
                yield ": there is more to come\n\n"
                continue
            index, event = heard
            if index not in offsets:
                offsets[index] = 0
                if chat:
                    yield _line(answer.opening(index))
            if isinstance(event, Echo):
                yield _line(answer.echo(index, event))
                offsets[index] += len(event.text)
            elif isinstance(event, Reply):
                replies[index] = event
                yield _line(answer.end(index, event))
            else:
                for chunk in answer.pieces(index, event, offsets[index]):
                    yield _line(chunk)
                offsets[index] += len(event.text)
        if usage:
            yield _line(answer.total(_in_order(replies)))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _line(error.as_dict())
    except Exception as error:
        yield _line(unexpected(error).as_dict())
    finally:
        await events.aclose()


async def told(
    answer: MessageAnswer | ResponseAnswer, first: tuple[int, Event] | None, events: Beating
) -> AsyncGenerator[str, None]:
    """The events of an answer in another protocol; a failure is the last of them."""
    try:
        for line in answer.opening():
            yield line
        async for heard in chained(first, events):
            for line in _lines_of(answer, heard):
                yield line
    except ApiError as error:
        for line in answer.failure(error):
            yield line
    except Exception as error:
        for line in answer.failure(unexpected(error)):
            yield line
    finally:
        await events.aclose()


def _lines_of(answer: MessageAnswer | ResponseAnswer, heard: tuple[int, Event] | None) -> Iterator[str]:
    if heard is None:
        return iter((answer.waiting(),))
    _, event = heard
    assert not isinstance(event, Echo)  # of no conversation
    return answer.end(event) if isinstance(event, Reply) else answer.piece(event)


async def heard_of(events: Events) -> tuple[dict[int, Echo], list[Reply]]:
    """The echoes by their indices, and the replies."""
    echoes: dict[int, Echo] = {}
    replies: dict[int, Reply] = {}
    async for index, event in events:
        if isinstance(event, Echo):
            echoes[index] = event
        elif isinstance(event, Reply):
            replies[index] = event
    return echoes, _in_order(replies)


def _in_order(replies: Mapping[int, Reply]) -> list[Reply]:
    return [replies[index] for index in sorted(replies)]


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json_text(chunk, compact=True)}\n\n"
