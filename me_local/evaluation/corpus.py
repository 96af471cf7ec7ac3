"""Texts to score: a text file in windows, or a JSON Lines file of prompts and continuations.

A text is cut into windows of equal size, in front of white space. Each is scored behind the end of the window before
it, as a raw completion; of the first, the first word (at most 64 bytes of it) is only read. A line of a JSON Lines
file is `{"prompt": "...", "continuation": "..."}` (or "completion"), and its continuation is scored.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from me_local.errors import InputError
from me_local.jsonl import read_objects, text_of
from me_local.mixture.words import LONGEST

_LARGEST = 4096  # bytes of a window and what stands in front of it; a token has at least one
_CONTEXT = 4  # of these bytes, one in so many belongs to the window before
_WINDOWS = 8  # a text has at least so many, where it is not very short
_SMALLEST = 256  # bytes
_WORD_START = re.compile(rb"(?<=[^ \t\n\r\x0b\x0c])(?=[ \t\n\r\x0b\x0c])")
_WORD = re.compile(rb"(?<=[ \t\n\r\x0b\x0c])(?=[^ \t\n\r\x0b\x0c])")


@dataclass(frozen=True, slots=True)
class Block:
    """What is scored in one go: the continuation, behind the prompt. `where` is its place, as errors name it."""

    where: str
    prompt: str
    continuation: str
    raw: bool

    @property
    def size(self) -> int:
        """Bytes of the continuation."""
        return len(self.continuation.encode())


def read_blocks(path: Path, *, raw: bool, room: int) -> list[Block]:
    """The blocks of a file; a text when its name does not end in .jsonl.

    `raw` says that prompts of JSON Lines are completed as they stand; `room` is the number of tokens that every member
    has room for. Raises InputError that names file and line.
    """
    if path.suffix == ".jsonl":
        return [_pair(record, where, raw) for where, record in read_objects(path)]
    return list(_windows(path, _read_text(path), room))


def _pair(record: dict[str, Any], where: str, raw: bool) -> Block:
    key = "completion" if "completion" in record and "continuation" not in record else "continuation"
    return Block(where, text_of(record, "prompt", where), text_of(record, key, where), raw)


def _read_text(path: Path) -> bytes:
    try:
        text = path.read_bytes()
        text.decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    return text


def _windows(path: Path, text: bytes, room: int) -> Iterator[Block]:
    lead = len(text) - len(text.lstrip())
    first = _first_end(text, lead)
    if not text[first:].strip():
        raise InputError(f"{path}: at least two words are wanted; the first one is not scored")
    largest = max(16, min(_LARGEST, room - 8))  # some tokens stand in front of every text
    context = largest // _CONTEXT
    size = min(largest - context, max(_SMALLEST, (len(text) - first) // _WINDOWS))
    for start, end in pairwise(_cuts(text, first, size)):
        begin = lead if start == first else _context_start(text, start, context)
        line = text.count(b"\n", 0, start) + 1
        yield Block(f"{path}, line {line}", text[begin:start].decode(), text[start:end].decode(), raw=True)


def _first_end(text: bytes, lead: int) -> int:
    """The end of the first word, or of what is taken of it."""
    word = _WORD_START.search(text, lead, lead + LONGEST + 1)
    end = min(lead + LONGEST, len(text))
    return word.start() if word else end if end == len(text) else _character(text, end)


def _cuts(text: bytes, start: int, size: int) -> Iterator[int]:
    """Where windows begin, and the end of the text: in front of white space as late as `size` allows."""
    borders = [match.start() for match in _WORD_START.finditer(text, start + 1)]
    yield start
    at = 0
    while len(text) - start > size:
        last = None
        while at < len(borders) and borders[at] <= start + size:
            last, at = borders[at], at + 1
        start = _character(text, start + size) if last is None else last
        yield start
    yield len(text)


def _context_start(text: bytes, start: int, most: int) -> int:
    """The first word of the `most` bytes in front of `start`."""
    earliest = max(0, start - most)
    word = _WORD.search(text, earliest, start)
    return word.start() if word else _character(text, earliest)


def _character(text: bytes, at: int) -> int:
    """Where the character begins that byte `at` is part of."""
    while text[at] & 0xC0 == 0x80:
        at -= 1
    return at
