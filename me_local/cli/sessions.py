"""Sessions: conversations that are kept in files of their own, each written by one chat at a time."""

import json
import os
import unicodedata
from datetime import datetime
from pathlib import Path
from typing import Any

from me_local.chat import parse_saved
from me_local.errors import InputError
from me_local.jsonl import json_text
from me_local.system.files import replace_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LONGEST_NAME = 100  # characters


def state_folder() -> Path:
    """Where chats keep what lasts, for their user alone. Raises OSError, and RuntimeError for a user without a home."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "me-local"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def session_names() -> list[str]:
    """The names of all sessions, the one that was written to last first."""
    try:
        files = [(path.stat().st_mtime_ns, path.stem) for path in (state_folder() / "sessions").glob("[!.]*.json")]
    except (OSError, RuntimeError):
        return []
    return [name for _, name in sorted(files, reverse=True)]


class SessionFile:
    """The file of a session. While it is open, no other chat can open it.

    `saved` is what stood there, None for a new one. Raises InputError for a name that cannot be one, for a session that
    is open in another chat, and for a file that is no conversation, which is left alone.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path, self._lock = _taken(name)
        self._data = self._tried = b""
        try:
            self.saved = self._read()
        except BaseException:
            self.close()
            raise

    def write(self, conversation: dict[str, Any]) -> None:
        """Put a conversation there, if it is another than before. Raises InputError; the old one stays then."""
        data = f"{json_text(conversation, indent=1)}\n".encode()
        if data in (self._data, self._tried) or not (self._data or conversation["messages"] or conversation["aside"]):
            return
        self._tried = data
        try:
            if self._on_disk() != self._data:
                raise InputError(f"{self._where}: another program has changed it; /save FILE keeps this conversation")
            if not self._data:
                self.path.touch(mode=0o600)
            replace_file(self.path, data)
        except OSError as error:
            raise InputError(
                f"{self._where}: cannot be written: {error.strerror}; /save FILE keeps it elsewhere"
            ) from None
        self._data = data

    def rename(self, name: str) -> None:
        """Give the session another name. Raises InputError for one that is taken or cannot be one."""
        if name == self.name:
            return
        path, lock = _taken(name, new=True)
        try:
            if self.path.exists():
                self.path.rename(path)
        except OSError as error:
            _unlock(path, lock)
            raise InputError(f"{self._where}: cannot be renamed: {error.strerror}") from None
        _unlock(self.path, self._lock)
        self.name, self.path, self._lock = name, path, lock

    def close(self) -> None:
        """Let others have it."""
        _unlock(self.path, self._lock)
        self._lock = None

    @property
    def _where(self) -> str:
        return f'session "{self.name}" ({self.path})'

    def _on_disk(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    def _read(self) -> Any:
        try:
            if self.path.exists() and not self.path.is_file():
                raise InputError("not a regular file")
            self._data = self._on_disk()
            if not self._data:
                return None
            saved = json.loads(self._data.decode("utf-8-sig"))
            parse_saved(saved)
        except UnicodeDecodeError as error:
            raise InputError(f"{self._where}: not UTF-8 at byte {error.start + 1}; it is left as it is") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._where}: not JSON: {error}; it is left as it is") from None
        except OSError as error:
            raise InputError(f"{self._where}: {error.strerror}") from None
        except InputError as error:
            raise InputError(f"{self._where}: {error}; it is left as it is") from None
        return saved


def last_session() -> SessionFile:
    """The session that was written to last. Raises InputError where there is none, and as `SessionFile` does."""
    names = session_names()
    if not names:
        raise InputError("--continue: there is no session yet; a chat at a terminal begins one, or --session NAME")
    return SessionFile(names[0])


def new_session() -> SessionFile:
    """A session named by the time of day. Raises InputError where none can be kept."""
    now, taken = f"{datetime.now():%Y-%m-%d-%H%M%S}", session_names()
    for number in range(1, 100):
        name = now if number == 1 else f"{now}-{number}"
        if name not in taken:
            try:
                return SessionFile(name)
            except OpenElsewhereError:
                continue
    raise InputError("sessions are being begun too fast")


class OpenElsewhereError(InputError):
    """A session that another chat has open."""


def _check_name(name: str) -> None:
    fine = name and name[0] not in ".-" and len(name.encode("utf-8", "replace")) <= _LONGEST_NAME
    if not fine or any(c in '/\\:*?"<>|' or unicodedata.category(c)[0] == "C" for c in name):
        raise InputError(
            f"a session's name is up to {_LONGEST_NAME} letters, digits, spaces, dots, _ and -, "
            f"and begins with none of . and -; got {name!r}"
        )


def _taken(name: str, *, new: bool = False) -> tuple[Path, int | None]:
    """The path of a session's file, and its lock. Raises InputError; where it has to be `new`, also for one there."""
    _check_name(name)
    try:
        folder = state_folder() / "sessions"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{name}.json"
        if new and path.exists():
            raise InputError(f'there is a session "{name}" already')
        return path, _locked(path, name)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f'session "{name}" cannot be kept: {reason}') from None


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")


def _locked(path: Path, name: str) -> int | None:
    """A descriptor that holds the lock of a session's file; None where there are no locks."""
    if fcntl is None:
        return None
    lock = _lock_path(path)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
            os.close(descriptor)  # its holder has removed it meanwhile
        except BlockingIOError:
            os.close(descriptor)
            raise OpenElsewhereError(
                f'session "{name}" is open in another chat; leave that one, or take another name'
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            return None


def _unlock(path: Path, descriptor: int | None) -> None:
    if descriptor is not None:
        _lock_path(path).unlink(missing_ok=True)
        os.close(descriptor)
