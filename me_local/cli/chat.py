"""`me-local chat`: a conversation at the terminal, or one turn per line of standard input."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click

from me_local.chat import Chat
from me_local.cli.commands import run_command
from me_local.cli.display import Painter, make_console
from me_local.cli.input import read_lines
from me_local.cli.interrupt import cancels
from me_local.cli.options import configured, load, models_option, sampling_options
from me_local.cli.session import Session
from me_local.cli.sessions import SessionFile, last_session, new_session, session_names, state_folder
from me_local.cli.shaping import Sectioned
from me_local.errors import InputError, MeLocalError


def _complete_session(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in session_names() if name.startswith(incomplete)]


@click.command(cls=Sectioned)
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
    with ExitStack() as stack:
        file = last_session() if last else None if name is None else SessionFile(name)
        if file:
            stack.enter_context(closing(file))
        ensemble = stack.enter_context(load(config, no_color=no_color))
        session = Session(Chat(ensemble), Painter(console, ensemble.names), notes, file)
        session.greet()
        if not sys.stdin.isatty():
            _converse(session, read_lines())
            return
        session.file = session.file or _begun(session, stack)
        with cancels(session.interrupted.set):
            _converse(session, _typed(session))
        if not file:
            session.part()


def _begun(session: Session, stack: ExitStack) -> SessionFile | None:
    """The file of a new session, None where none can be kept."""
    try:
        return stack.enter_context(closing(new_session()))
    except InputError as error:
        session.note(f"Note: this conversation is not kept: {error}")
        return None


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
    prompt = _prompt_session(session.chat.ensemble.names, list(session.chat.config.presets))
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


def _prompt_session(names: Sequence[str], presets: Sequence[str]) -> Any:
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
        completer=ChatCompleter(names, presets),
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
