"""Requests for OpenAI's responses, as typed models, and how they become requests for a conversation.

Nothing is stored: whoever refers to an earlier response is refused. Knows nothing of HTTP.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from me_local.server.fields import Ignored, Loose, Strict, Unsupported, no_effect_but
from me_local.server.protocol import StreamOptions
from me_local.server.tools import NamedFunction
from me_local.server.translation import SentOn, Translated

_TEXTS = ("input_text", "output_text", "text", "reasoning_text")
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
_NO_EFFECT = ("reasoning.encrypted_content",)  # thoughts are told as they are
Role = Literal["system", "developer", "user", "assistant"]


class Part(Loose):
    """A part of a message; only text is taken."""

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _require_text(self) -> "Part":
        if self.type not in _TEXTS:
            raise ValueError(f"type: {self.type!r} is not supported; a part is {', '.join(_TEXTS)}")
        if self.text is None:
            raise ValueError("text: is missing")
        return self


def _as_parts(raw: Any) -> Any:
    return [{"type": "input_text", "text": raw}] if isinstance(raw, str) else raw


Parts = Annotated[list[Part], Field(fail_fast=True, max_length=10_000), BeforeValidator(_as_parts)]


class Item(Loose):
    """One of the input: a message, a call of a function, what came of it, or what was thought before one of them."""

    type: str = "message"
    role: Role | None = None
    content: Parts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Parts | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> "Item":
        if self.type not in _NEEDED:
            raise ValueError(f"type: {self.type!r} is not supported; an item is {', '.join(_NEEDED)}")
        for field in _NEEDED[self.type]:
            if getattr(self, field) is None:
                raise ValueError(f"{field}: is missing")
        return self

    def as_message(self) -> dict[str, Any]:
        """The item as a message of a conversation."""
        if self.type == "function_call":
            call = {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        if self.type == "reasoning":
            return {"role": "assistant", "content": "", "reasoning_content": _text(self.content)}
        if self.type == "function_call_output":
            return {"role": "tool", "content": _text(self.output), "tool_call_id": self.call_id}
        return {"role": "system" if self.role == "developer" else self.role, "content": _text(self.content)}


def _as_items(raw: Any) -> Any:
    return [{"role": "user", "content": raw}] if isinstance(raw, str) else raw


class FlatTool(Loose):
    """A function that a reply may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The tool as conversations have it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class FlatChoice(NamedFunction):
    """A choice of one."""

    type: Literal["function"]


class TextFormat(Strict):
    """What the text has to be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _require_schema(self) -> "TextFormat":
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("schema: is missing")
        return self

    def as_dict(self) -> dict[str, Any]:
        """The format as conversations have it."""
        schema = {"json_schema": {"schema": self.schema_}} if self.type == "json_schema" else {}
        return {"type": self.type, **schema}


class TextConfig(Strict):
    """The same, and what else is said of it."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, no_effect_but("medium")] = None


class Reasoning(Strict):
    """How much is to be thought; there are no summaries."""

    effort: SentOn
    summary: Ignored
    generate_summary: Ignored


class ResponsesRequest(Translated):
    """A body of POST /v1/responses."""

    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "max_tokens": "max_output_tokens",
            "response_format": "text.format",
            "messages": "input",
            "reasoning_effort": "reasoning.effort",
        }
    )

    input: Annotated[list[Item], Field(fail_fast=True, max_length=10_000), BeforeValidator(_as_items)]
    instructions: str | None = None
    tools: Annotated[list[FlatTool] | None, Field(max_length=128)] = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    max_output_tokens: SentOn
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    previous_response_id: Unsupported
    conversation: Unsupported
    background: Annotated[Any, no_effect_but(False)] = None
    truncation: Annotated[Any, no_effect_but("disabled")] = None
    top_logprobs: Annotated[Any, no_effect_but(0)] = None
    max_tool_calls: Unsupported
    prompt: Unsupported
    context_management: Unsupported
    store: Ignored
    user: Ignored
    service_tier: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored
    client_metadata: Ignored

    @model_validator(mode="after")
    def _check_include(self) -> "ResponsesRequest":
        for wanted in self.include or ():
            if wanted not in _NO_EFFECT:
                raise ValueError(f"include: {wanted!r:.80} is not supported; leave it out")
        return self

    def as_chat(self) -> dict[str, Any]:
        """The fields of the request for a conversation."""
        choice: Any = self.tool_choice
        if isinstance(choice, FlatChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        return {
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "tools": [tool.as_dict() for tool in self.tools] if self.tools else None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text.format.as_dict() if self.text and self.text.format else None,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }

    def _messages(self) -> list[dict[str, Any]]:
        """The input as messages: equal roles in a row are one, and calls belong to what was said before them.

        What was thought belongs to what was said, or called, behind it; where nothing was, it is left out.
        """
        told: list[dict[str, Any]] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        for item in self.input:
            message = item.as_message()
            last: dict[str, Any] = told[-1] if told else {"role": None}
            if message["role"] != last["role"] or message["role"] == "tool":
                told.append(message)
            elif "reasoning_content" in message:
                thoughts = last.get("reasoning_content"), message["reasoning_content"]
                last["reasoning_content"] = "\n\n".join(filter(None, thoughts))
            elif "tool_calls" in message:
                last.setdefault("tool_calls", []).extend(message["tool_calls"])
            else:
                last["content"] = "\n".join(filter(None, (last["content"], message["content"])))
        return [each for each in told if "reasoning_content" not in each or each["content"] or "tool_calls" in each]


def _text(parts: list[Part] | None) -> str:
    return "\n".join(part.text or "" for part in parts or ())
