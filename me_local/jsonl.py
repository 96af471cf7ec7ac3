"""JSON Lines: an object on each line, written so that all readers see one line; errors name the file and the line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from me_local.errors import InputError

# Python and many clients end a line at U+0085, U+2028 and U+2029 too, a terminal may obey the other controls here, and
# half a surrogate pair is no UTF-8. JSON itself escapes the controls below U+0020.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def json_text(value: object, *, indent: int | None = None, compact: bool = False) -> str:
    """A value as JSON: text that UTF-8 can hold, in which no line ends and no control character stands raw."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=(",", ":") if compact else None)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The object on one line. Raises InputError for anything else; `where` is the line's place in its message."""
    try:
        record = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: must be an object")
    return record


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place, as errors name it, and the object of each line that is not blank.

    Raises InputError when the file cannot be read, has no objects, or has a line that is none.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: it is empty; a JSON object per line is wanted")
    for where, line in numbered:
        yield where, parse_object(line, where)


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """The text of a field. Raises InputError when it is missing, blank, no text, or text that UTF-8 cannot hold."""
    if key not in record:
        raise InputError(f'{where}: "{key}" is missing')
    return checked_text(record[key], key, where)


def checked_text(value: Any, key: str, where: str) -> str:
    """`value`, which is the field `key` or stands in it, if it is a text that `text_of` takes. Raises InputError."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key}: must be a text that is not blank, got {json.dumps(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {key}: half a surrogate pair at character {error.start + 1}") from None
    return value
