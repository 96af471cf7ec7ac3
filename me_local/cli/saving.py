"""Commands that take a conversation out of a chat, or into it: /save, /load, /export and /copy."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from me_local.cli.display import print_reply
from me_local.cli.session import Session
from me_local.errors import InputError
from me_local.jsonl import json_text
from me_local.system.files import replace_file
from me_local.text.messages import Message

_PROGRAMS = (
    ("WAYLAND_DISPLAY", ("wl-copy",)),
    ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("DISPLAY", ("xsel", "--clipboard", "--input")),
    ("", ("pbcopy",)),
    ("", ("clip.exe",)),
)
"""Programs that fill a clipboard, and the variable of the environment that each needs."""


def save(session: Session, name: str) -> None:
    """/save FILE."""
    path = _file(name, "/save")
    if not session.chat.messages:
        raise InputError("/save: the conversation is empty")
    _write(path, f"{json_text(session.chat.as_dict(), indent=1)}\n", "/save")
    session.note(f"Saved {len(session.chat.messages)} messages to {path}.")


def load(session: Session, name: str) -> None:
    """/load FILE."""
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


def export(session: Session, argument: str) -> None:
    """/export md [FILE]."""
    kind, _, name = argument.partition(" ")
    if kind != "md":
        raise InputError("/export: must look like /export md, or /export md FILE")
    if not session.chat.messages:
        raise InputError("/export: the conversation is empty")
    text = as_markdown(session.chat.system, session.chat.messages)
    if not name.strip():
        print_reply(text)
        return
    path = _file(name.strip(), "/export")
    _write(path, text, "/export")
    session.note(f"Wrote {len(session.chat.messages)} messages to {path}.")


def as_markdown(system: str | None, messages: list[Message]) -> str:
    """A conversation as Markdown: a heading for each message, thoughts folded."""
    parts = [f"## System\n\n{system}\n"] if system else []
    for message in messages:
        title = "User" if message.role == "user" else "Assistant"
        thought = f"<details><summary>Thought</summary>\n\n{_closed(message.thought)}\n\n</details>\n\n"
        parts.append(f"## {title}\n\n{thought if message.thought else ''}{_closed(message.content)}\n")
    return "\n".join(parts)


def _closed(text: str) -> str:
    """The text with an end for a block of code that was cut off, which would take in all that follows."""
    fences = re.findall(r"^ {0,3}(```+|~~~+)", text, re.MULTILINE)
    return f"{text}\n{fences[-1]}" if len(fences) % 2 else text


def copy(session: Session, _: str) -> None:
    """/copy: the last reply, by a program for the clipboard here, else by asking the terminal (OSC 52)."""
    replies = [message for message in session.chat.messages if message.role == "assistant"]
    if not replies:
        raise InputError("/copy: there is no reply yet")
    text = replies[-1].content
    program = None if os.environ.get("SSH_CONNECTION") else _program()
    if program:
        _hand_to(program, text)
        session.note(f"Copied the last reply, by {program[0]}.")
    elif sys.stdout.isatty():
        file = session.painter.console.file
        file.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07")
        file.flush()
        session.note("Asked the terminal to copy the last reply (OSC 52); some do so only where that is allowed.")
    else:
        raise InputError("/copy: neither a terminal nor one of wl-copy, xclip, xsel, pbcopy, clip.exe is here")


def _program() -> tuple[str, ...] | None:
    usable = (program for variable, program in _PROGRAMS if not variable or os.environ.get(variable))
    return next((program for program in usable if shutil.which(program[0])), None)


def _hand_to(program: tuple[str, ...], text: str) -> None:
    encoding = "utf-16" if program[0] == "clip.exe" else "utf-8"
    nowhere = subprocess.DEVNULL  # some stay behind to serve the clipboard, and would hold these open
    try:
        subprocess.run(program, input=text.encode(encoding), stdout=nowhere, stderr=nowhere, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"/copy: {program[0]}: {_reason(error)}") from None


def _write(path: Path, text: str, command: str) -> None:
    try:
        replace_file(path, text.encode())
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{command}: {path}: {_reason(error)}") from None


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
