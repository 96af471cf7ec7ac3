"""The questions of a task of one's own: rows with named fields, from a JSON Lines or a CSV file, and texts of them."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from me_local.checks import shown
from me_local.errors import ConfigError, InputError
from me_local.evaluation.tasks.task import letter_of
from me_local.jsonl import checked_text, json_text, parse_object

_PART = re.compile(r"\{\{|\}\}|\{([^{}\r\n]+)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Row:
    """A question's fields, and its place, as errors name it."""

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A field as a text: itself, or a number or a truth value as JSON writes it. Raises InputError."""
        if name not in self.fields:
            raise InputError(f'{self.where}: "{name}" is missing; there are {", ".join(self.fields) or "no fields"}')
        text = as_text(self.fields[name])
        if text is None:
            raise InputError(f"{self.where}: {name}: must be a text, a number, true or false")
        return checked_text(text, name, self.where) if text.strip() else text

    def choices(self, name: str) -> tuple[str, ...]:
        """A field that is a list of 2 to 26 texts. Raises InputError."""
        listed = self.fields.get(name)
        if not isinstance(listed, list) or not 2 <= len(listed) <= 26:
            raise InputError(f"{self.where}: {name}: must be a list of 2 to 26 texts")
        return tuple(checked_text(as_text(choice), f"{name}[{i}]", self.where) for i, choice in enumerate(listed))


def as_text(value: object) -> str | None:
    """A text, or a number or a truth value as JSON writes it; None for anything else."""
    if isinstance(value, str):
        return value
    return json_text(value) if isinstance(value, bool | int | float) else None


@dataclass(frozen=True, slots=True)
class Template:
    """A text with fields in it: `{name}`, and `{{` and `}}` for braces. `choices` is a field that is a list."""

    parts: tuple[tuple[str, str], ...]  # a text, and the field behind it, "" for none
    choices: str | None

    @classmethod
    def parse(cls, text: str, place: str, choices: str | None) -> "Template":
        """Raises ConfigError, which begins with the place, for a brace that belongs to nothing."""
        parts, end, plain = list[tuple[str, str]](), 0, ""
        for match in _PART.finditer(text):
            plain += text[end : match.start()]
            end = match.end()
            if match[1]:
                parts.append((plain, match[1].strip()))
                plain = ""
            elif len(match[0]) == 2:
                plain += match[0][0]
            else:
                where = f"line {text.count(chr(10), 0, match.start()) + 1} of it"
                raise ConfigError(f'{place}: "{match[0]}" in {where} is no part of a {{field}}: write {match[0] * 2}')
        return cls((*parts, (plain + text[end:], "")), choices)

    @property
    def fields(self) -> list[str]:
        """The names of the fields in it."""
        return [name for _, name in self.parts if name]

    def fill(self, row: Row) -> str:
        """The text for a row; a list of choices has a line for each, "(A) …". Raises InputError."""
        return "".join(text + (self._value(row, name) if name else "") for text, name in self.parts)

    def _value(self, row: Row, name: str) -> str:
        if name != self.choices:
            return row.text(name)
        return "\n".join(f"({letter_of(i)}) {choice}" for i, choice in enumerate(row.choices(name)))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, whose form its name's ending says. Raises InputError that names file and line."""
    readers: dict[str, Callable[[Path, bytes], Iterator[Row]]] = {".jsonl": _objects, ".csv": _records}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: questions are a .jsonl or a .csv file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a zero character in the name
        raise InputError(f"{shown(str(path))}: cannot be read: {error}") from None
    rows = list(readers[path.suffix.lower()](path, data))
    if not rows:
        raise InputError(f"{path}: there are no questions in it")
    return rows


def _objects(path: Path, data: bytes) -> Iterator[Row]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, parse_object(line, where))


def _records(path: Path, data: bytes) -> Iterator[Row]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None
    header: list[str] | None = None
    for line, cells in _lines(path, text):
        where = f"{path}, line {line}"
        if header is None:
            header = [cell.strip() for cell in cells]
            if "" in header or len(set(header)) < len(header):
                raise InputError(f"{where}: the first line names the fields, each once: {json_text(header)}")
        elif len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} fields, but the first line names {len(header)}")
        else:
            yield Row(where, dict(zip(header, cells, strict=True)))


def _lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, and the line where each begins."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begin = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {begin}: not CSV: {error}") from None
