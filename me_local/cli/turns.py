"""Commands on the last message of a chat: /edit, /undo, /retry and /pick."""

import os
import sys

import click
from rich.table import Table

from me_local.cli.session import Session
from me_local.errors import InputError

_MOST_REPLIES = 20


def edit(session: Session, text: str) -> None:
    """/edit [TEXT]: without a text in $VISUAL or $EDITOR, or else in the input line."""
    message = session.chat.last_message()
    if text:
        session.show(session.chat.edit(session.message(text)))
        return
    line = session.line(message)
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not sys.stdin.isatty():
        raise InputError("/edit: the text is missing; without a terminal it stands behind /edit")
    if not editor:
        session.draft = line
        return
    edited = _edited(line, editor)
    if edited is None or edited == line:
        session.note("The message is as it was.")
        return
    session.draft = edited  # what was written is not lost where it cannot be sent
    turn = session.chat.edit(session.message(edited))
    session.draft = ""
    session.show(turn)


def _edited(line: str, editor: str) -> str | None:
    try:
        edited = click.edit(line, editor=editor, extension=".md", require_save=False)
    except click.ClickException as error:
        raise InputError(f"/edit: {error.message}") from None
    except OSError as error:
        raise InputError(f"/edit: {editor} left no text: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"/edit: the text is not UTF-8 at byte {error.start + 1}") from None
    return edited if edited is None else edited.rstrip("\n")


def undo(session: Session, _: str) -> None:
    """/undo."""
    session.note(f"Taken back: {beginning(session.chat.undo())}")


def retry(session: Session, argument: str) -> None:
    """/retry [N]: so many more replies to the last message."""
    count = _number(argument or "1", "/retry", _MOST_REPLIES)
    for _ in range(count):
        turn = session.chat.again()
        if count > 1:
            session.note(f"Reply {max(2, len(session.chat.replies()) + 1)}:")
        session.show(turn)
        if turn.reply.finish_reason == "cancelled":
            break
    total = len(session.chat.replies())
    if total > 1:
        session.note(f"{total} replies; /pick N goes on with another than this last one.")


def pick(session: Session, argument: str) -> None:
    """/pick [N]: go on with another reply, or list them."""
    chat = session.chat
    if argument:
        number = _number(argument, "/pick", len(chat.replies()))
        session.note(f"Reply {number}: {beginning(chat.pick(number).content)}")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for number, turn in enumerate(chat.replies(), start=1):
        here = "*" if turn.messages[1] == chat.messages[-1] else ""
        table.add_row(f"{here}{number}", turn.by or "ensemble", beginning(turn.messages[1].content))
    session.notes.print(table)


def beginning(text: str) -> str:
    """The first words of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _number(text: str, command: str, most: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise InputError(f'{command}: must be a number from 1 to {most}, got "{text}"')
    return int(text)
