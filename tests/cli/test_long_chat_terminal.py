"""Long conversations on a real pseudo-terminal: editing, comparing, copying, sessions, completion."""

import base64
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from terminals import PROMPT, ask, chats

WriteModels = Callable[..., Path]
Terminal = Callable[..., pexpect.spawn]

NO_EDITOR = {"VISUAL": "", "EDITOR": ""}


@pytest.fixture
def terminal(write_models: WriteModels, tmp_path: Path) -> Iterator[Terminal]:
    """Opens a chat; see `chats`."""
    with chats(write_models, tmp_path, **NO_EDITOR) as open_chat:
        yield open_chat


def leave(child: pexpect.spawn) -> None:
    child.expect(PROMPT)
    child.sendeof()
    child.expect(pexpect.EOF)


def kept(home: Path, name: str) -> dict[str, Any]:
    path = home / ".local" / "state" / "me-local" / "sessions" / f"{name}.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def questions(home: Path, name: str) -> list[str]:
    return [message["content"] for message in kept(home, name)["messages"] if message["role"] == "user"]


@pytest.mark.slow
def test_the_last_message_is_edited_in_the_input_line(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal("--session", "work")
    ask(child, "@@Hello")
    child.expect("8 pieces")
    ask(child, "/edit")
    child.expect("> @@Hello")
    child.send(" there\r")
    child.expect("8 pieces")
    leave(child)
    assert questions(tmp_path, "work") == ["@Hello there"]


@pytest.mark.slow
def test_ctrl_c_leaves_the_last_message_as_it_is(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal("--session", "work")
    ask(child, "Hello")
    child.expect("8 pieces")
    ask(child, "/edit")
    child.expect("> Hello")
    child.sendintr()
    child.expect("/exit leaves")
    ask(child, "Again")
    child.expect("8 pieces")
    leave(child)
    assert questions(tmp_path, "work") == ["Hello", "Again"]


@pytest.mark.slow
def test_the_last_message_is_edited_in_an_editor(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal("--session", "work", EDITOR="sed -i s/Hello/Goodbye/")
    ask(child, "Hello")
    child.expect("8 pieces")
    ask(child, "/edit")
    child.expect("8 pieces")
    ask(child, "/edit")
    child.expect("The message is as it was.")
    leave(child)
    assert questions(tmp_path, "work") == ["Goodbye"]
    child = terminal("--session", "work", VISUAL="false")
    ask(child, "/edit")
    child.expect("Error: /edit: false: Editing failed")
    leave(child)
    assert questions(tmp_path, "work") == ["Goodbye"]


@pytest.mark.slow
def test_what_was_edited_and_cannot_be_sent_is_edited_further(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal("--session", "work", EDITOR="sed -i s/Hello/@none/")
    ask(child, "Hello")
    child.expect("8 pieces")
    ask(child, "/edit")
    child.expect("there is no such file")
    child.expect("> @none")
    child.send("2\r")
    child.expect("@none2: there is no such file")
    child.expect("> @none2")
    child.send("\x15Goodbye\r")  # Ctrl-U: an empty line
    child.expect("8 pieces")
    leave(child)
    assert questions(tmp_path, "work") == ["Goodbye"]


@pytest.mark.slow
def test_an_editor_that_leaves_no_text_does_not_end_the_chat(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal("--session", "work", EDITOR="rm")
    ask(child, "Hello")
    child.expect("8 pieces")
    ask(child, "/edit")
    child.expect("Error: /edit: rm left no text: No such file")
    leave(child)
    assert questions(tmp_path, "work") == ["Hello"]


@pytest.mark.slow
def test_replies_stand_side_by_side_where_there_is_room(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal("--session", "work", "--seed", "2")
    ask(child, "Hello")
    child.expect("8 pieces")
    ask(child, "/compare")
    child.expect("goes on with one of them")
    heading = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", child.before).splitlines()
    assert any(re.match(r"ensemble +bpe_a +spm *$", line) for line in heading)
    assert any(re.search(r" 8 pieces, [\d.]+ pieces/s, length +8 pieces, ", line) for line in heading)
    ask(child, "/pick 2")
    child.expect("Reply 2: ")
    leave(child)
    member = next(turn for turn in kept(tmp_path, "work")["aside"] if turn.get("by") == "bpe_a")
    assert member["messages"] == kept(tmp_path, "work")["messages"]


@pytest.mark.slow
def test_replies_stand_one_below_the_other_where_there_is_none(terminal: Terminal) -> None:
    child = terminal()
    child.setwinsize(40, 70)
    ask(child, "Hello")
    child.expect("8 pieces")
    ask(child, "/compare")
    for name in ("ensemble", "bpe_a", "spm"):
        child.expect(rf"{name}:\x1b?[^\n]*\n")
    child.expect("goes on with one of them")
    leave(child)


@pytest.mark.slow
def test_ctrl_c_ends_a_comparison(terminal: Terminal) -> None:
    child = terminal("--max-tokens", "8", "--top-k", "1", "--seed", "2")
    ask(child, "Hello")
    child.expect("8 pieces")
    ask(child, "/set max_tokens 100000")
    ask(child, "/compare")
    child.expect(r"(?s)bpe_a.{2000}")
    child.sendintr()
    child.expect("pieces/s, cancelled")
    child.expect("goes on with one of them")
    ask(child, "/set max_tokens 5")
    ask(child, "Again")
    child.expect(r"\d pieces/s [^\n]*seed 4")
    leave(child)


@pytest.mark.slow
def test_copying_asks_the_terminal(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal("--session", "work", SSH_CONNECTION="here 1 there 2")
    ask(child, "Hello")
    child.expect("8 pieces")
    ask(child, "/copy")
    child.expect(r"\x1b\]52;c;([A-Za-z0-9+/=]+)\x07")
    copied = base64.b64decode(child.match.group(1)).decode()
    child.expect("Asked the terminal to copy")
    leave(child)
    assert copied == kept(tmp_path, "work")["messages"][1]["content"]


@pytest.mark.slow
def test_a_chat_without_a_name_is_kept_and_gone_on_with(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal()
    ask(child, "Hello")
    child.expect("8 pieces")
    leave(child)
    name = re.search(r"Kept as session (\S+): me-local chat --continue", child.before).group(1)
    assert questions(tmp_path, name) == ["Hello"]
    child = terminal("--continue")
    child.expect(f"Session {name}: goes on behind 2 messages")
    ask(child, "/session work")
    child.expect("This is session work")
    ask(child, "Again")
    child.expect("8 pieces")
    leave(child)
    assert questions(tmp_path, "work") == ["Hello", "Again"]


@pytest.mark.slow
def test_two_chats_do_not_write_to_one_session(terminal: Terminal, tmp_path: Path) -> None:
    first = terminal("--session", "work")
    ask(first, "Hello")
    first.expect("8 pieces")
    second = terminal("--session", "work")
    second.expect('session "work" is open in another chat; leave that one, or take another name')
    second.expect(pexpect.EOF)
    first.expect(PROMPT)
    first.kill(signal.SIGKILL)
    first.expect(pexpect.EOF)
    third = terminal("--session", "work")
    third.expect("goes on behind 2 messages")
    leave(third)
    assert questions(tmp_path, "work") == ["Hello"]


@pytest.mark.slow
def test_where_no_session_can_be_kept_the_chat_goes_on(terminal: Terminal) -> None:
    child = terminal(XDG_STATE_HOME="/dev/null")
    child.expect("Note: this conversation is not kept: ")
    ask(child, "Hello")
    child.expect("8 pieces")
    leave(child)
    assert "Kept as" not in child.before


@pytest.mark.slow
def test_a_session_that_another_program_changed(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal("--session", "work")
    ask(child, "Hello")
    child.expect("8 pieces")
    child.expect(PROMPT)
    path = tmp_path / ".local" / "state" / "me-local" / "sessions" / "work.json"
    path.write_text("mine")
    child.sendline("Again")
    child.expect("Error: session .*another program has changed it")
    leave(child)
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_tab_completes_commands_members_and_files(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "my notes.txt").write_text("one")
    child = terminal("--session", "work")
    child.expect(PROMPT)
    child.send("/weig\t")
    child.expect("hts")
    child.send(" s\t")
    child.expect("pm=")
    child.sendline("1,bpe_a=0")
    child.expect("bpe_a 0.00")
    child.expect(PROMPT)
    child.send("@~/my\t")
    child.expect('notes.txt"')
    child.sendline(" ok")
    child.expect("8 pieces")
    leave(child)
    assert questions(tmp_path, "work") == ["~/my notes.txt:\n```\none\n```\n\n~/my notes.txt ok"]
