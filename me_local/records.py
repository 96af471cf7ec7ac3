"""The records of a long run: JSON Lines, each written as soon as it is there, so that a run can be continued.

Whenever a run ends, what was finished is in the file, and a last line that was cut off is written anew. A file is
written by one run at a time, and one that holds anything else than records of the run's kind is left as it is.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from me_local.errors import InputError, RunError
from me_local.jsonl import json_text, parse_object
from me_local.mixture.routing import Stretch

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_START = b'{"id": '
_ID = re.compile(rb'\{"id": (?:"(?:[^"\\]|\\.)*"|-?\d+)')
_STRETCH = TypeAdapter(Stretch)


@dataclass(frozen=True, slots=True)
class Kind:
    """What one kind of run writes: the key behind `id` by which a record begins, and the other keys that it has.

    `shapes` are the kinds of record that the run makes; the first key of each stands right behind the `id`.
    """

    shapes: tuple[tuple[str, ...], ...]

    def fits(self, record: dict[str, Any]) -> bool:
        """Whether the object is such a record."""
        id_ = record.get("id")
        is_id = isinstance(id_, str | int) and not isinstance(id_, bool)
        return is_id and any(all(key in record for key in shape) for shape in self.shapes)

    def may_begin(self, line: bytes) -> bool:
        """Whether a record may begin like this, so that the line is one which was cut off."""
        if not line.startswith(_START):
            return _START.startswith(line)
        id_ = _ID.match(line)
        if not id_:
            return line[len(_START) :][:1] in (b"", b'"', b"-")
        rest = line[id_.end() :]
        return any(rest.startswith(key) or key.startswith(rest) for key in self._second_keys())

    def _second_keys(self) -> Iterator[bytes]:
        return (f', "{shape[0]}": '.encode() for shape in self.shapes)


@contextmanager
def open_records(path: Path, kind: Kind, *, resume: bool) -> Iterator[tuple[IO[bytes], Sequence[dict[str, Any]]]]:
    """The file, open for records, with those that it has, which an earlier run wrote.

    Raises InputError when there are records already and they are not to be continued, when the file holds something
    else than records of this kind, when another run is writing to it, and when it cannot be written.
    """
    _require_new(path, resume=resume)
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    with file:
        _lock(file)
        _require_new(path, resume=resume)  # what another run wrote until the lock was there
        yield file, _earlier(file, path, kind)


@contextmanager
def standard_output() -> Iterator[tuple[IO[bytes], Sequence[dict[str, Any]]]]:
    """Standard output for records, which has none yet."""
    yield sys.stdout.buffer, ()


def write_record(file: IO[bytes], record: dict[str, Any]) -> None:
    """Add a record, which begins with its `id`. Raises RunError, and BrokenPipeError for standard output."""
    try:
        _write(file, json_text(record).encode() + b"\n")
    except OSError as error:
        if file is sys.stdout.buffer:
            raise
        raise RunError(
            f"{file.name}: cannot be written: {error.strerror}; what is there stays, and --resume continues it"
        ) from None


def _write(file: IO[bytes], line: bytes) -> None:
    while line:
        line = line[file.write(line) :]
    file.flush()


def _require_new(path: Path, *, resume: bool) -> None:
    if path.is_file() and path.stat().st_size and not resume:
        raise InputError(f"{path}: it exists already; continue it with --resume, or give another --output")


def _lock(file: IO[bytes]) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{file.name}: another run is writing to it; wait for it, or give another --output") from None
    except OSError:  # a device, or a file system without locks
        return


def _earlier(file: IO[bytes], path: Path, kind: Kind) -> list[dict[str, Any]]:
    """The records in the file; a last line that was cut off is removed from it, and one that is whole gets its end."""
    if not path.is_file():
        return []
    whole = path.read_bytes()
    *lines, rest = whole.split(b"\n")
    records = [_record(line, kind, f"{path}, line {i}") for i, line in enumerate(lines, start=1)]
    if not rest:
        return records
    where = f"{path}, line {len(lines) + 1}"
    if _parses(rest):
        records.append(_record(rest, kind, where))
        _write(file, b"\n")
    elif kind.may_begin(rest):
        os.ftruncate(file.fileno(), len(whole) - len(rest))
    else:
        raise _strange(where)
    return records


def route_record(stretch: Stretch | None) -> dict[str, Any]:
    """What a record says of the part of a shared route that its reply took."""
    return {"route": asdict(stretch)} if stretch else {}


def stretch_of(record: dict[str, Any]) -> Stretch | None:
    """The part of a shared route that the reply of a record took, if it says."""
    return _STRETCH.validate_python(record["route"]) if record.get("route") is not None else None


def _record(line: bytes, kind: Kind, where: str) -> dict[str, Any]:
    try:
        record = parse_object(line, where)
        stretch_of(record)
    except (InputError, ValueError, TypeError):
        raise _strange(where) from None
    if not kind.fits(record):
        raise _strange(where)
    return record


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _strange(where: str) -> InputError:
    return InputError(f"{where}: not a record of an earlier run; give another --output")
