"""What clients send and how they are refused: OpenAI's requests as typed models, and its shape of an error.

Knows nothing of HTTP connections or of how replies are made.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from me_local.asking import Ask, Prompt, Tokens, check_conversation, parted
from me_local.config import Config, Constraint, Overrides, Strategy, Unit
from me_local.ensemble import Ensemble
from me_local.errors import InputError
from me_local.server import tools as toolbox
from me_local.server.fields import (
    Count,
    Ignored,
    Limit,
    LimitOrNothing,
    Stops,
    Strict,
    TextOrIds,
    Unsupported,
    Weights,
    as_prompts,
    bounded_texts,
    no_effect_but,
    without,
)
from me_local.server.refusals import ApiError
from me_local.server.shaping import Shaping
from me_local.server.structure import Structure
from me_local.server.thinking import Thinking
from me_local.text import constraints
from me_local.text.messages import Message, Role

MODEL = "me-local"
"""The name of the ensemble; its members are "me-local/NAME"."""

R = TypeVar("R", bound=BaseModel)

_MOST_REPLIES = 128  # to one request
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_SHOWN = 80  # characters of a name that a client made up


class TextPart(Strict):
    """A part of a message; only text is taken."""

    type: Literal["text"]
    text: str


def _as_parts(raw: Any) -> Any:
    if raw is not None and not isinstance(raw, str | list):
        raise PydanticCustomError("content", "is neither a text nor a list of parts")
    return [{"type": "text", "text": raw}] if isinstance(raw, str) else raw


class ChatMessage(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart] | None, Field(fail_fast=True), BeforeValidator(_as_parts)] = None
    name: Ignored
    refusal: Unsupported
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[toolbox.Called] | None, Field(max_length=128)] = None
    tool_call_id: Ignored
    function_call: Unsupported
    audio: Unsupported
    annotations: Ignored

    @model_validator(mode="after")
    def _require_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError("content: is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only the assistant has them")
        if self.thought and self.role != "assistant":
            raise ValueError("reasoning_content: only the assistant has it")
        return self

    @property
    def thought(self) -> str:
        """What stood in front of the content, by either of its names."""
        return self.reasoning_content or self.reasoning or ""

    def as_message(self) -> Message:
        """The message as members see it."""
        text = "\n".join(part.text for part in self.content or ())
        if self.role == "tool":
            return Message("user", toolbox.response(text))
        if self.role == "assistant" and self.tool_calls:
            return Message("assistant", toolbox.called(text, self.tool_calls), self.thought)
        role: Role = "system" if self.role == "developer" else self.role
        return Message(role, text, self.thought)


class StreamOptions(Strict):
    """What else a stream tells."""

    include_usage: bool = False
    include_obfuscation: Ignored
    continuous_usage_stats: Ignored


class _Request(Structure, Shaping, Strict):
    """What conversations and completions have in common."""

    model: str = MODEL
    max_tokens: Limit = None
    stop: Stops = None
    seed: Annotated[int | None, Field(ge=0, le=2**62), without(-1)] = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    strategy: Strategy | None = None
    weights: Weights | None = None
    unit: Unit | None = None
    user: Ignored
    metadata: Ignored
    store: Ignored
    cache_prompt: Ignored
    timings_per_token: Ignored
    id_slot: Ignored
    service_tier: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored

    def limit(self) -> int | None:
        """The largest number of pieces in a reply."""
        return self.max_tokens

    def prompts(self) -> list[Prompt]:
        """What is to be answered or completed. Raises InputError."""
        raise NotImplementedError

    def top(self) -> int:
        """How many of the likeliest pieces are wanted at each step."""
        raise NotImplementedError

    def echoed(self) -> Literal["text", "scores"] | None:
        """What is told of the prompt in front of the reply: nothing of a conversation."""
        return None

    def template_args(self) -> dict[str, Any] | None:
        """Variables for chat templates. Raises ConfigError."""
        return None

    def asks(self, ensemble: Ensemble, aliases: Sequence[str] = ()) -> list[Ask]:
        """The replies that are asked for, in the order of the choices; the i-th has the seed + i.

        By `aliases` the ensemble goes, too. Raises ApiError for a model that there is not, ConfigError and InputError.
        """
        overrides = Overrides(
            strategy=self.strategy,
            unit=self.unit,
            seed=self.seed if self.seed is not None else ensemble.config.seed,
            max_tokens=self.limit(),
            stop=None if self.stop is None else tuple(self.stop),
            constraint=self._constraint(),
            preset=preset_in(self.model, ensemble.config),
            weights=self._weights(ensemble, aliases),
            template_args=self.template_args(),
            **self.shaping(),
        )
        ensemble.with_overrides(overrides)
        given, n = self.prompts(), self.n or 1
        if len(given) * n > _MOST_REPLIES:
            raise ApiError(400, f"n: that makes {len(given) * n} replies, at most {_MOST_REPLIES} are given", param="n")
        prompts = [prompt for prompt in given for _ in range(n)]
        seeds = [None if overrides.seed is None else overrides.seed + i for i in range(len(prompts))]
        return [
            Ask(prompt, replace(overrides, seed=seed), self.top(), self.echoed())
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def _constraint(self) -> Constraint | None:
        try:
            return self.constraint()
        except InputError as error:
            raise ApiError(400, str(error), param=str(error).partition(":")[0]) from None

    def _weights(self, ensemble: Ensemble, aliases: Sequence[str]) -> dict[str, float] | None:
        if self.model in (MODEL, *aliases) or preset_in(self.model, ensemble.config):
            return self.weights
        name = self.model.removeprefix(f"{MODEL}/")
        if name == self.model or name not in ensemble.names:
            known = ", ".join(model_names(ensemble.config, aliases))
            message = f"model: there is no {_shown(self.model)}; there are {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if self.weights is not None:
            raise ApiError(400, "weights: a single member has none", param="weights")
        return {other: float(other == name) for other in ensemble.names}


class ChatRequest(Thinking, _Request):
    """A body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), BeforeValidator(bounded_texts)]
    max_completion_tokens: Limit = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    modalities: Annotated[Any, no_effect_but(["text"])] = None
    tool_choice: toolbox.Choice | None = None
    function_call: Annotated[Any, no_effect_but("none", "auto")] = None
    tools: Annotated[list[toolbox.Tool] | None, Field(max_length=128)] = None
    functions: Unsupported
    audio: Unsupported
    prediction: Unsupported
    verbosity: Unsupported
    web_search_options: Unsupported
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: Ignored

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only goes with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_completion_tokens: contradicts max_tokens")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: there are no tools")
        if self.may_call and not self.tells_thoughts:
            raise ValueError('reasoning_format: "none" does not go with tools: calls are looked for behind thoughts')
        return self

    @property
    def may_call(self) -> bool:
        """Whether a reply may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def limit(self) -> int | None:
        """The largest number of pieces in a reply."""
        return self.max_completion_tokens or self.max_tokens

    def prompts(self) -> list[Prompt]:
        """The conversation. Raises InputError when it cannot be answered."""
        messages = as_messages(self.messages)
        if self.tools and self.may_call:
            messages = toolbox.told(messages, self.tools)
        answered, head = parted(messages)
        check_conversation(answered)
        if self.continue_final_message and not head:
            raise InputError("continue_final_message: the last message is not the assistant's")
        return [tuple(messages)]

    def constraint(self) -> Constraint | None:
        """What the reply has to be. Raises InputError."""
        asked = super().constraint()
        if not self.tools or not self.may_call:
            return asked
        if asked:
            raise InputError("tools: either these or a structure of the reply can be kept")
        parallel = self.parallel_tool_calls is not False
        kept = toolbox.constraint(self.tools, self.tool_choice or "auto", parallel=parallel)
        if kept:
            try:
                constraints.start(kept)
            except InputError as error:
                raise InputError(f"tools: {error}") from None
        return kept

    def top(self) -> int:
        """How many of the likeliest pieces are wanted at each step."""
        return self.top_logprobs or 0


def as_messages(given: Sequence[ChatMessage]) -> list[Message]:
    """The messages as members see them; results of tools, and what the user says behind them, are one turn."""
    messages: list[Message] = []
    for before, message in zip([None, *given], given, strict=False):
        now = message.as_message()
        if before is not None and before.role == "tool" and now.role == "user":
            messages[-1] = Message("user", f"{messages[-1].content}\n{now.content}")
        else:
            messages.append(now)
    return messages


class CompletionRequest(_Request):
    """A body of POST /v1/completions."""

    prompt: Annotated[list[TextOrIds], Field(min_length=1, max_length=128, fail_fast=True), BeforeValidator(as_prompts)]
    max_tokens: LimitOrNothing = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[Any, no_effect_but(1)] = None
    echo: bool | None = None
    suffix: Unsupported

    def prompts(self) -> list[Prompt]:
        """The texts to complete. Raises InputError for one that is empty."""
        if not all(self.prompt):
            raise InputError("prompt: a text is empty: there is nothing to complete")
        return [given if isinstance(given, str) else Tokens(tuple(given)) for given in self.prompt]

    def top(self) -> int:
        """How many of the likeliest pieces are wanted at each step."""
        return self.logprobs or 0

    def echoed(self) -> Literal["text", "scores"] | None:
        """What is told of the prompt."""
        if not self.echo:
            return None
        return "text" if self.logprobs is None else "scores"


def parse(kind: type[R], body: bytes) -> R:
    """A request from its JSON. Raises ApiError that names the first field that is wrong."""
    try:
        return kind.model_validate_json(body.removeprefix(_BYTE_ORDER_MARK))
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False)[0]) from None


def model_names(config: Config, aliases: Sequence[str] = ()) -> list[str]:
    """The models that a client can name: the ensemble, by all its names and with its presets, and each member."""
    members = [f"{MODEL}/{member.name}" for member in config.members]
    return [MODEL, *aliases, *(f"{MODEL}:{name}" for name in config.presets), *members]


def preset_in(model: str, config: Config) -> str | None:
    """The preset that the name of a model says, if it says one that there is."""
    name = model.removeprefix(f"{MODEL}:")
    return name if name != model and name in config.presets else None


def _refusal(problem: ErrorDetails) -> ApiError:
    if problem["type"] == "json_invalid":
        reason = str(problem.get("ctx", {}).get("error", problem["msg"]))
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return ApiError(400, message, param=message.partition(":")[0] if ":" in message else None)
    param = _shown(".".join(str(part) for part in problem["loc"]), quoted=False)
    words = {"extra_forbidden": "there is no such field", "missing": "is missing"}
    return ApiError(400, f"{param}: {words.get(problem['type'], message)}", param=param, code=problem["type"])


def _shown(text: str, *, quoted: bool = True) -> str:
    cut = text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"
    return repr(cut) if quoted or not cut.isprintable() else cut
