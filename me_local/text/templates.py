"""From a conversation to one member's prompt: its chat template, and ids in which user text stays text.

A template is rendered with the real contents, in which every look-alike of a control token is broken up by a mark
that occurs nowhere else. Control tokens found in the result are therefore the template's own, and the text between
two of them is tokenised whole, as llama.cpp does it. How a template takes a conversation (contents as texts or as
lists of parts, system messages everywhere or nowhere) is found by trying, when it is read.
"""

import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np

from me_local.errors import ConfigError, InputError, TemplateExcessError, TemplateMemoryError
from me_local.llama.weights import render_built_in
from me_local.text.names import Names
from me_local.text.sandbox import ExcessError, Sandbox
from me_local.text.vocabulary import IntArray, Vocabulary, Watch, added

Role = Literal["system", "user", "assistant"]
Render = Callable[[Sequence["Message"]], str]
_Attempt = Callable[[Sequence["Message"], "_Form"], str]

PLAIN_STOPS = ("\nUser:", "\n\nUser:")
"""End the reply of an ensemble in which a member sees a plain transcript: the next speaker's label on a new line."""

_PLAIN_OPENING = "The following is a conversation between a user and a helpful, knowledgeable assistant."

# Code points that Unicode reserves for internal use: no text that is interchanged has them.
_NONCHARACTERS = [chr(0xFDD0 + i) for i in range(32)]

_SPACE = " \t\n\v\f\r"  # what C's isspace knows, which llama.cpp strips by
_LONGEST = 300  # characters of a template's own error
_LONGEST_NAME = 256  # characters; the search for longer ones would take time that grows with the square
_IN_GGUF = "the chat template in the GGUF"
_PLACES: tuple[Literal["anywhere", "first", "nowhere"], ...] = ("anywhere", "first", "nowhere")
_PARTS: tuple[tuple[Role, ...], ...] = (
    (),
    ("system", "user", "assistant"),
    ("user",),
    ("system", "user"),
    ("user", "assistant"),
    ("system",),
    ("assistant",),
    ("system", "assistant"),
)


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
    because tokenizers find user-defined tokens in any text; `nul` stands for NUL.
    """

    gap: str
    cut: str
    nul: str


@dataclass(frozen=True, slots=True)
class Template:
    """A member's template, whether it is the plain transcript, and one-line remarks on what it does not show."""

    render: Render
    plain: bool
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Form:
    """How a template takes a conversation.

    The roles in `parts` have a list of parts as their content. `system` says where system messages may stand; those
    that may not go into the user message behind them. `tools` says whether the variable is given, as None.
    """

    parts: tuple[Role, ...] = ()
    system: Literal["anywhere", "first", "nowhere"] = "anywhere"
    tools: bool = True


class PromptWriter:
    """Writes one member's prompts, by its template and in its vocabulary."""

    def __init__(self, vocabulary: Vocabulary, render: Render) -> None:
        self._vocabulary = vocabulary
        self._render = render
        # A mark cannot break up a single character, so such tokens are not recognised in templates either.
        self._control = Names(text for text in vocabulary.control if 1 < len(text) <= _LONGEST_NAME)
        self._markup = Names(text for text in vocabulary.markup if len(text) <= _LONGEST_NAME)

    def prompt(self, messages: Sequence[Message], watch: Watch = lambda _: None) -> IntArray:
        """The ids of the prompt up to where the reply starts, BOS exactly once: int32 (tokens,).

        `watch` hears how many there are at least so far; what it raises ends the work. Raises InputError when the
        template refuses the conversation.
        """
        marks = _free_marks(messages)
        marked = [Message(m.role, self._protected(m, marks)) for m in messages]
        ids = self._encode(self._render(marked), marks, watch)
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
            return content  # a reply may have the tokens of the markup: models write them
        return self._markup.replace(content, lambda name: name[0] + marks.cut + name[1:])

    def _encode(self, text: str, marks: "_Marks", watch: Watch) -> list[int]:
        """The ids of what was rendered: control tokens by name, what stands between them tokenised as text."""
        ids: list[int] = []
        at_start = True
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
            fragment = fragment.lstrip(_SPACE) if strip_right else fragment
            yield fragment.rstrip(_SPACE) if left else fragment, token
            position, strip_right = end, right
        yield text[position:].lstrip(_SPACE) if strip_right else text[position:], None


def choose_template(wanted: str | None, own: str | None, tokens: dict[str, str]) -> Template:
    """The template a member is to use.

    `wanted` is the member's `chat_template` setting: None, "plain", an absolute path or one of llama.cpp's names;
    `own` is the template in the GGUF; `tokens` has the texts of `bos_token` and `eos_token`. Raises ConfigError when
    the template cannot be used, or leaves out the message that is to be answered.
    """
    if wanted == "plain" or (wanted is None and own is None):
        return Template(render_plain, plain=True)
    if wanted is None:
        where, render = _IN_GGUF, jinja_render(str(own), tokens, _IN_GGUF)
    elif "\0" in wanted:
        raise ConfigError(f"chat_template = {wanted!r}: has a NUL character")
    elif Path(wanted).is_absolute():
        where, render = wanted, jinja_render(_read(Path(wanted)), tokens, wanted)
    else:
        where, render = f'chat_template = "{wanted}"', built_in_render(wanted)
    return Template(render, plain=False, remarks=_remarks(render, where))


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
    """One of llama.cpp's built-in templates, by its name there. Raises ConfigError when there is none of this name."""

    def attempt(messages: Sequence[Message], form: _Form) -> str:
        return render_built_in(name, [(m.role, m.content) for m in _placed(messages, form)])

    return _in_its_form(attempt, [_Form(system=place) for place in _PLACES])


def jinja_render(source: str, tokens: dict[str, str], where: str) -> Render:
    """A Jinja chat template, in the dialect of Hugging Face's transformers. `where` names it in errors.

    Raises ConfigError when Jinja cannot read it.
    """
    environment = Sandbox()
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now, **tokens)
    try:
        source.encode()
        template = environment.from_string(source)
    except UnicodeEncodeError:
        raise ConfigError(f"{where} is not UTF-8: set chat_template") from None
    except Exception as error:  # Jinja's own, and Python's of code that is nested too deeply
        raise ConfigError(f"{where} is not a template that Jinja can read: {_in_a_line(error)}") from None

    def attempt(messages: Sequence[Message], form: _Form) -> str:
        listed = [{"role": m.role, "content": _content(m, form)} for m in _placed(messages, form)]
        given = {"tools": None} if form.tools else {}
        try:
            text = environment.write(template, messages=listed, add_generation_prompt=True, **given)
            text.encode()
        except MemoryError:
            raise TemplateMemoryError(f"{where} takes more memory than there is") from None
        except ExcessError as error:
            raise TemplateExcessError(f"{where} refuses the conversation: {_in_a_line(error)}") from None
        except Exception as error:  # a template can do anything that an expression of Python can
            raise InputError(f"{where} refuses the conversation: {_in_a_line(error)}") from None
        return text

    forms = [_Form(parts, place, tools) for tools, place, parts in product((True, False), _PLACES, _PARTS)]
    return _in_its_form(attempt, forms)


def _probe(*roles: Role) -> list[Message]:
    """A conversation of texts that no template has of its own; Python's and JSON's quoting changes them."""
    return [Message(role, f"probe{i}text'\"") for i, role in enumerate(roles)]


_PROBES = (
    _probe("system", "user", "assistant", "system", "user"),
    _probe("system", "user", "assistant", "user"),
    _probe("system", "user"),
    _probe("user"),
)
"""What templates are tried on, in turn: some refuse whatever is longer."""


def _in_its_form(attempt: _Attempt, forms: Sequence[_Form]) -> Render:
    """Render in the form in which the template shows most of a conversation; of equals, the first."""
    best = _best_form(attempt, forms)

    def render(messages: Sequence[Message]) -> str:
        try:
            return attempt(messages, best)
        except InputError as error:
            if not _blames_replies(lambda other: attempt(other, best), messages):
                raise
            raise InputError(f"{error} (this is about an earlier reply: start a new conversation)") from None

    return render


def _blames_replies(render: Render, messages: Sequence[Message]) -> bool:
    """Whether a conversation is refused for what its replies say, such as the marks of channels in a reply."""
    harmless = [replace(m, content="Yes.") if m.role == "assistant" else m for m in messages]
    try:
        render(harmless)
    except InputError:
        return False
    return True


def _best_form(attempt: _Attempt, forms: Sequence[_Form]) -> _Form:
    for probe in _PROBES:
        best, most = forms[0], 0
        for form in forms:
            try:
                text = attempt(probe, form)
            except TemplateMemoryError:
                raise
            except TemplateExcessError:
                return form  # every try takes long
            except InputError:
                continue
            shown = sum(_shows(text, m, whole=m.role in form.parts) for m in probe)
            if shown > most:
                best, most = form, shown
            if most == len(probe):
                return best
        if most:
            return best
    return forms[0]


def _shows(text: str, message: Message, *, whole: bool) -> bool:
    """Whether a probe's message is in the text; as a `whole`, not as part of a quoted list."""
    wanted = message.content if whole else message.content[:-2]
    return wanted in text if whole else wanted in text.lower()


def _remarks(render: Render, where: str) -> tuple[str, ...]:
    """What a user should know of a template. Raises ConfigError when it leaves out the message to be answered."""
    for probe in _PROBES[1:]:
        try:
            text = render(probe)
        except TemplateExcessError:
            return ()
        except InputError:
            continue  # what it refuses, it refuses in a line when it is asked
        *earlier, last = (_shows(text, m, whole=False) for m in probe)
        if not last:
            raise ConfigError(
                f'{where} leaves out the message that is to be answered: set chat_template to another, or to "plain"'
            )
        names = {"system": "the system message", "user": "earlier messages", "assistant": "earlier replies"}
        lost = [names[m.role] for m, shown in zip(probe, earlier, strict=False) if not shown]
        return (f"its chat template leaves out: {', '.join(lost)}",) if lost else ()
    return ()


def _placed(messages: Sequence[Message], form: _Form) -> list[Message]:
    """The messages, with system messages where the template takes them: the others open the user message behind."""
    if form.system == "anywhere":
        return list(messages)
    placed: list[Message] = []
    held: list[str] = []
    for message in messages:
        if message.role == "system" and (placed or held or form.system == "nowhere"):
            held.append(message.content)
        elif message.role == "user":
            placed.append(replace(message, content="\n\n".join([*held, message.content])))
            held = []
        else:
            placed.append(message)
    return placed


def _content(message: Message, form: _Form) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": message.content}] if message.role in form.parts else message.content


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).encode(errors="backslashreplace").decode().split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _free_marks(messages: Sequence[Message]) -> _Marks:
    used = set().union(*(m.content for m in messages))
    free = [mark for mark in _NONCHARACTERS if mark not in used]
    if len(free) < 3:
        raise InputError("the conversation uses up the code points U+FDD0 to U+FDEF, which are not characters")
    return _Marks(*free[:3])


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():  # a device may have no end
        raise ConfigError(f"chat_template = {path}: not a regular file")
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"chat_template = {path}: cannot be read: {reason}") from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers write it: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
