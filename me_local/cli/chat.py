"""`me-local chat`: a conversation at the terminal, or one turn per line of standard input."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from me_local.chat import Chat
from me_local.cli.commands import run_command
from me_local.cli.display import Painter, make_console
from me_local.cli.input import read_lines
from me_local.cli.interrupt import cancels
from me_local.cli.options import configured, load, models_option, sampling_options
from me_local.cli.session import Session
from me_local.cli.sessions import SessionFile, last_session, new_session, session_names, state_folder
from me_local.errors import InputError, MeLocalError


def _complete_session(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in session_names() if name.startswith(incomplete)]


@click.command()
@models_option
@click.option("--no-color", is_flag=True, help="No colours. NO_COLOR does the same.")
@click.option(
    "--session",
    "name",
    metavar="NAME",
    shell_complete=_complete_session,
    help="Go on with the session of this name, or begin it.",
)
@click.option("--continue", "last", is_flag=True, help="Go on with the session that was written to last.")
@sampling_options
def chat(models: Path, no_color: bool, name: str | None, last: bool, **given: Any) -> None:
    """Chat with the ensemble. /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.

    Without a terminal on standard input each line is a turn.
    """
    if name is not None and last:
        raise InputError("--continue: leave it out beside --session, which names the session")
    config = configured(models, given)
    console, notes = make_console(no_color=no_color), make_console(no_color=no_color, stderr=True)
    with _open(name, last, notes) as file, load(config, no_color=no_color) as ensemble:
        session = Session(Chat(ensemble), Painter(console, ensemble.names), notes, file)
        session.greet()
        if sys.stdin.isatty():
            with cancels(session.interrupted.set):
                _converse(session, _typed(session))
            session.part(named=name is not None or last)
        else:
            _converse(session, read_lines())


@contextmanager
def _open(name: str | None, last: bool, notes: Console) -> Iterator[SessionFile | None]:
    """The session's file: a chat at a terminal begins one where none is named. Raises InputError for one that is."""
    file = None
    try:
        if last:
            file = last_session()
        elif name is not None:
            file = SessionFile(name)
        elif sys.stdin.isatty():
            file = new_session()
    except InputError as error:
        if last or name is not None:
            raise
        notes.print(f"Note: {error}", style="dim")
    with closing(file) if file else nullcontext():
        yield file


def _converse(session: Session, lines: Iterator[str]) -> None:
    for line in lines:
        if not _turn(session, line):
            return


def _turn(session: Session, line: str) -> bool:
    """Answer a line or run the command in it; false when it ends the chat."""
    try:
        try:
            return _answer(session, line)
        finally:
            session.keep()
    except MeLocalError as error:
        if not sys.stdin.isatty():
            raise
        session.note(f"Error: {error}")
    return True


def _answer(session: Session, line: str) -> bool:
    edits, session.draft = bool(session.draft), ""
    if line.startswith("/") and not line.startswith("//"):
        return run_command(session, line)
    if line.strip():
        message = session.message(line)
        session.show(session.chat.edit(message) if edits else session.chat.say(message))
        if session.last and session.last.finish_reason == "cancelled" and not sys.stdin.isatty():
            click.get_current_context().exit(130)  # a script is stopped as a whole
    return True


def _typed(session: Session) -> Iterator[str]:
    """Lines that the user types, until Ctrl-D; Ctrl-C gives up the one being typed."""
    prompt = _prompt_session(session.chat.ensemble.names)
    while True:
        try:
            line = prompt(session.draft)
            session.interrupted.clear()
            yield line
        except KeyboardInterrupt:
            session.draft = ""
            session.note("(Ctrl-D or /exit leaves)")
        except EOFError:
            return


def _prompt_session(names: Sequence[str]) -> Any:
    # Imported here: scripted chats and the other commands do not pay for it.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from me_local.cli.completion import ChatCompleter

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-z")
    def _(event: KeyPressEvent) -> None:
        event.app.suspend_to_background()

    session: PromptSession[str] = PromptSession(
        history=FileHistory(_history_file()),
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        completer=ChatCompleter(names),
        complete_while_typing=False,
    )
    # The terminal gives Ctrl-C as a key here. A signal that comes while it is changing its mode is left to the chat:
    # where it raised an exception, that could end the event loop in the middle of being set up.
    return lambda draft: session.prompt("> ", default=draft, handle_sigint=False)


def _history_file() -> str:
    try:
        history = state_folder() / "history"
        history.touch(mode=0o600)
        if history.is_file():  # one of an earlier version; some link it to /dev/null
            history.chmod(0o600)
    except (OSError, RuntimeError):  # read-only, or a user without a home
        return os.devnull
    return str(history)
