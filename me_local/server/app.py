"""The routes: from a request to an answer, whole or as server-sent events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from me_local.asking import Ask
from me_local.decoding.reply import Reply
from me_local.errors import MeLocalError
from me_local.jsonl import json_text
from me_local.server.answers import Answer
from me_local.server.guard import Gate, KeyCheck, read_body, refusal
from me_local.server.making import Event
from me_local.server.metrics import Metrics
from me_local.server.protocol import MODEL, ApiError, ChatRequest, CompletionRequest, api_error, model_names, parse
from me_local.server.worker import Worker

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"

T = TypeVar("T")
Asked = ChatRequest | CompletionRequest
Events = AsyncGenerator[tuple[int, Event], None]


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask: with which key, if any; by which further names of this machine; pages of which other origins."""

    key: str | None = None
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()


def make_app(worker: Worker, metrics: Metrics, access: Access, timeout: float) -> Starlette:
    """The application; a request is given up after `timeout` seconds."""
    routes = Routes(worker, metrics, timeout)
    middleware = [Middleware(Gate, metrics, access.hosts, access.origins)]
    if access.origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=["*"], allow_headers=["*"])
        )
    if access.key is not None:
        middleware.append(Middleware(KeyCheck, access.key, ("/v1", "/metrics", "/models", "/chat", "/completions")))
    return Starlette(
        routes=[
            *(route for prefix in ("/v1", "") for route in _api(routes, prefix)),  # some clients leave /v1 out
            Route("/v1/{path:path}", routes.unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Mount("/", StaticFiles(directory=STATIC, html=True)),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _on_http_error, ApiError: _on_api_error},  # type: ignore[dict-item]
    )


def _api(routes: "Routes", prefix: str) -> list[Route]:
    return [
        Route(f"{prefix}/models", routes.models),
        Route(f"{prefix}/models/{{model:path}}", routes.model),
        Route(f"{prefix}/chat/completions", routes.chat, methods=["POST"]),
        Route(f"{prefix}/completions", routes.complete, methods=["POST"]),
    ]


class Routes:
    """What each path answers."""

    def __init__(self, worker: Worker, metrics: Metrics, timeout: float) -> None:
        self._worker = worker
        self._ensemble = worker.ensemble
        self._metrics = metrics
        self._timeout = timeout

    async def models(self, _: Request) -> Response:
        """GET /v1/models: the ensemble, and each of its members."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in model_names(self._ensemble)]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["model"]
        if name not in model_names(self._ensemble):
            raise ApiError(404, "there is no such model", param="model", code="model_not_found")
        return JSONResponse(self._model(name))

    async def unknown(self, request: Request) -> Response:
        """All else below /v1."""
        path = request.url.path.removeprefix("/v1")
        allowed = {"/chat/completions": "POST", "/completions": "POST", "/models": "GET, HEAD"}.get(path)
        if allowed:
            raise ApiError(405, f"only {allowed} is answered here", headers={"Allow": allowed})
        raise ApiError(404, f"there is no {request.method} of this path", code="unknown_path")

    async def health(self, _: Request) -> Response:
        """GET /health: 503 once the server is shutting down."""
        draining = self._worker.draining
        return JSONResponse({"status": "shutting down" if draining else "ok"}, 503 if draining else 200)

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._respond(request, ChatRequest)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._respond(request, CompletionRequest)

    def _model(self, name: str) -> dict[str, Any]:
        config = self._ensemble.config
        described: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": MODEL}
        if name == MODEL:
            described["strategy"], described["unit"] = config.strategy, config.unit
            described["max_tokens"] = config.max_tokens
            described["seed"] = config.seed
            described["members"] = [
                {
                    "name": member.name,
                    "weight": settings.weight,
                    "n_ctx": member.n_ctx,
                    "sampling": asdict(settings.sampling),
                }
                for member, settings in zip(self._ensemble.members, config.members, strict=True)
            ]
        return described

    async def _respond(self, request: Request, kind: type[Asked]) -> Response:
        try:
            return await self._answer(request, parse(kind, await read_body(request)))
        except MeLocalError as error:
            return refusal(api_error(error))
        except ApiError as error:
            return refusal(error)
        except Exception as error:
            return refusal(_unexpected(error))

    async def _answer(self, request: Request, asked: Asked) -> Response:
        asks = asked.asks(self._ensemble)
        logprobs = asked.logprobs is not None and asked.logprobs is not False
        chat, calls = isinstance(asked, ChatRequest), isinstance(asked, ChatRequest) and asked.may_call
        answer = Answer(asked.model, chat=chat, logprobs=logprobs, n=asked.n or 1, tools=calls)
        events = self._events(asks)
        if not asked.stream:
            replies = await _while_there(request, _replies(events))
            return JSONResponse(answer.whole(replies))
        first = await _while_there(request, anext(events))
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(_lines(answer, first, events, chat=isinstance(asked, ChatRequest), usage=usage))

    async def _events(self, asks: Sequence[Ask]) -> Events:
        """What happens to all choices, each with its index. Raises ApiError."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        made = self._worker.replies(asks)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(made, None)
                if event is None:
                    return
                yield event
        except TimeoutError:
            raise ApiError(504, f"not finished within {self._timeout:g} s (--timeout)", code="timeout") from None
        finally:
            await made.aclose()


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


async def _lines(
    answer: Answer, first: tuple[int, Event], events: Events, *, chat: bool, usage: bool
) -> AsyncGenerator[str, None]:
    """The chunks of an answer as server-sent events; a failure is the last of them."""
    replies: dict[int, Reply] = {}
    offsets: dict[int, int] = {}  # of the choices that have begun, in characters
    try:
        async for index, event in _chained(first, events):
            if index not in offsets:
                offsets[index] = 0
                if chat:
                    yield _line(answer.opening(index))
            if isinstance(event, Reply):
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
        yield _line(_unexpected(error).as_dict())
    finally:
        await events.aclose()


async def _chained(first: tuple[int, Event], rest: Events) -> AsyncIterator[tuple[int, Event]]:
    yield first
    async for event in rest:
        yield event


async def _replies(events: Events) -> list[Reply]:
    return _in_order({index: event async for index, event in events if isinstance(event, Reply)})


def _in_order(replies: Mapping[int, Reply]) -> list[Reply]:
    return [replies[index] for index in sorted(replies)]


async def _while_there(request: Request, work: Awaitable[T]) -> T:
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


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json_text(chunk, compact=True)}\n\n"


def _unexpected(error: Exception) -> ApiError:
    """An error of this program; its text may have a prompt in it, so only its kind is told."""
    log.error("%s while answering", type(error).__name__)
    log.debug("in full", exc_info=error)
    return ApiError(500, f"an error of the server ({type(error).__name__}); its log at -vv has more")


async def _on_api_error(_: Request, error: ApiError) -> Response:
    return refusal(error)


async def _on_http_error(_: Request, error: HTTPException) -> Response:
    response = refusal(ApiError(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response
