"""Standard input as text, however other systems wrote it."""

import sys
from collections.abc import Iterator

from me_local.errors import InputError

_BOM = "\ufeff"


def read_text() -> str:
    """All of standard input, without a byte order mark and one end of a line. Raises InputError."""
    return _without_end(_decoded(sys.stdin.buffer.read(), "standard input").removeprefix(_BOM))


def read_lines() -> Iterator[str]:
    """The lines of standard input, without their ends. Raises InputError that names the line."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        text = _decoded(line, f"standard input, line {number}")
        yield _without_end(text.removeprefix(_BOM) if number == 1 else text)


def argument_text(argument: str, name: str) -> str:
    """An argument, which Python decoded by the locale. Raises InputError where that failed."""
    for position, character in enumerate(argument):
        if "\ud800" <= character <= "\udfff":  # how Python keeps a byte that is no text
            at = len(argument[:position].encode("utf-8")) + 1
            raise InputError(f"{name}: not UTF-8 at byte {at}")
    return argument


def _decoded(data: bytes, where: str) -> str:
    """The text of these bytes: UTF-8, or else in the encoding of the locale."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        reason = InputError(f"{where}: not UTF-8 at byte {error.start + 1}")
    try:
        return data.decode(sys.stdin.encoding)
    except UnicodeDecodeError:
        raise reason from None


def _without_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
