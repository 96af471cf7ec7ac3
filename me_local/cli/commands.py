"""The commands inside a chat, and those of them that show or change its settings."""

from collections.abc import Callable

from rich.table import Table

from me_local.cli.comparing import compare
from me_local.cli.display import stats_line
from me_local.cli.saving import copy, export, load, save
from me_local.cli.session import Session
from me_local.cli.sessions import session_names
from me_local.cli.turns import edit, pick, retry, undo
from me_local.config import Overrides
from me_local.errors import InputError
from me_local.settings import parse_setting, parse_weights


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
    session.note('The text of a file is put in by its name, @notes.txt or @"my notes.txt"; for an @ itself write @@.')
    session.note("Tab completes, Alt-Enter starts a new line, Ctrl-C stops a reply, Ctrl-Z suspends, Ctrl-D leaves.")


def _clear(session: Session, _: str) -> None:
    session.chat.clear()
    session.note("The conversation is empty.")


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


def _session(session: Session, name: str) -> None:
    if session.file is None:
        raise InputError("/session: this conversation is not kept; /save FILE writes it to a file")
    if name:
        session.file.rename(name)
        session.note(f"This is session {name}.")
        return
    here = session.file.name
    session.note("\n".join([f"* {here}", *(f"  {other}" for other in session_names() if other != here)]))


COMMANDS: dict[str, tuple[str, Callable[[Session, str], None]]] = {
    "help": ("list the commands", _help),
    "clear": ("forget the conversation", _clear),
    "edit": ("[TEXT]: another last message, in $EDITOR or here, and a reply to it", edit),
    "undo": ("take back the last message and its reply", undo),
    "retry": ("[N]: another reply to the last message, or N more", retry),
    "pick": ("[N]: go on with the N-th reply to the last message, or list them", pick),
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
    "compare": ("each member's own reply to the last message, beside the ensemble's", compare),
    "copy": ("copy the last reply to the clipboard", copy),
    "export": ("md [FILE]: the conversation as Markdown, here or in a file", export),
    "save": ("FILE: write the conversation to a file", save),
    "load": ("FILE: read a conversation from a file", load),
    "session": ("[NAME]: list the sessions, or name this one", _session),
    "exit": ("leave", lambda _session, _: None),
}
