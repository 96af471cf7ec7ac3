"""The format of GGUF headers: a cursor that reads no more of a file than it must, and trusts nothing it reads.

Knows nothing of what keys and values mean, nor of tensors. What is wrong with a file is a `DamagedError`.
"""

import os
import re
import struct
from io import BufferedReader

_CHUNK = 1 << 20  # bytes
_MANY = 1000  # texts
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {kind: struct.Struct("<" + format_) for kind, format_ in _FORMATS.items()}
_LENGTH = struct.Struct("<Q")
_VERSIONS = (2, 3)  # the first one had lengths of 32 bits, and llama.cpp does not read it any more
_SPLIT = re.compile(r"(?P<start>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)

Scalar = int | float | bool | bytes
Known = dict[int, list[bytes]]
"""Lists of texts that were read before, by how many texts they have."""


class DamagedError(Exception):
    """What is wrong with a file."""


class Cursor:
    """A place in a file, of which as much is read as is needed, up to `most` bytes.

    `data` begins with what is read. Cursors that are given the same `known` know long lists of texts again, which many
    files have in common: to compare them is much faster than to go from text to text. One after the other may have the
    same `buffer`.
    """

    def __init__(
        self, file: BufferedReader, most: int, known: Known | None = None, buffer: bytearray | None = None
    ) -> None:
        self._file = file
        self._known: Known = {} if known is None else known
        self._most = min(os.fstat(file.fileno()).st_size, most)
        self._read = 0  # bytes
        self.data = bytearray() if buffer is None else buffer
        self.at = 0

    def starts_with(self, magic: bytes) -> bool:
        """Whether the file does; the place is behind it then."""
        self.at = len(magic)
        return self.reach(self.at) and self.data.startswith(magic)

    def take(self, size: int) -> int:
        """Go on by so many bytes; where they began."""
        start, end = self.at, self.at + size
        if not self.reach(end):
            raise DamagedError(f"it ends within its header, or is damaged, at byte {start:,}")
        self.at = end
        return start

    def reach(self, end: int) -> bool:
        """Have the file read up to there, if it goes as far."""
        if self._read < end <= self._most:  # lengths are not trusted
            more = min(max(_CHUNK, end - self._read), self._most - self._read)
            self.data += bytes(max(0, self._read + more - len(self.data)))
            with memoryview(self.data) as view, view[self._read : self._read + more] as place:
                self._read += self._file.readinto(place)
        return end <= self._read

    def number(self, size: int) -> int:
        """The next number, of so many bytes."""
        start = self.take(size)
        return int.from_bytes(self.data[start : self.at], "little")

    def string(self) -> bytes:
        """The next text."""
        start = self.take(self.number(8))
        return bytes(self.data[start : self.at])

    def strings(self, count: int) -> bytes:
        """The next so many texts, as they stand there, with their lengths in front of each."""
        start = self.at
        for known in self._known.get(count, ()):
            if self.reach(start + len(known)) and self.data.startswith(known, start):
                self.at += len(known)
                return known
        self._skip_strings(count)
        texts = bytes(self.data[start : self.at])
        if count >= _MANY:
            self._known.setdefault(count, []).append(texts)
        return texts

    def _skip_strings(self, count: int) -> None:
        at, data = self.at, self.data
        last = self._read - 8
        for _ in range(count):
            if at > last:
                self.at = at
                self.take(8)
                last = self._read - 8
            length = _LENGTH.unpack_from(data, at)[0]
            at += 8 + length
            if at > self._most:
                raise DamagedError(f"it ends within its header, or is damaged, at byte {at - 8 - length:,}")
        self.at = at
        self.take(0)


def beginning(cursor: Cursor) -> tuple[int, int, int]:
    """The version of the format, and the numbers of tensors and of keys."""
    if not cursor.starts_with(b"GGUF"):
        raise DamagedError("not a GGUF file (it does not start with the letters GGUF)")
    version = cursor.number(4)
    if version and not version & 0xFFFF:
        raise DamagedError("a GGUF file for big-endian machines, which llama.cpp does not read here")
    if version not in _VERSIONS:
        raise DamagedError(f"version {version} of GGUF, where 2 and 3 are known")
    return version, cursor.number(8), cursor.number(8)


def pass_value(cursor: Cursor) -> int:
    """Go behind a value; how many values there are in it."""
    kind, length = kind_and_length(cursor)
    pass_values(cursor, kind, 1 if length is None else length)
    return 1 if length is None else length


def kind_and_length(cursor: Cursor) -> tuple[int, int | None]:
    """The kind of the value that follows, and, where it is an array, how many values it has; None: it is none."""
    kind = cursor.number(4)
    if kind != _ARRAY:
        return kind, None
    return cursor.number(4), cursor.number(8)


def pass_values(cursor: Cursor, kind: int, count: int) -> None:
    """Go behind so many values of a kind."""
    if kind == _STRING:
        cursor.strings(count)
    elif kind in _SCALARS:
        cursor.take(count * _SCALARS[kind].size)
    else:
        raise DamagedError(f"its header is damaged: a value of type {kind} at byte {cursor.at:,}")


def scalar(cursor: Cursor, kind: int) -> Scalar:
    """The single value of a kind that follows."""
    if kind == _STRING:
        return cursor.string()
    start = cursor.at
    pass_values(cursor, kind, 1)
    value: Scalar = _SCALARS[kind].unpack_from(cursor.data, start)[0]
    return value


def is_string(kind: int) -> bool:
    """Whether a kind of values is texts."""
    return kind == _STRING


def part_names(file: str) -> list[str]:
    """The names of all files of a model that is split as llama.cpp does it; llama.cpp finds them beside the first."""
    split = _SPLIT.fullmatch(file)
    if not split:
        return [file]
    start, number, count = split["start"], int(split["number"]), int(split["count"])
    if not 1 <= number <= count:
        return [file]
    return [f"{start}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]


def whole_name(file: str) -> str:
    """The name of a model by that of its file: without the end of its name, and which part it is."""
    split = _SPLIT.fullmatch(file)
    return split["start"] if split else file.removesuffix(".gguf")
