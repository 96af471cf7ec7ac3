"""From a conversation to one member's prompt: its chat template, and ids in which user text stays text.

A template is rendered with the real contents, in which every look-alike of a control token is broken up by a mark
that occurs nowhere else. Control tokens found in the result are therefore the template's own. A second mark stands
in front of each reply in the history, so that the ids of a reply are the same there as when it was written, and the
next turn evaluates only what is new.
"""

import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from me_local.errors import ConfigError, InputError
from me_local.names import Names
from me_local.vocabulary import IntArray, Vocabulary, Watch, added
from me_local.weights import render_built_in

Role = Literal["system", "user", "assistant"]
Render = Callable[[Sequence["Message"]], str]

PLAIN_STOPS = ("\nUser:", "\n\nUser:")
"""End the reply of an ensemble in which a member sees a plain transcript: the next speaker's label on a new line."""

_PLAIN_OPENING = "The following is a conversation between a user and a helpful, knowledgeable assistant."

# Code points that Unicode reserves for internal use: no text that is interchanged has them.
_NONCHARACTERS = [chr(0xFDD0 + i) for i in range(32)]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        """Raises InputError for another role, and for text that UTF-8 cannot hold."""
        if self.role not in ("system", "user", "assistant") or not isinstance(self.content, str):
            raise InputError(f'a message is a text of "system", "user" or "assistant", got {self.role!r}')
        try:
            self.content.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the {self.role} message has half a surrogate pair at character {error.start}, which is no text"
            ) from None


@dataclass(frozen=True, slots=True)
class _Marks:
    """Characters that occur nowhere in a conversation, to be put into its messages and found again when rendered.

    `gap` breaks up the name of a control token and is taken out again; at a `cut` the two sides are tokenised apart,
    because tokenizers find user-defined tokens in any text; `reply` stands in front of a reply, `nul` for NUL.
    """

    gap: str
    cut: str
    reply: str
    nul: str


class PromptWriter:
    """Writes one member's prompts, by its template and in its vocabulary."""

    def __init__(self, vocabulary: Vocabulary, render: Render) -> None:
        self._vocabulary = vocabulary
        self._render = render
        # A mark cannot break up a single character, so such tokens are not recognised in templates either.
        self._control = Names(text for text in vocabulary.control if len(text) > 1)
        self._markup = Names(vocabulary.markup)

    def prompt(self, messages: Sequence[Message], watch: Watch = lambda _: None) -> IntArray:
        """The ids of the prompt up to where the reply starts, BOS exactly once: int32 (tokens,).

        `watch` hears how many there are at least so far; what it raises ends the work. Raises InputError when the
        template refuses the conversation.
        """
        marks = _free_marks(messages)
        marked = [Message(m.role, self._protected(m, marks)) for m in messages]
        ids: list[int] = []
        for i, part in enumerate(self._render(marked).split(marks.reply)):
            ids += self._encode(part, marks, at_start=i == 0, watch=added(len(ids), watch))
        return np.array(self._with_bos(ids), dtype=np.int32)

    def raw_prompt(self) -> IntArray:
        """The ids in front of a raw completion: BOS where the vocabulary wants one."""
        return np.array(self._with_bos([]), dtype=np.int32)

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._vocabulary.bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _protected(self, message: Message, marks: "_Marks") -> str:
        """The content with marks inside each look-alike of a control token, and where one could be completed."""
        content = message.content.replace("\0", marks.nul)
        content = self._control.replace(content, marks.gap.join)
        if self._control.may_begin(content):
            content += marks.gap
        if self._control.may_end(content):
            content = marks.gap + content
        if message.role == "assistant":
            return marks.reply + content
        # A reply may have such tokens: models write them.
        return self._markup.replace(content, lambda name: name[0] + marks.cut + name[1:])

    def _encode(self, text: str, marks: "_Marks", *, at_start: bool, watch: Watch) -> list[int]:
        """The ids of a rendered part: control tokens by name, what stands between them tokenised as text."""
        ids: list[int] = []
        for fragment, token in self._fragments(text):
            plain = fragment.replace(marks.gap, "").replace(marks.nul, "\0").encode()
            for piece in plain.split(marks.cut.encode()):
                # llama.cpp treats what follows a control token as the start of a text.
                watch(len(ids))
                ids += self._vocabulary.encode(piece, at_start=at_start, watch=added(len(ids), watch))
                at_start = False
            if token is not None:
                ids.append(token)
                at_start = True
        return ids

    def _fragments(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Texts, each with the control token that follows it; None after the last."""
        position, strip_right = 0, False
        for start, end in self._control.find(text):
            token = self._vocabulary.control[text[start:end]]
            left, right = self._vocabulary.stripping.get(token, (False, False))
            fragment = text[position:start]
            fragment = fragment.lstrip() if strip_right else fragment
            yield fragment.rstrip() if left else fragment, token
            position, strip_right = end, right
        yield text[position:].lstrip() if strip_right else text[position:], None


def choose_render(wanted: str | None, own: str | None, tokens: dict[str, str]) -> tuple[Render, bool]:
    """The template a member is to use, and whether it is the plain transcript.

    `wanted` is the member's `chat_template` setting: None, "plain", an absolute path or one of llama.cpp's names;
    `own` is the template in the GGUF; `tokens` has the texts of `bos_token` and `eos_token`. Raises ConfigError when
    the template cannot be used.
    """
    if wanted == "plain" or (wanted is None and own is None):
        return render_plain, True
    if wanted is None:
        return jinja_render(str(own), tokens, "the chat template in the GGUF"), False
    if Path(wanted).is_absolute():
        return jinja_render(_read(Path(wanted)), tokens, wanted), False
    render = built_in_render(wanted)
    render([Message("user", "Hello")])  # an unknown name shows here
    return render, False


def render_plain(messages: Sequence[Message]) -> str:
    """A transcript with the speakers' names on lines of their own, for models without a chat template.

    Without a system message it opens with a sentence that says what it is: base models then answer, where they would
    otherwise go on asking.
    """
    labels = {"system": "", "user": "User:\n", "assistant": "Assistant:\n"}
    opening = [] if messages[0].role == "system" else [_PLAIN_OPENING]
    turns = [f"{labels[m.role]}{m.content.rstrip()}" for m in messages]
    return "\n\n".join([*opening, *turns, labels["assistant"]])


def built_in_render(name: str) -> Render:
    """One of llama.cpp's built-in templates, by its name there."""
    return lambda messages: render_built_in(name, [(m.role, m.content) for m in messages])


def jinja_render(source: str, tokens: dict[str, str], where: str) -> Render:
    """A Jinja chat template, in the dialect of Hugging Face's transformers. `where` names it in errors."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now, **tokens)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"{where} is not a template that Jinja can read: {error}") from None

    def render(messages: Sequence[Message]) -> str:
        try:
            return _rendered(template, messages)
        except Exception as error:  # a template can do anything that an expression of Python can
            raise InputError(f"{where} refuses the conversation: {str(error) or type(error).__name__}") from None

    return render


def _rendered(template: jinja2.Template, messages: Sequence[Message]) -> str:
    def attempt(turns: Sequence[Message]) -> str:
        listed = [{"role": m.role, "content": m.content} for m in turns]
        return template.render(messages=listed, add_generation_prompt=True, tools=None)

    try:
        return attempt(messages)
    except Exception:
        if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
            raise
        # Some templates know no system role: its text then opens the first message.
        first = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
        return attempt([first, *messages[2:]])


def _free_marks(messages: Sequence[Message]) -> _Marks:
    used = set().union(*(m.content for m in messages))
    free = [mark for mark in _NONCHARACTERS if mark not in used]
    if len(free) < 4:
        raise InputError("the conversation uses up the code points U+FDD0 to U+FDEF, which are not characters")
    return _Marks(*free[:4])


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"chat_template = {path}: cannot be read: {reason}") from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Generation(jinja2.ext.Extension):
    """Lets `{% generation %}` through, which marks the replies for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
