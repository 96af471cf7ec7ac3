"""The commands inside a chat, /help and its kin, and the session that they work on."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from me_local.chat import Chat, Turn
from me_local.cli.display import Notices, Painter, stats_line
from me_local.cli.interrupt import cancels
from me_local.cli.thoughts import ThoughtView
from me_local.config import Overrides
from me_local.decoding.reply import Reply
from me_local.errors import InputError
from me_local.jsonl import json_text
from me_local.settings import parse_setting, parse_weights
from me_local.system.files import replace_file

_STRATEGIES = {
    ("me", "token"): "ME draws one member for each piece",
    ("me", "word"): "ME draws one member for each word",
    ("ce", "token"): "CE averages all members for each piece",
    ("union", "token"): "CE averages all members over the union of their candidates for each piece, as UniTE does",
}


@dataclass(slots=True)
class Session:
    """A chat on a terminal: replies go to the painter's console, everything else to `notes`.

    `interrupted` is set by a Ctrl-C outside a reply, since the last line was typed.
    """

    chat: Chat
    painter: Painter
    notes: Console
    last: Reply | None = None
    interrupted: threading.Event = field(default_factory=threading.Event)
    _notices: Notices = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing told."""
        self._notices = Notices(self.chat.ensemble, lambda text: self.note(f"Note: {text}"))

    def greet(self) -> None:
        """Show the members and what their user should know about them."""
        self.notes.print(self.painter.legend(self._weights()))
        config = self.chat.config
        self.note(f"{_STRATEGIES[config.strategy, config.unit]}. /help lists the commands.")
        self._notices.tell()

    def note(self, text: str) -> None:
        """Write a line that is not part of a reply."""
        self.notes.print(text, style="dim", soft_wrap=not self.notes.is_terminal)

    def show(self, turn: Turn) -> None:
        """Stream a reply, then its line of figures; Ctrl-C ends it early."""
        if self.chat.dropped:
            self.note(f"Note: the context is full: this reply does not see the oldest {self.chat.dropped} messages")
        try:
            with cancels(turn.cancel):
                if self.interrupted.is_set():  # while the prompt was being made
                    turn.cancel()
                self._stream(turn)
        finally:
            self.painter.end()
            self.last = turn.reply
            self.note(stats_line(self.last))
            self._notices.tell()

    def _stream(self, turn: Turn) -> None:
        view = ThoughtView(self.painter.console)
        try:
            for pieces, step in enumerate(turn):
                view.write(step.thought)
                if step.answer:
                    view.fold(pieces)
                    self.painter.write(step.answer, step.member)
        finally:
            reply = turn.reply
            view.write(reply.rest.thought)
            view.fold(reply.thought_pieces)
            self.painter.write(reply.rest.answer, "")

    def _weights(self) -> list[float]:
        return [member.weight for member in self.chat.config.members]


def run_command(session: Session, line: str) -> bool:
    """Run a line that starts with a slash; false when it ends the chat. Raises MeLocalError."""
    name, _, argument = line[1:].strip().partition(" ")
    if name in ("exit", "quit"):
        return False
    if name not in COMMANDS:
        raise InputError(f'there is no command "/{name}"; /help lists them; begin a message with // to send a slash')
    COMMANDS[name][1](session, argument.strip())
    return True


def _help(session: Session, _: str) -> None:
    session.note("\n".join(f"/{name:<9} {text}" for name, (text, _) in COMMANDS.items()))
    session.note("A message that begins with a slash is written with two: //etc/hosts.")
    session.note("Alt-Enter starts a new line, Ctrl-C stops a reply, Ctrl-Z suspends, Ctrl-D leaves.")


def _clear(session: Session, _: str) -> None:
    session.chat.clear()
    session.note("The conversation is empty.")


def _regen(session: Session, _: str) -> None:
    session.show(session.chat.again())


def _system(session: Session, text: str) -> None:
    session.chat.set_system(text or None)
    session.note(f"System message: {text}" if text else "No system message.")


def _set(session: Session, argument: str) -> None:
    key, _, value = argument.partition(" ")
    session.chat.set(parse_setting(key, value.strip()))
    session.note(f"{key} = {value.strip()}")


def _weights(session: Session, argument: str) -> None:
    if argument:
        session.chat.set(Overrides(weights=parse_weights(argument, session.chat.ensemble.names)))
    session.notes.print(session.painter.legend([member.weight for member in session.chat.config.members]))


def _strategy(session: Session, argument: str) -> None:
    if argument:
        session.chat.set(parse_setting("strategy", argument))
    session.note(f"strategy = {session.chat.config.strategy}")


def _unit(session: Session, argument: str) -> None:
    if argument:
        session.chat.set(parse_setting("unit", argument))
    session.note(f"unit = {session.chat.config.unit}")


def _preset(session: Session, name: str) -> None:
    if name:
        session.chat.set(Overrides(preset="" if name == "-" else name))
    config = session.chat.config
    names = ", ".join(config.presets) or "none: models.toml has no [presets.NAME]"
    session.note(f"preset = {config.preset or '-'}" if name else f"Presets: {names}; now: {config.preset or '-'}")


def _members(session: Session, _: str) -> None:
    table = Table("member", "weight", "model", "context", "template", box=None, pad_edge=False)
    for member, settings in zip(session.chat.ensemble.members, session.chat.config.members, strict=True):
        template = settings.chat_template or ("plain" if member.name in session.chat.ensemble.plain else "GGUF")
        table.add_row(member.name, f"{settings.weight:.3f}", member.summary, str(member.n_ctx), template)
    session.notes.print(table)


def _stats(session: Session, _: str) -> None:
    if session.last is None:
        session.note("There is no reply yet.")
        return
    titles = ("member", "pieces", "calls", "prompt new", "prompt cached", "text tokens", "prompt s", "text s")
    table = Table(*titles, box=None, pad_edge=False)
    for u in session.last.usage:
        counts = (u.calls, u.prompt_evaluated, u.prompt_cached, u.text_evaluated)
        seconds = (f"{u.prompt_seconds:.2f}", f"{u.text_seconds:.2f}")
        table.add_row(u.member, f"{u.pieces:.1f}", *map(str, counts), *seconds)
    session.notes.print(table)
    session.note(stats_line(session.last))


def _thought(session: Session, _: str) -> None:
    replies = [message for message in session.chat.messages if message.role == "assistant"]
    session.note(replies[-1].thought if replies and replies[-1].thought else "The last reply has no thought.")


def _save(session: Session, name: str) -> None:
    path = _file(name, "/save")
    try:
        replace_file(path, f"{json_text(session.chat.as_dict(), indent=1)}\n".encode())
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"/save: {path}: {_reason(error)}") from None
    session.note(f"Saved {len(session.chat.messages)} messages to {path}.")


def _load(session: Session, name: str) -> None:
    path = _file(name, "/load")
    try:
        session.chat.restore(json.loads(path.read_text("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise InputError(f"/load: {path}: not UTF-8 at byte {error.start + 1}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"/load: {path}: not JSON: {error}") from None
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"/load: {path}: {_reason(error)}") from None
    session.note(f"Loaded {len(session.chat.messages)} messages from {path}.")


def _file(name: str, command: str) -> Path:
    if not name:
        raise InputError(f"{command}: the name of a file is missing")
    try:
        path = Path(name).expanduser()
        special = path.exists() and not path.is_file() and not path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{command}: {name}: {_reason(error)}") from None
    if special:  # a device may have no end, and must not be replaced by a file
        raise InputError(f"{command}: {name}: not a regular file")
    return path


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else str(error)


COMMANDS: dict[str, tuple[str, Callable[[Session, str], None]]] = {
    "help": ("list the commands", _help),
    "clear": ("forget the conversation", _clear),
    "regen": ("another reply to the last message", _regen),
    "system": ("TEXT: set the system message; without a text, remove it", _system),
    "set": (
        "KEY VALUE: temperature, top_k, stop, seed, any other key of [sampling] in models.toml; decode; "
        "template_args NAME=VALUE",
        _set,
    ),
    "preset": ("list the presets of models.toml, or take one: NAME; -: none", _preset),
    "weights": ("show the members' weights, or set them: 0.7,0.3 or a=0.7,b=0.3", _weights),
    "strategy": ("show the strategy, or set it: me, ce or union", _strategy),
    "unit": ("show what a member is drawn for, or set it: token or word (word needs me)", _unit),
    "members": ("show the members", _members),
    "thought": ("show the thought of the last reply", _thought),
    "stats": ("show the figures of the last reply", _stats),
    "save": ("FILE: write the conversation to a file", _save),
    "load": ("FILE: read a conversation from a file", _load),
    "exit": ("leave", lambda _session, _: None),
}
