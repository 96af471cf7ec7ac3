"""Anthropic's requests, as typed models, and how they become requests for a conversation.

What is refused is named by its field, as in `protocol`. Thoughts that were encrypted are left out: only who wrote them
can read them. Knows nothing of HTTP.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from me_local.server.fields import Ignored, Loose, Strict, Unsupported
from me_local.server.translation import SentOn, Translated

THREADS = "thread_unsupported_request"
"""Says a client's package that it has to send whole conversations, which it then does."""
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _refuse_thread(value: object) -> object:
    if value is not None:
        raise PydanticCustomError(THREADS, "nothing is stored; send the whole conversation")
    return value


def _require_thoughts(value: Any) -> Any:
    """Earlier thoughts are cleared by the members' templates; nothing else is."""
    edits = value.get("edits") or [] if isinstance(value, dict) else value or []
    kinds = (
        [edit.get("type") if isinstance(edit, dict) else None for edit in edits] if isinstance(edits, list) else [None]
    )
    if not all(str(kind).startswith("clear_thinking") for kind in kinds):
        raise PydanticCustomError("unsupported", "is not supported; leave it out")
    return value


def _as_blocks(raw: Any) -> Any:
    return [{"type": "text", "text": raw}] if isinstance(raw, str) else raw


class Block(Loose):
    """A part of a message; `cache_control` and `citations` change nothing."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Annotated[list["Block"] | None, Field(fail_fast=True, max_length=10_000), BeforeValidator(_as_blocks)] = (
        None
    )
    is_error: bool | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> "Block":
        if self.type not in _NEEDED:
            raise ValueError(f"type: {self.type!r} is not supported; a block is {', '.join(_NEEDED)}")
        for field in _NEEDED[self.type]:
            if getattr(self, field) is None:
                raise ValueError(f"{field}: is missing")
        return self


Blocks = Annotated[list[Block], Field(fail_fast=True, max_length=10_000), BeforeValidator(_as_blocks)]


class Turn(Strict):
    """A message of a conversation."""

    role: Literal["user", "assistant"]
    content: Blocks


class AnthropicTool(Loose):
    """A tool that a reply may call; those that Anthropic's own servers run are refused."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The tool in OpenAI's form."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class AnthropicChoice(Strict):
    """Whether a tool is called, and which."""

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _require_name(self) -> "AnthropicChoice":
        if self.type == "tool" and self.name is None:
            raise ValueError("name: is missing")
        return self

    def as_choice(self) -> Any:
        """The choice in OpenAI's form."""
        return _CHOICES.get(self.type) or {"type": "function", "function": {"name": self.name}}


class Thinking(Loose):
    """Whether models are to think first. A budget changes nothing: clients have to give one, and it is a wish."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Loose):
    """A schema that the reply has to keep."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    """The same, and how much is to be thought."""

    format: OutputFormat | None = None
    effort: SentOn


class MessagesRequest(Translated):
    """A body of POST /v1/messages."""

    names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "stop": "stop_sequences",
            "response_format": "output_config.format",
            "reasoning_effort": "output_config.effort",
        }
    )

    messages: Annotated[list[Turn], Field(min_length=1, max_length=10_000, fail_fast=True)]
    system: Blocks | None = None
    max_tokens: SentOn
    stop_sequences: SentOn
    tools: Annotated[list[AnthropicTool] | None, Field(max_length=128)] = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    metadata: Ignored
    service_tier: Ignored
    cache_control: Ignored
    inference_geo: Ignored
    thread: Annotated[Any, Field(default=None), AfterValidator(_refuse_thread)]
    container: Unsupported
    mcp_servers: Unsupported
    context_management: Annotated[Any, Field(default=None), AfterValidator(_require_thoughts)]

    def as_chat(self) -> dict[str, Any]:
        """The fields of the request for a conversation."""
        choice = self.tool_choice
        return {
            "messages": list(self._messages()),
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "tools": [tool.as_dict() for tool in self.tools] if self.tools else None,
            "tool_choice": choice.as_choice() if choice else None,
            "parallel_tool_calls": not choice.disable_parallel_tool_use if choice else None,
            "response_format": self._format(),
            "enable_thinking": self.thinking.type != "disabled" if self.thinking else None,
            "reasoning_effort": self.output_config.effort if self.output_config else None,
        }

    def _format(self) -> dict[str, Any] | None:
        wanted = self.output_format or (self.output_config.format if self.output_config else None)
        return {"type": "json_schema", "json_schema": {"schema": wanted.schema_}} if wanted else None

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.system:
            yield {"role": "system", "content": _text(self.system)}
        for role, turns in groupby(self.messages, key=lambda turn: turn.role):  # equal roles in a row are one turn
            blocks = [block for turn in turns for block in turn.content]
            yield from _of_user(blocks) if role == "user" else _of_assistant(blocks)


class CountRequest(MessagesRequest):
    """A body of POST /v1/messages/count_tokens."""


def _of_user(blocks: list[Block]) -> Iterator[dict[str, Any]]:
    results = [block for block in blocks if block.type == "tool_result"]
    for block in results:
        text = _text(block.content or ())
        yield {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": f"error: {text}" if block.is_error else text,
        }
    said = [block for block in blocks if block.type == "text"]
    if said or not results:
        yield {"role": "user", "content": _text(said)}


def _of_assistant(blocks: list[Block]) -> Iterator[dict[str, Any]]:
    calls = [
        {"id": block.id, "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}}
        for block in blocks
        if block.type == "tool_use"
    ]
    thoughts = "\n\n".join(block.thinking for block in blocks if block.thinking)
    message = {"role": "assistant", "content": _text(blocks), "tool_calls": calls or None}
    yield message | ({"reasoning_content": thoughts} if thoughts else {})


def _text(blocks: Iterable[Block]) -> str:
    return "\n".join(block.text for block in blocks if block.text is not None)
