"""`me-local chat`: a conversation at the terminal, or one turn per line of standard input."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from me_local.chat import Chat
from me_local.cli.commands import COMMANDS, Session, run_command
from me_local.cli.display import Painter, make_console
from me_local.cli.input import read_lines
from me_local.cli.interrupt import cancels
from me_local.cli.options import configured, load, models_option, sampling_options
from me_local.cli.shaping import Sectioned
from me_local.errors import MeLocalError


@click.command(cls=Sectioned)
@models_option
@click.option("--no-color", is_flag=True, help="No colours. NO_COLOR does the same.")
@sampling_options
def chat(models: Path, no_color: bool, **given: Any) -> None:
    """Chat with the ensemble. /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.

    Without a terminal on standard input each line is a turn.
    """
    config = configured(models, given)
    console = make_console(no_color=no_color)
    with load(config, no_color=no_color) as ensemble:
        session = Session(
            Chat(ensemble), Painter(console, ensemble.names), make_console(no_color=no_color, stderr=True)
        )
        session.greet()
        if sys.stdin.isatty():
            with cancels(session.interrupted.set):
                _converse(session, _typed(session))
        else:
            _converse(session, read_lines())


def _converse(session: Session, lines: Iterator[str]) -> None:
    for line in lines:
        if not _turn(session, line):
            return


def _turn(session: Session, line: str) -> bool:
    """Answer a line or run the command in it; false when it ends the chat."""
    try:
        if line.startswith("/") and not line.startswith("//"):
            return run_command(session, line)
        if line.strip():
            session.show(session.chat.say(line[1:] if line.startswith("//") else line))
            if session.last and session.last.finish_reason == "cancelled" and not sys.stdin.isatty():
                click.get_current_context().exit(130)  # a script is stopped as a whole
    except MeLocalError as error:
        if not sys.stdin.isatty():
            raise
        session.note(f"Error: {error}")
    return True


def _typed(session: Session) -> Iterator[str]:
    """Lines that the user types, until Ctrl-D; Ctrl-C gives up the one being typed."""
    prompt = _prompt_session()
    while True:
        try:
            line = prompt()
            session.interrupted.clear()
            yield line
        except KeyboardInterrupt:
            session.note("(Ctrl-D or /exit leaves)")
        except EOFError:
            return


def _prompt_session() -> Any:
    # Imported here: scripted chats and the other commands do not pay for it.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

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
        completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
        complete_while_typing=False,
    )
    # The terminal gives Ctrl-C as a key here. A signal that comes while it is changing its mode is left to the chat:
    # where it raised an exception, that could end the event loop in the middle of being set up.
    return lambda: session.prompt("> ", handle_sigint=False)


def _history_file() -> str:
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "me-local"
        history = state / "history"
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        history.touch(mode=0o600)
        if history.is_file():  # one of an earlier version; some link it to /dev/null
            history.chmod(0o600)
    except (OSError, RuntimeError):  # read-only, or a user without a home
        return os.devnull
    return str(history)
