"""The header of a GGUF file, copied without the tensors: what a vocabulary file is made of.

Values are copied byte for byte, whatever they are. The gguf package would decode each token and encode it again, which
changes texts that are not UTF-8; and it wants the whole file, of which this reads the beginning. Knows nothing of
what the values mean, but for the few that say what a file is.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from me_local.errors import InputError

_CHUNK = 1 << 20  # bytes
_MOST = 1 << 28  # bytes of a header; known ones take 20 MB, and a damaged one must not have all tensors read
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)  # the first one had lengths of 32 bits, and llama.cpp does not read it any more
_PARTS = b"split."  # of keys that say which parts of a model belong together
_TOKENS = b"tokenizer.ggml.tokens"


class _DamagedError(Exception):
    """What is wrong with a file."""


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
            return _copy(_Cursor(file))
    except _DamagedError as error:
        raise InputError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # a path with a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read: {reason}") from None


class _Cursor:
    """A place in a file, of which as much is read as is needed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._most = min(os.fstat(file.fileno()).st_size, _MOST)
        self.data = bytearray()
        self.at = 0

    def starts_with(self, magic: bytes) -> bool:
        """Whether the file does; the place is behind it then."""
        self.data += self._file.read(_CHUNK)
        self.at = len(magic)
        return self.data.startswith(magic)

    def take(self, size: int) -> int:
        """Go on by so many bytes; where they began."""
        start, end = self.at, self.at + size
        if len(self.data) < end <= self._most:  # lengths are not trusted
            self.data += self._file.read(max(_CHUNK, end - len(self.data)))
        if end > min(len(self.data), self._most):
            raise _DamagedError(f"it ends within its header, or is damaged, at byte {start:,}")
        self.at = end
        return start

    def number(self, size: int) -> int:
        start = self.take(size)
        return int.from_bytes(self.data[start : self.at], "little")

    def string(self) -> bytes:
        start = self.take(self.number(8))
        return bytes(self.data[start : self.at])


def _copy(cursor: _Cursor) -> Header:
    version, count = _beginning(cursor)
    values, keys, tokens = list[tuple[int, int]](), set[bytes](), 0
    for _ in range(count):
        start = cursor.at
        key = cursor.string()
        if not key or key in keys:
            raise _DamagedError(f"its header is damaged: a key is empty, or there twice, at byte {start:,}")
        keys.add(key)
        length = _pass_value(cursor)
        if key == _TOKENS:
            tokens = length
        if not key.startswith(_PARTS):
            values.append((start, cursor.at))
    if not tokens:
        raise _DamagedError(f"it has no vocabulary ({_TOKENS.decode()}); of a model in parts the first one has it")
    beginning = struct.pack("<4sIQQ", b"GGUF", version, 0, len(values))
    return Header(beginning + b"".join(bytes(cursor.data[a:b]) for a, b in values), tokens)


def _beginning(cursor: _Cursor) -> tuple[int, int]:
    """The version of the format, and the number of keys."""
    if not cursor.starts_with(b"GGUF"):
        raise _DamagedError("not a GGUF file (it does not start with the letters GGUF)")
    version = cursor.number(4)
    if version and not version & 0xFFFF:
        raise _DamagedError("a GGUF file for big-endian machines, which llama.cpp does not read here")
    if version not in _VERSIONS:
        raise _DamagedError(f"version {version} of GGUF, where 2 and 3 are known")
    cursor.number(8)  # of tensors
    return version, cursor.number(8)


def _pass_value(cursor: _Cursor) -> int:
    """Go behind a value; how many values there are in it."""
    kind, length = cursor.number(4), 1
    if kind == _ARRAY:
        kind, length = cursor.number(4), cursor.number(8)
    if kind == _STRING:
        for _ in range(length):
            cursor.take(cursor.number(8))
    elif kind in _SIZES:
        cursor.take(length * _SIZES[kind])
    else:
        raise _DamagedError(f"its header is damaged: a value of type {kind} at byte {cursor.at:,}")
    return length
