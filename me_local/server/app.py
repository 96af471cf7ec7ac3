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
from me_local.config import Overrides, override
from me_local.ensemble import Ensemble
from me_local.errors import ConfigError, MeLocalError
from me_local.server.answers import Answer
from me_local.server.guard import Gate, KeyCheck, host_of, origin_of, read_body, refusal
from me_local.server.keeping import Held, Keeper
from me_local.server.making import Event
from me_local.server.messages_answers import MessageAnswer
from me_local.server.messages_protocol import CountRequest, MessagesRequest
from me_local.server.protocol import MODEL, ChatRequest, CompletionRequest, model_names, parse, preset_in
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

_CLOSED = (
    *("/v1", "/metrics", "/models", "/chat/", "/completions", "/messages", "/responses"),
    *("/tokenize", "/detokenize", "/apply-template", "/props", "/slots", "/admin"),
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


def make_app(keeper: Keeper, access: Access, timeout: float) -> Starlette:
    """The application; a request is given up after `timeout` seconds."""
    routes = Routes(keeper, access, timeout)
    middleware = [Middleware(Gate, keeper.metrics, access.hosts, access.origins)]
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
            Route("/admin/reload", routes.reload, methods=["POST"]),
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

    def __init__(self, keeper: Keeper, access: Access, timeout: float) -> None:
        self._keeper = keeper
        self._aliases = access.aliases
        self._keyed = access.key is not None
        self._timeout = timeout

    async def models(self, _: Request) -> Response:
        """GET /v1/models: the ensemble, and each of its members."""
        listed = [self._model(name) for name in self._names()]
        return JSONResponse({"object": "list", "data": listed, "has_more": False})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["model"]
        if name not in self._names():
            raise ApiError(404, "there is no such model", param="model", code="model_not_found")
        return JSONResponse(self._model(name))

    def tokens(self, kind: type[R], answer: Callable[[Ensemble, R], dict[str, Any]]) -> Handler:
        """What POST /tokenize and its kin answer."""

        async def respond(request: Request) -> Response:
            try:
                asked = parse(kind, await read_body(request))
                with (await self._held(request)).used() as held:
                    # A long text takes long, and other requests are not to wait for it.
                    return JSONResponse(await asyncio.to_thread(answer, held.ensemble, asked))
            except MeLocalError as error:
                return refusal(api_error(error))
            except ApiError as error:
                return refusal(error)
            except Exception as error:
                return refusal(unexpected(error))

        return respond

    async def props(self, _: Request) -> Response:
        """GET /props."""
        return JSONResponse(props(self._keeper.about))

    async def slots(self, request: Request) -> Response:
        """GET /slots: 503 where none is free, and the client wants to know it so."""
        places = self._keeper.places
        if "fail_on_no_slot" in request.query_params and None not in places:
            raise ApiError(503, "no slot is free", code="no_slot")
        return JSONResponse(slots(self._keeper.about, places))

    async def unknown(self, request: Request) -> Response:
        """All else below /v1."""
        path = request.url.path.removeprefix("/v1")
        posted = ("/chat/completions", "/completions", "/messages", "/messages/count_tokens", "/responses")
        allowed = "POST" if path in posted else "GET, HEAD" if path == "/models" else None
        if allowed:
            raise ApiError(405, f"only {allowed} is answered here", headers={"Allow": allowed})
        raise ApiError(404, f"there is no {request.method} of this path", code="unknown_path")

    async def health(self, _: Request) -> Response:
        """GET /health: 503 once the server is shutting down; where models are not loaded just now, it says so."""
        if self._keeper.draining:
            return JSONResponse({"status": "shutting down"}, 503)
        state = self._keeper.state
        return JSONResponse({"status": "ok"} | ({} if state == "loaded" else {"models": state}))

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self._keeper.metrics.text(), media_type="text/plain; version=0.0.4")

    async def reload(self, _: Request) -> Response:
        """POST /admin/reload: it is answered once the new models serve, or with what is wrong with them."""
        if not self._keyed:
            message = "without --api-key anybody could ask for this; send the process SIGHUP"
            raise ApiError(403, message, code="no_key")
        try:
            await self._keeper.reload()
        except MeLocalError as error:
            raise ApiError(400, str(error), code="not_reloaded") from None
        except Exception as error:
            raise unexpected(error) from None
        return JSONResponse({"status": "reloaded", "members": self._keeper.about.names})

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

    def _names(self) -> list[str]:
        return model_names(self._keeper.about.config, self._aliases)

    def _model(self, name: str) -> dict[str, Any]:
        about = self._keeper.about
        preset = preset_in(name, about.config)
        config = override(about.config, Overrides(preset=preset)) if preset else about.config
        described: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": MODEL}
        described |= {"type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z"}  # for Anthropic's
        if preset or name in (MODEL, *self._aliases):
            described["strategy"], described["unit"] = config.strategy, config.unit
            described["max_tokens"] = config.max_tokens
            described["seed"] = config.seed
            described["members"] = [
                {
                    "name": member.name,
                    "weight": member.weight,
                    "n_ctx": n_ctx,
                    "sampling": asdict(member.sampling),
                }
                for member, n_ctx in zip(config.members, about.contexts, strict=True)
            ]
        return described

    async def _respond(self, request: Request, kind: type[Asked | Translated]) -> Response:
        path = request.url.path
        try:
            asked = parse(kind, await read_body(request))
            with (await self._held(request)).used() as held:
                if isinstance(asked, Translated):
                    return await self._translate(request, held, asked)
                return await self._answer(request, held, asked)
        except MeLocalError as error:
            return refusal(api_error(error), path)
        except ApiError as error:
            return refusal(error, path)
        except Exception as error:
            return refusal(unexpected(error), path)

    async def _held(self, request: Request) -> Held:
        """The ensemble, once it is loaded. Raises MeLocalError, and ApiError."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        while self._keeper.held is None:
            try:
                async with asyncio.timeout_at(deadline):
                    await while_there(request, self._keeper.loaded())
            except TimeoutError:
                raise self._too_late() from None
        return self._keeper.held

    async def _answer(self, request: Request, held: Held, asked: Asked) -> Response:
        asks = asked.asks(held.ensemble, self._aliases)
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
            fingerprint=held.about.fingerprint,
        )
        events = self._events(held, asks)
        if not asked.stream:
            echoes, replies = await while_there(request, heard_of(events))
            return JSONResponse(answer.whole(replies, echoes))
        first, beating = await self._begin(request, events)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(lines(answer, first, beating, chat=isinstance(asked, ChatRequest), usage=usage))

    async def _translate(self, request: Request, held: Held, asked: Translated) -> Response:
        """The answer to a request of another protocol."""
        chat, ask = asked.asked(held.ensemble, self._aliases)
        if isinstance(asked, CountRequest):
            return JSONResponse({"input_tokens": await self._prompt_tokens(request, held, ask)})
        answer: MessageAnswer | ResponseAnswer
        if isinstance(asked, ResponsesRequest):
            answer = ResponseAnswer(asked, chat)
        else:
            answer = MessageAnswer(asked, chat, await self._prompt_tokens(request, held, ask) if asked.stream else 0)
        events = self._events(held, [ask])
        if not asked.stream:
            _, [reply] = await while_there(request, heard_of(events))
            return JSONResponse(answer.whole(reply))
        return EventStream(told(answer, *await self._begin(request, events)))

    async def _prompt_tokens(self, request: Request, held: Held, ask: Ask) -> int:
        # A long text takes long, and other requests are not to wait for it.
        return await while_there(request, asyncio.to_thread(prompt_tokens, held.ensemble, ask))

    async def _begin(self, request: Request, events: Events) -> tuple[tuple[int, Event] | None, Beating]:
        """The first event and the others; what is refused has a status of its own, unless it waits for long."""
        beating = with_beats(events)
        return await while_there(request, anext(beating)), beating

    async def _events(self, held: Held, asks: Sequence[Ask]) -> Events:
        """What happens to all choices, each with its index. Raises ApiError."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        made = held.replies(asks)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(made, None)
                if event is None:
                    return
                yield event
        except TimeoutError:
            raise self._too_late() from None
        finally:
            await made.aclose()

    def _too_late(self) -> ApiError:
        return ApiError(504, f"not finished within {self._timeout:g} s (--timeout)", code="timeout")


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return refusal(error, request.url.path)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    response = refusal(ApiError(error.status_code, error.detail), request.url.path)
    response.headers.update(error.headers or {})
    return response
