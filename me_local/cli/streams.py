"""The standard streams, made safe for every command: no text breaks them, and none reaches a terminal raw.

Models, templates, headers of models and names of files may hold any character. What is printed, logged or raised passes
through here; only the consoles of `display`, which write colours, pass it by, and take controls out themselves.
"""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# These would move the cursor, change the terminal, or show what follows in another order.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor or change its state."""
    return _CONTROLS.sub("\ufffd", text.replace("\r\n", "\n"))


class Screen:
    """A stream that is, or may become, what a terminal shows: only what is printable goes to the `raw` one."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        """Write the text; its length."""
        self.raw.write(printable(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write them one after the other."""
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw(stream: TextIO) -> TextIO:
    """The stream itself, for those who write colours and have taken other controls out."""
    return stream.raw if isinstance(stream, Screen) else stream


@contextmanager
def safe_streams() -> Iterator[None]:
    """While inside, standard output and error are there and take every text.

    What the encoding of the locale lacks is replaced. Control characters never reach stderr, nor a terminal; where
    standard output is none, replies stay as they are.
    """
    _open_missing()
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    safe = (_screen(sys.stdout) if sys.stdout.isatty() else sys.stdout, _screen(sys.stderr))
    sys.stdout, sys.stderr = safe
    try:
        yield
    finally:  # click puts another in the place of one whose reader has gone, which has to stay
        sys.stdout = before[0] if sys.stdout is safe[0] else sys.stdout
        sys.stderr = before[1] if sys.stderr is safe[1] else sys.stderr


def _screen(stream: TextIO) -> TextIO:
    return cast(TextIO, Screen(stream))


def _open_missing() -> None:
    """Put nothing in the place of standard streams that were closed before the start (`<&-`)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
