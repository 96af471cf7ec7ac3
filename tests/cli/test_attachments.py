"""Files in messages: what `@name` becomes, what cannot be put in, and how an @ is written."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_local.cli.attachments import MOST_BYTES, as_typed, with_files
from me_local.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    (tmp_path / "my notes.txt").write_bytes(b"\xef\xbb\xbfthree")
    return tmp_path


def test_a_file_stands_in_front_of_the_message_below_its_name() -> None:
    assert with_files("Sum up @notes.txt, please") == "notes.txt:\n```\none\ntwo\n```\n\nSum up notes.txt, please"


def test_names_with_blanks_stand_between_quotes() -> None:
    assert with_files('@"my notes.txt"?') == "my notes.txt:\n```\nthree\n```\n\nmy notes.txt?"


def test_a_file_that_is_named_twice_is_put_in_once() -> None:
    assert with_files("@notes.txt @notes.txt").count("one\ntwo") == 1


def test_a_name_may_end_like_a_sentence(folder: Path) -> None:
    (folder / "notes.txt,").write_text("odd")
    assert with_files("@notes.txt, x").startswith("notes.txt,:\n```\nodd\n")


def test_fences_are_longer_than_those_of_the_file(folder: Path) -> None:
    (folder / "a.md").write_text("```\ncode\n```\n")
    assert with_files("@a.md") == "a.md:\n````\n```\ncode\n```\n````\n\na.md"


@pytest.mark.parametrize("text", ["", "me@home.org", "a @ b", "x\n```\n@property\n```\n", "~~~\n@dataclass", '@"open'])
def test_where_an_at_names_no_file(text: str) -> None:
    assert with_files(text) == text


def test_two_are_one() -> None:
    assert with_files("@@property and @@@x") == "@property and @@x"


def test_what_cannot_be_put_in(folder: Path) -> None:
    (folder / "image").write_bytes(b"GIF\0")
    (folder / "latin").write_bytes(b"caf\xe9")
    (folder / "large").write_bytes(b"x" * (MOST_BYTES + 1))
    os.mkfifo(folder / "pipe")
    for name, reason in {
        "none": "there is no such file; write @@none",
        "image": "not a text: byte 4 is 0",
        "latin": "not UTF-8 at byte 4",
        "large": "more than 1 MiB",
        "pipe": "not a regular file",
        ".": "not a regular file",
        "notes.txt/x": "Not a directory",
        "~nobody-here/x": "home directory",
        "x" * 300: "File name too long",
        "a\0b": "null",
    }.items():
        with pytest.raises(InputError, match=f"@.*: .*{reason}"):
            with_files(f"look at @{name}")


@given(st.lists(st.sampled_from(["@", "@@", "a", " ", "\n", "```", "````", "~~~", '"', "/", "notes.txt", ",", "\r\n"])))
def test_what_is_typed_says_the_message_again(parts: list[str]) -> None:
    message = "".join(parts)
    assert with_files(as_typed(message)) == message


def test_a_message_with_a_file_is_typed_again_as_it_is() -> None:
    message = with_files("@notes.txt @@x")
    assert with_files(as_typed(message)) == message
