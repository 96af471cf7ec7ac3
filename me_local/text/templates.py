"""Chat templates: from a conversation to the text that a model was trained to see.

How a template takes a conversation (contents as texts or as lists of parts, system messages everywhere or nowhere) is
found by trying, when it is read. Knows nothing of tokens.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol

import jinja2

from me_local.errors import ConfigError, InputError, TemplateExcessError, TemplateMemoryError
from me_local.text.built_in import render_built_in
from me_local.text.messages import Message, Role
from me_local.text.sandbox import ExcessError, Sandbox

Arguments = Mapping[str, Any]
"""Variables for a template, such as `enable_thinking`."""

_NONE: Arguments = {}


class Render(Protocol):
    """Writes a conversation, up to where the reply begins."""

    def __call__(self, messages: Sequence[Message], arguments: Arguments = ...) -> str:
        """The prompt. Raises InputError where the template refuses the conversation."""


_Attempt = Callable[[Sequence["Message"], "_Form", Arguments], str]

PLAIN_STOPS = ("\nUser:", "\n\nUser:")
"""End the reply of an ensemble in which a member sees a plain transcript: the next speaker's label on a new line."""

_PLAIN_OPENING = "The following is a conversation between a user and a helpful, knowledgeable assistant."


_LONGEST = 300  # characters of a template's own error
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
class Template:
    """A member's template, whether it is the plain transcript, and one-line remarks on what it does not show.

    `source` is what it was read from, where it is one of Jinja's.
    """

    render: Render
    plain: bool
    remarks: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True, slots=True)
class _Form:
    """How a template takes a conversation.

    The roles in `parts` have a list of parts as their content. `system` says where system messages may stand; those
    that may not go into the user message behind them. `tools` says whether the variable is given, as None.
    """

    parts: tuple[Role, ...] = ()
    system: Literal["anywhere", "first", "nowhere"] = "anywhere"
    tools: bool = True


def choose_template(wanted: str | None, own: str | None, tokens: dict[str, str]) -> Template:
    """The template a member is to use.

    `wanted` is the member's `chat_template` setting: None, "plain", an absolute path or one of llama.cpp's names;
    `own` is the template in the GGUF; `tokens` has the texts of `bos_token` and `eos_token`. Raises ConfigError when
    the template cannot be used, or leaves out the message that is to be answered.
    """
    if wanted == "plain" or (wanted is None and own is None):
        return Template(render_plain, plain=True)
    if wanted and "\0" in wanted:
        raise ConfigError(f"chat_template = {wanted!r}: has a NUL character")
    if wanted and not Path(wanted).is_absolute():
        render = built_in_render(wanted)
        return Template(render, plain=False, remarks=_remarks(render, f'chat_template = "{wanted}"'))
    where, source = (wanted, _read(Path(wanted))) if wanted else (_IN_GGUF, str(own))
    render = jinja_render(source, tokens, where)
    return Template(render, plain=False, remarks=_remarks(render, where), source=source)


def render_plain(messages: Sequence[Message], arguments: Arguments = _NONE) -> str:
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

    def attempt(messages: Sequence[Message], form: _Form, arguments: Arguments) -> str:
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

    names = ("reasoning_content",) if "reasoning_content" in source else ("thinking", "reasoning")

    def listed(message: Message, form: _Form) -> dict[str, Any]:
        thought = dict.fromkeys(names, message.thought) if message.thought else {}
        return {"role": message.role, "content": _content(message, form), **thought}

    def attempt(messages: Sequence[Message], form: _Form, arguments: Arguments) -> str:
        given = {"add_generation_prompt": True} | ({"tools": None} if form.tools else {}) | dict(arguments)
        try:
            text = environment.write(template, messages=[listed(m, form) for m in _placed(messages, form)], **given)
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

    def render(messages: Sequence[Message], arguments: Arguments = _NONE) -> str:
        try:
            return attempt(messages, best, arguments)
        except InputError as error:
            if not _blames_replies(lambda other: attempt(other, best, arguments), messages):
                raise
            raise InputError(f"{error} (this is about an earlier reply: start a new conversation)") from None

    return render


def _blames_replies(render: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> bool:
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
                text = attempt(probe, form, _NONE)
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
