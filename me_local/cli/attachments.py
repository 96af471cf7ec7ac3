"""Files that a message names with an @: their texts stand in front of it, each below its name."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from me_local.errors import InputError

MOST_BYTES = 1 << 20
_AT = re.compile(r'(?<!\S)@(?:(?P<escaped>@)|"(?P<quoted>[^"\n]+)"|(?P<plain>[^\s"@]\S*))')
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ENDS_OF_SENTENCES = ".,;:!?)"


def with_files(text: str) -> str:
    """The message with the texts of files that it names: `@notes.txt`, `@"my notes.txt"`.

    `@@` at the beginning of a word is an @; between fences, as code stands there, one is enough. Raises InputError for
    a file that cannot be put in.
    """
    files: dict[str, str] = {}

    def name(found: re.Match[str]) -> str:
        if found["escaped"]:
            return "@"
        name, rest = (found["quoted"], "") if found["quoted"] else _without_end(found["plain"])
        files.setdefault(name, _read(name))
        return name + rest

    message = _outside_fences(text, lambda part: _AT.sub(name, part))
    return "\n\n".join([*(_block(name, content) for name, content in files.items()), message])


def as_typed(message: str) -> str:
    """What has to be typed to say this: `with_files` gives the message again."""
    return _outside_fences(message, lambda part: re.sub(r"(?<!\S)@", "@@", part))


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    return "".join(part if fenced else change(part) for part, fenced in _parts(text))


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a text, and whether each belongs to a block between fences."""
    fence = ""
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        if fence:
            yield line, True
            if found and found[1].startswith(fence) and line.strip() == found[1]:
                fence = ""
        else:
            yield line, bool(found)
            fence = found[1] if found else ""


def _without_end(name: str) -> tuple[str, str]:
    """A name and what stands behind it: the comma of a sentence belongs to a name only if there is such a file."""
    short = name.rstrip(_ENDS_OF_SENTENCES)
    if short and short != name and not os.path.exists(os.path.expanduser(name)):
        return short, name[len(short) :]
    return name, ""


def _read(name: str) -> str:
    try:
        path = Path(name).expanduser()
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may have no end
            raise InputError(f"@{name}: not a regular file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"@{name}: there is no such file; write @@{name} for an @ that names none") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error.strerror) if isinstance(error, OSError) else str(error)
        raise InputError(f"@{name}: {reason}") from None
    if len(data) > MOST_BYTES:
        raise InputError(f"@{name}: more than {MOST_BYTES >> 20} MiB, which no message can take")
    if b"\0" in data:
        raise InputError(f"@{name}: not a text: byte {data.index(0) + 1} is 0")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"@{name}: not UTF-8 at byte {error.start + 1}") from None


def _block(name: str, content: str) -> str:
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    end = "" if content.endswith("\n") or not content else "\n"
    return f"{name}:\n{fence}\n{content}{end}{fence}"
