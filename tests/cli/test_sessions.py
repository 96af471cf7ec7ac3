"""Files of sessions: written whole, by one chat at a time, and left alone when they are broken."""

import json
import os
from datetime import datetime
from pathlib import Path

import pytest

from me_local.cli import sessions
from me_local.cli.sessions import SessionFile, last_session, new_session, session_names
from me_local.errors import InputError

CHAT = {"system": None, "messages": [{"role": "user", "content": "Hi"}], "aside": []}
EMPTY = {"system": None, "messages": [], "aside": []}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "me-local" / "sessions"


def test_a_session_is_there_again_and_for_its_user_alone(folder: Path) -> None:
    first = SessionFile("my work")
    assert first.saved is None
    first.write(EMPTY)
    assert session_names() == []
    first.write(CHAT)
    first.close()
    assert SessionFile("my work").saved == CHAT
    assert (folder / "my work.json").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_one_chat_at_a_time(folder: Path) -> None:
    first = SessionFile("work")
    with pytest.raises(InputError, match='session "work" is open in another chat; leave that one'):
        SessionFile("work")
    first.close()
    assert list(folder.iterdir()) == []
    SessionFile("work").close()


def test_a_lock_that_its_holder_removed_meanwhile_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another chat leaves between the opening of the lock and taking it."""
    other = SessionFile("work")
    flock, calls = sessions.fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            other.close()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(sessions.fcntl, "flock", late)
    held = SessionFile("work")
    assert len(calls) == 2
    with pytest.raises(InputError, match="open in another chat"):
        SessionFile("work")
    held.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"system": null, "mess', "not JSON"),
        (b"\xff", "not UTF-8 at byte 1"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "it is not a saved conversation"),
        (b'{"messages": [3], "aside": []}', r"messages\[0\]: must be an object"),
        (b'{"messages": [], "aside": [{"after": "x"}]}', r"aside\[0\]: must be an object"),
        (b'{"messages": [], "aside": [{"after": 1, "messages": []}]}', r'aside\[0\]: "messages" must be a list'),
        (b'{"messages": [], "aside": 3}', '"aside" must be a list'),
    ],
)
def test_a_broken_session_is_left_alone(folder: Path, data: bytes, reason: str) -> None:
    SessionFile("work").close()
    (folder / "work.json").write_bytes(data)
    for _ in range(2):  # the lock is given back
        with pytest.raises(InputError, match=rf'session "work" \(.*work.json\): {reason}.*; it is left as it is'):
            SessionFile("work")
    assert (folder / "work.json").read_bytes() == data


def test_what_another_program_wrote_is_not_overwritten(folder: Path) -> None:
    session = SessionFile("work")
    session.write(CHAT)
    (folder / "work.json").write_text("mine")
    with pytest.raises(InputError, match="another program has changed it"):
        session.write(EMPTY)
    assert (folder / "work.json").read_text() == "mine"


def test_a_disk_that_is_full_leaves_the_old_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = SessionFile("work")
    session.write(CHAT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device; /save FILE"):
        session.write(EMPTY)
    assert json.loads((folder / "work.json").read_text()) == CHAT
    monkeypatch.undo()
    session.write(CHAT | {"system": "x"})
    assert json.loads((folder / "work.json").read_text())["system"] == "x"


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "..", "a\nb", "x" * 101, "a:b", "\udcff"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InputError, match="a session's name is"):
        SessionFile(name)


def test_a_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    with pytest.raises(InputError, match='session "x" cannot be kept: Not a directory'):
        SessionFile("x")
    assert session_names() == []


def test_the_last_session_is_that_which_was_written_to_last(folder: Path) -> None:
    with pytest.raises(InputError, match="there is no session yet"):
        last_session()
    for age, name in enumerate(["b", "a", "c"]):
        with_name = SessionFile(name)
        with_name.write(CHAT)
        with_name.close()
        os.utime(folder / f"{name}.json", ns=(0, 10**18 - age))
    assert session_names() == ["b", "a", "c"]
    assert last_session().name == "b"


def test_new_sessions_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, *_: object) -> "Stopped":
            return cls(2026, 3, 4, 5, 6, 7)

    monkeypatch.setattr(sessions, "datetime", Stopped)
    first, second = new_session(), new_session()
    assert (first.name, second.name) == ("2026-03-04-050607", "2026-03-04-050607-2")
    first.write(CHAT)
    first.close()
    assert new_session().name == "2026-03-04-050607-3"


def test_renaming(folder: Path) -> None:
    taken = SessionFile("taken")
    taken.write(CHAT)
    taken.close()
    session = SessionFile("old")
    session.rename("early")  # nothing is written yet
    session.write(CHAT)
    for name, reason in {"taken": "there is a session", "a/b": "name is"}.items():
        with pytest.raises(InputError, match=reason):
            session.rename(name)
    session.rename("new")
    session.rename("new")
    session.write(CHAT | {"system": "x"})
    assert sorted(path.name for path in folder.iterdir()) == [".new.lock", "new.json", "taken.json"]
    session.close()
    assert SessionFile("new").saved == CHAT | {"system": "x"}
