"""The routes: from a request to an answer, whole or as server-sent events."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from me_local.asking import Ask
from me_local.ensemble import Ensemble
from me_local.errors import ConfigError, MeLocalError
from me_local.server.answers import Answer
from me_local.server.fingerprint import fingerprint
from me_local.server.guard import Gate, KeyCheck, host_of, origin_of, read_body, refusal
from me_local.server.making import Event
from me_local.server.messages_answers import MessageAnswer
from me_local.server.messages_protocol import CountRequest, MessagesRequest
from me_local.server.metrics import Metrics
from me_local.server.protocol import MODEL, ChatRequest, CompletionRequest, model_names, parse
from me_local.server.refusals import ApiError, api_error, unexpected
from me_local.server.responses_answers import ResponseAnswer
from me_local.server.responses_protocol import ResponsesRequest
from me_local.server.streams import EventStream, while_there, with_beats
from me_local.server.telling import Beating, Events, heard_of, lines, told
from me_local.server.tokens import (
    ApplyTemplate,
    Detokenize,
    Tokenize,
    apply_template,
    detokenize,
    props,
    slots,
    tokenize,
)
from me_local.server.translation import prompt_tokens
from me_local.server.worker import Worker

_CLOSED = (
    *("/v1", "/metrics", "/models", "/chat/", "/completions", "/messages", "/responses"),
    *("/tokenize", "/detokenize", "/apply-template", "/props", "/slots"),
)
"""Behind these paths something of the ensemble is given away."""

STATIC = Path(__file__).parent / "static"

T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)
Handler = Callable[[Request], Awaitable[Response]]
Asked = ChatRequest | CompletionRequest
Translated = MessagesRequest | ResponsesRequest


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask: with which key, if any; by which further names of this machine; pages of which other origins.

    Names are brought into the form in which browsers send them. `aliases` are further names of the ensemble. Raises
    ConfigError for what is none.
    """

    key: str | None = None
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    aliases: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "hosts", tuple(map(host_of, self.hosts)))
        object.__setattr__(self, "origins", tuple(map(origin_of, self.origins)))
        for alias in self.aliases:
            if not alias.strip() or not alias.isprintable() or alias.startswith(MODEL):
                raise ConfigError(f"--alias: {alias!r:.80} is no further name of the ensemble")


def make_app(worker: Worker, metrics: Metrics, access: Access, timeout: float) -> Starlette:
    """The application; a request is given up after `timeout` seconds."""
    routes = Routes(worker, metrics, timeout, access.aliases)
    middleware = [Middleware(Gate, metrics, access.hosts, access.origins)]
    if access.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=access.origins,
                allow_methods=["*"],
                allow_headers=["*"],
                allow_private_network=True,  # pages of these sites may ask a server at home
            )
        )
    if access.key is not None:
        middleware.append(Middleware(KeyCheck, access.key, _CLOSED))
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
        Route(f"{prefix}/models/", routes.models),
        Route(f"{prefix}/models/{{model:path}}", routes.model),
        Route(f"{prefix}/chat/completions", routes.chat, methods=["POST"]),
        Route(f"{prefix}/completions", routes.complete, methods=["POST"]),
        Route(f"{prefix}/messages", routes.messages, methods=["POST"]),
        Route(f"{prefix}/messages/count_tokens", routes.count_tokens, methods=["POST"]),
        Route(f"{prefix}/responses", routes.responses, methods=["POST"]),
        Route(f"{prefix}/tokenize", routes.tokens(Tokenize, tokenize), methods=["POST"]),
        Route(f"{prefix}/detokenize", routes.tokens(Detokenize, detokenize), methods=["POST"]),
        Route(f"{prefix}/apply-template", routes.tokens(ApplyTemplate, apply_template), methods=["POST"]),
        Route(f"{prefix}/props", routes.props),
        Route(f"{prefix}/slots", routes.slots),
    ]


class Routes:
    """What each path answers."""

    def __init__(self, worker: Worker, metrics: Metrics, timeout: float, aliases: Sequence[str]) -> None:
        self._worker = worker
        self._aliases = aliases
        self._ensemble = worker.ensemble
        self._fingerprint = fingerprint(worker.ensemble)
        self._metrics = metrics
        self._timeout = timeout

    async def models(self, _: Request) -> Response:
        """GET /v1/models: the ensemble, and each of its members."""
        listed = [self._model(name) for name in model_names(self._ensemble, self._aliases)]
        return JSONResponse({"object": "list", "data": listed, "has_more": False})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["model"]
        if name not in model_names(self._ensemble, self._aliases):
            raise ApiError(404, "there is no such model", param="model", code="model_not_found")
        return JSONResponse(self._model(name))

    def tokens(self, kind: type[R], answer: Callable[[Ensemble, R], dict[str, Any]]) -> Handler:
        """What POST /tokenize and its kin answer."""

        async def respond(request: Request) -> Response:
            try:
                asked = parse(kind, await read_body(request))
                # A long text takes long, and other requests are not to wait for it.
                return JSONResponse(await asyncio.to_thread(answer, self._ensemble, asked))
            except MeLocalError as error:
                return refusal(api_error(error))
            except ApiError as error:
                return refusal(error)
            except Exception as error:
                return refusal(unexpected(error))

        return respond

    async def props(self, _: Request) -> Response:
        """GET /props."""
        return JSONResponse(props(self._ensemble))

    async def slots(self, request: Request) -> Response:
        """GET /slots: 503 where none is free, and the client wants to know it so."""
        places = self._worker.places
        if "fail_on_no_slot" in request.query_params and None not in places:
            raise ApiError(503, "no slot is free", code="no_slot")
        return JSONResponse(slots(self._ensemble, places))

    async def unknown(self, request: Request) -> Response:
        """All else below /v1."""
        path = request.url.path.removeprefix("/v1")
        posted = ("/chat/completions", "/completions", "/messages", "/messages/count_tokens", "/responses")
        allowed = "POST" if path in posted else "GET, HEAD" if path == "/models" else None
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

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages."""
        return await self._respond(request, MessagesRequest)

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens."""
        return await self._respond(request, CountRequest)

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses."""
        return await self._respond(request, ResponsesRequest)

    def _model(self, name: str) -> dict[str, Any]:
        config = self._ensemble.config
        described: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": MODEL}
        described |= {"type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z"}  # for Anthropic's
        if name in (MODEL, *self._aliases):
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

    async def _respond(self, request: Request, kind: type[Asked | Translated]) -> Response:
        path = request.url.path
        try:
            asked = parse(kind, await read_body(request))
            if isinstance(asked, Translated):
                return await self._translate(request, asked)
            return await self._answer(request, asked)
        except MeLocalError as error:
            return refusal(api_error(error), path)
        except ApiError as error:
            return refusal(error, path)
        except Exception as error:
            return refusal(unexpected(error), path)

    async def _answer(self, request: Request, asked: Asked) -> Response:
        asks = asked.asks(self._ensemble, self._aliases)
        logprobs = asked.logprobs is not None and asked.logprobs is not False
        chat = isinstance(asked, ChatRequest)
        calls, apart = (asked.may_call, asked.tells_thoughts) if isinstance(asked, ChatRequest) else (False, False)
        answer = Answer(
            asked.model,
            chat=chat,
            logprobs=logprobs,
            n=asked.n or 1,
            tools=calls,
            apart=apart,
            fingerprint=self._fingerprint,
        )
        events = self._events(asks)
        if not asked.stream:
            echoes, replies = await while_there(request, heard_of(events))
            return JSONResponse(answer.whole(replies, echoes))
        first, beating = await self._begin(request, events)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(lines(answer, first, beating, chat=isinstance(asked, ChatRequest), usage=usage))

    async def _translate(self, request: Request, asked: Translated) -> Response:
        """The answer to a request of another protocol."""
        chat, ask = asked.asked(self._ensemble, self._aliases)
        if isinstance(asked, CountRequest):
            return JSONResponse({"input_tokens": await self._prompt_tokens(request, ask)})
        answer: MessageAnswer | ResponseAnswer
        if isinstance(asked, ResponsesRequest):
            answer = ResponseAnswer(asked, chat)
        else:
            answer = MessageAnswer(asked, chat, await self._prompt_tokens(request, ask) if asked.stream else 0)
        events = self._events([ask])
        if not asked.stream:
            _, [reply] = await while_there(request, heard_of(events))
            return JSONResponse(answer.whole(reply))
        return EventStream(told(answer, *await self._begin(request, events)))

    async def _prompt_tokens(self, request: Request, ask: Ask) -> int:
        # A long text takes long, and other requests are not to wait for it.
        return await while_there(request, asyncio.to_thread(prompt_tokens, self._ensemble, ask))

    async def _begin(self, request: Request, events: Events) -> tuple[tuple[int, Event] | None, Beating]:
        """The first event and the others; what is refused has a status of its own, unless it waits for long."""
        beating = with_beats(events)
        return await while_there(request, anext(beating)), beating

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


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return refusal(error, request.url.path)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    response = refusal(ApiError(error.status_code, error.detail), request.url.path)
    response.headers.update(error.headers or {})
    return response
