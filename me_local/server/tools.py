"""Tools: how they are told to the members, how a call is kept in its form, and how calls are found in a reply.

Members' templates disagree on tools, so there is one form for all of them. The system message lists the tools. A call
is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and the result of one stands in the user's turn as
`<tool_response>...</tool_response>`. Inside a call a grammar holds, with the schema of the tool's parameters. Knows
nothing of HTTP.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from me_local.config import Constraint
from me_local.errors import InputError
from me_local.server.fields import Loose
from me_local.text.messages import Message

OPENS, CLOSES = "<tool_call>", "</tool_call>"
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]

_TOLD = """\
You can call these tools:
{tools}
To call one, write <tool_call>{{"name": "...", "arguments": {{...}}}}</tool_call> with its name and its arguments as a \
JSON object. Its result comes in <tool_response></tool_response>. Call a tool only where it helps; otherwise answer."""


class Function(Loose):
    """What a tool is called, what it does, and the schema of its arguments."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Loose):
    """A function that a reply may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Loose):
    """The name of one."""

    name: str


class NamedTool(Loose):
    """A choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Loose):
    """A call in a message of the assistant; the arguments are JSON."""

    name: str
    arguments: str


class Called(Loose):
    """The same with its id."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


Choice = Literal["none", "auto", "required"] | NamedTool


def told(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation with the tools in its system message."""
    lines = (json.dumps(_without_none(tool.function.model_dump()), ensure_ascii=False) for tool in tools)
    text = _TOLD.format(tools="\n".join(lines))
    if messages and messages[0].role == "system":
        return [Message("system", f"{messages[0].content}\n\n{text}"), *messages[1:]]
    return [Message("system", text), *messages]


def called(content: str, calls: Sequence[Called]) -> str:
    """What the assistant wrote, as it wrote it."""
    written = [
        f'{OPENS}{{"name": {json.dumps(c.function.name)}, "arguments": {c.function.arguments}}}{CLOSES}' for c in calls
    ]
    return "\n".join([*([content] if content else []), *written])


def response(content: str) -> str:
    """The result of a call, as the user's turn tells it."""
    return f"<tool_response>\n{content}\n</tool_response>"


def constraint(tools: Sequence[Tool], choice: Choice, *, parallel: bool) -> Constraint | None:
    """What a reply has to be: calls are kept in their form, and written where they are required.

    Raises InputError for a choice that is no tool.
    """
    if choice == "none":
        return None
    offered = list(tools)
    if isinstance(choice, NamedTool):
        offered = [tool for tool in tools if tool.function.name == choice.function.name]
        if not offered:
            raise InputError(f"tool_choice: there is no tool {choice.function.name!r}")
    body = f"body: %json {json.dumps({'anyOf': [_call(tool) for tool in offered], 'x-guidance': _STYLE})}\n"
    more = f'("\\n"? "{OPENS}" body "{CLOSES}")*' if parallel and choice in ("auto", "required") else ""
    if choice == "auto":
        # Either a text in which no call begins, or one up to a call.
        rules = (
            f'start: free | before body "{CLOSES}" {more}\n'
            f"free: FREE\nFREE: /(?s:.*)/ & ~/(?s:.*){OPENS}(?s:.*)/\n"
            f'before[suffix="{OPENS}"]: /(?s:.*)/\n'
        )
    else:
        rules = f'start: "{OPENS}" body "{CLOSES}" {more}\n'
    return Constraint("grammar", rules + body)


def _call(tool: Tool) -> dict[str, Any]:
    parameters = tool.function.parameters or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _without_none(function: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in function.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Call:
    """A call that a reply makes; `arguments` are JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_dict(self) -> dict[str, Any]:
        """The call as OpenAI's clients read it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Splitter:
    """Parts what is content from what is a call, while a reply is written.

    `push` takes the text of a piece and gives the content and the calls that are complete with it; `flush` gives the
    rest, which is content: a call that was cut off, too.
    """

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False
        self.calls: list[Call] = []

    def push(self, text: str) -> tuple[str, list[Call]]:
        """What can be told after this text."""
        self._held += text
        content, calls = "", []
        while True:
            if self._after_call:  # a line feed between two calls is neither's
                if f"\n{OPENS}".startswith(self._held):
                    break
                self._held = self._held.removeprefix("\n") if self._held.startswith(f"\n{OPENS}") else self._held
                self._after_call = False
            before, opens, inside = self._held.partition(OPENS)
            if not opens:
                keep = _beginning(self._held)
                content += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            body, closes, after = inside.partition(CLOSES)
            if not closes:
                content += before
                self._held = opens + inside
                break
            call = _read(body)
            content += before if call else before + opens + body + closes
            calls += [call] if call else []
            self._held, self._after_call = after, call is not None
        self.calls += calls
        return content, calls

    def flush(self) -> str:
        """What is still held back."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str) -> int:
    """How many of the last characters may be the beginning of a call."""
    return next((n for n in range(min(len(OPENS) - 1, len(text)), 0, -1) if text.endswith(OPENS[:n])), 0)


def _read(body: str) -> Call | None:
    """The call that is written there, None where it is none."""
    try:
        written = json.loads(body)
        return Call(str(written["name"]), json.dumps(written["arguments"], ensure_ascii=False))
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
