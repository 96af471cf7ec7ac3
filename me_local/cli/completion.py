"""What Tab completes at the input line of a chat: commands, names of members, presets and files."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from me_local.cli.commands import COMMANDS

_MOST_FILES = 1000
_AT = re.compile(r'(?<!\S)@("?)([^"\n]*)$')
_CHOICES: dict[str, Sequence[str]] = {"strategy": ("me", "ce", "union"), "unit": ("token", "word")}


class ChatCompleter(Completer):
    """Completes the line of a chat with these members and presets."""

    def __init__(self, names: Sequence[str], presets: Sequence[str]) -> None:
        self._names = names
        self._choices = _CHOICES | {"preset": presets}

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """What the text in front of the cursor may become."""
        text = document.text_before_cursor
        at = _AT.search(text)
        command, space, argument = text[1:].partition(" ")
        if text.startswith("/") and not space:
            yield from _starting(command, list(COMMANDS))
        elif text.startswith("/") and command in _ARGUMENTS:
            yield from self._argument(command, argument)
        elif at and (at[1] or not re.search(r"\s", at[2])):
            yield from _named(at[1], at[2])

    def _argument(self, command: str, argument: str) -> Iterator[Completion]:
        if command == "weights":
            yield from _starting(argument.rpartition(",")[2], [f"{name}=" for name in self._names])
        elif command in self._choices:
            yield from _starting(argument, self._choices[command])
        elif command != "export":
            yield from _starting(argument, _paths(argument))
        elif argument.startswith("md "):
            yield from _starting(argument[3:], _paths(argument[3:]))
        else:
            yield from _starting(argument, ["md "])


_ARGUMENTS = ("weights", "preset", *_CHOICES, "load", "save", "export")


def _starting(typed: str, words: Sequence[str]) -> Iterator[Completion]:
    for word in words:
        if word.startswith(typed):
            yield Completion(word, start_position=-len(typed))


def _named(quote: str, typed: str) -> Iterator[Completion]:
    """Files behind an @; names with blanks stand between quotes."""
    for path in _paths(typed):
        quoted = f'"{path}' if path.endswith("/") else f'"{path}"'
        text = quoted if quote or re.search(r"\s", path) else path
        yield Completion(text, start_position=-len(quote + typed), display=path)


def _paths(typed: str) -> list[str]:
    """Files and folders whose names begin so, folders with a slash; hidden ones where a dot is typed."""
    folder, start = os.path.split(typed)
    try:
        found = []
        with os.scandir(Path(folder or ".").expanduser()) as entries:
            for entry in entries:
                if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
                    path = typed[: len(typed) - len(start)] + entry.name
                    found.append(f"{path}/" if entry.is_dir() else path)
                if len(found) == _MOST_FILES:
                    break
    except (OSError, ValueError, RuntimeError):
        return []
    return sorted(path for path in found if path.isprintable() and '"' not in path)
