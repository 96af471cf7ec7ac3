"""The records of a long run: JSON Lines, each written as soon as it is there, so that a run can be continued.

Whenever a run ends, what was finished is in the file, and a last line that was cut off is written anew.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from me_local.errors import InputError, RunError
from me_local.routing import Stretch

_START = b'{"id": '
_STRETCH = TypeAdapter(Stretch)


def finished_records(path: Path) -> list[dict[str, Any]]:
    """The records in an output file of an earlier run; a last line that was cut off is removed from the file.

    Raises InputError when the file holds something else than records, and leaves it as it is then.
    """
    if not path.is_file():
        return []
    whole = path.read_bytes()
    *lines, rest = whole.split(b"\n")
    records = [_record(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1)]
    if rest and not rest.startswith(_START[: len(rest)]):
        raise _strange(f"{path}, line {len(lines) + 1}")
    with path.open("r+b") as file:
        file.truncate(len(whole) - len(rest))
    return records


def require_new(path: Path, *, resume: bool) -> None:
    """Raise InputError when there are records already and they are not to be continued."""
    if path.is_file() and path.stat().st_size and not resume:
        raise InputError(f"{path}: it exists already; continue it with --resume, or give another --output")


def open_records(path: Path) -> IO[bytes]:
    """The file, open for records behind those that it has. Raises InputError."""
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def write_record(file: IO[bytes], record: dict[str, Any]) -> None:
    """Add a record, which begins with its `id`. Raises RunError."""
    line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        raise RunError(
            f"{file.name}: cannot be written: {error.strerror}; what is there stays, and --resume continues it"
        ) from None


def route_record(stretch: Stretch | None) -> dict[str, Any]:
    """What a record says of the part of a shared route that its reply took."""
    return {"route": asdict(stretch)} if stretch else {}


def stretch_of(record: dict[str, Any]) -> Stretch | None:
    """The part of a shared route that the reply of a record took, if it says."""
    return _STRETCH.validate_python(record["route"]) if record.get("route") is not None else None


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        record["id"]
        stretch_of(record)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _strange(where) from None
    return dict(record)


def _strange(where: str) -> InputError:
    return InputError(f"{where}: not a record of an earlier run; give another --output")
