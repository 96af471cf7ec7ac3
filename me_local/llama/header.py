"""The header of a GGUF file, copied without the tensors: what a vocabulary file is made of.

Values are copied byte for byte, whatever they are. The gguf package would decode each token and encode it again, which
changes texts that are not UTF-8; and it wants the whole file, of which this reads the beginning. Knows nothing of
what the values mean, but for the few that say what a file is.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from me_local.errors import InputError
from me_local.gguf import Cursor, DamagedError, beginning, pass_value

_MOST = 1 << 28  # bytes of a header; known ones take 20 MB, and a damaged one must not have all tensors read
_PARTS = b"split."  # of keys that say which parts of a model belong together
_TOKENS = b"tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class Header:
    """All of a GGUF file but its tensors: `data` is such a file, with a vocabulary of so many `tokens`."""

    data: bytes
    tokens: int


def read_header(path: Path) -> Header:
    """The header of a GGUF file, of which the rest need not be there; of a model in parts, of the first one.

    Raises InputError where it is none, or has no vocabulary.
    """
    try:
        if path.exists() and not path.is_file():  # a device may have no end
            raise InputError(f"{path}: not a regular file")
        with path.open("rb") as file:
            return _copy(Cursor(file, _MOST))
    except DamagedError as error:
        raise InputError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # a path with a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read: {reason}") from None


def _copy(cursor: Cursor) -> Header:
    version, _, count = beginning(cursor)
    values, keys, tokens = list[tuple[int, int]](), set[bytes](), 0
    for _ in range(count):
        start = cursor.at
        key = cursor.string()
        if not key or key in keys:
            raise DamagedError(f"its header is damaged: a key is empty, or there twice, at byte {start:,}")
        keys.add(key)
        length = pass_value(cursor)
        if key == _TOKENS:
            tokens = length
        if not key.startswith(_PARTS):
            values.append((start, cursor.at))
    if not tokens:
        raise DamagedError(f"it has no vocabulary ({_TOKENS.decode()}); of a model in parts the first one has it")
    front = struct.pack("<4sIQQ", b"GGUF", version, 0, len(values))
    return Header(front + b"".join(bytes(cursor.data[a:b]) for a, b in values), tokens)
