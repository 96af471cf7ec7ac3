"""Long conversations without a terminal: what becomes of the last message, sessions, files, and Markdown."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from commands import Run, one_line
from thinkers import write_thinkers

from me_local import Chat, Ensemble, Message, Overrides
from me_local.cli import session as session_module
from me_local.cli.display import Painter, make_console
from me_local.cli.program import main
from me_local.cli.saving import as_markdown
from me_local.cli.session import Session
from me_local.cli.sessions import SessionFile, session_names

OpenEnsemble = Callable[..., Ensemble]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the sessions."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state" / "me-local" / "sessions"


def kept(folder: Path, name: str = "work") -> dict[str, list[dict[str, str]]]:
    content: dict[str, list[dict[str, str]]] = json.loads((folder / f"{name}.json").read_text())
    return content


def contents(folder: Path) -> list[str]:
    return [message["content"] for message in kept(folder)["messages"]]


def test_what_becomes_of_the_last_message(run: Run, folder: Path) -> None:
    script = "Hello\nAgain\n/undo\n/edit Goodbye\n/retry 2\n/pick\n/pick 1\n"
    result = run("chat", "--session", "work", "--seed", 1, "--max-tokens", 6, stdin=script)
    assert result.exit_code == 0, result.stderr
    replies = result.stdout.splitlines()
    assert len(replies) == 5
    assert contents(folder) == ["Goodbye", replies[2]]
    beside = [message["content"] for turn in kept(folder)["aside"] for message in turn["messages"]]
    assert set(replies) <= {*beside, replies[2]}
    for part in ("Taken back: Again", "Reply 2:", "Reply 3:", "3 replies; /pick N", "*3  ensemble", "Reply 1: "):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/undo", "there is no message yet"),
        ("/retry", "there is no message yet"),
        ("/edit x", "there is no message yet"),
        ("/compare", "there is no message yet"),
        ("/pick", "there is no message yet"),
        ("/copy", "/copy: there is no reply yet"),
        ("/export md", "/export: the conversation is empty"),
        ("/export", "/export: must look like /export md"),
        ("/session", "/session: this conversation is not kept"),
        ("Hello\n/edit", "/edit: the text is missing"),
        ("Hello\n/retry 0", '/retry: must be a number from 1 to 20, got "0"'),
        ("Hello\n/retry x", "/retry: must be a number"),
        ("Hello\n/pick 2", '/pick: must be a number from 1 to 1, got "2"'),
        ("Hello\n/export md no/such/file", "/export: no/such/file: No such file"),
        ("Hello @none", "@none: there is no such file"),
        ("Hello\n/edit @none", "@none: there is no such file"),
    ],
)
def test_what_cannot_be_done(run: Run, line: str, reason: str) -> None:
    one_line(run("chat", "--max-tokens", 3, stdin=f"{line}\n"), 2, reason)
    assert session_names() == []  # without a terminal nothing is kept that was not asked for


def test_a_session_goes_on(run: Run, folder: Path) -> None:
    run("chat", "--session", "work", "--max-tokens", 3, stdin="/system Be brief.\nHello\n")
    result = run("chat", "--continue", "--max-tokens", 3, stdin="Again\n/session\n")
    assert result.exit_code == 0, result.stderr
    assert "Session work: goes on behind 2 messages." in result.stderr
    assert "* work" in result.stderr
    assert contents(folder)[::2] == ["Hello", "Again"]
    assert kept(folder)["system"] == "Be brief."
    result = run("chat", "--session", "work", "--max-tokens", 3, stdin="/session other\nThird\n")
    assert result.exit_code == 0, result.stderr
    assert session_names() == ["other"]
    assert [path.name for path in folder.iterdir()] == ["other.json"]


def test_sessions_that_cannot_be_opened(run: Run, folder: Path) -> None:
    one_line(run("chat", "--continue", stdin=""), 2, "--continue: there is no session yet")
    one_line(run("chat", "--continue", "--session", "x", stdin=""), 2, "--continue: leave it out beside --session")
    one_line(run("chat", "--session", "a/b", stdin=""), 2, "a session's name is")
    other = SessionFile("work")
    one_line(run("chat", "--session", "work", stdin="Hello\n"), 2, 'session "work" is open in another chat')
    other.close()
    (folder / "work.json").write_text("{")
    one_line(run("chat", "--session", "work", stdin="Hello\n"), 2, "not JSON")
    assert (folder / "work.json").read_text() == "{"


def test_a_session_is_kept_when_a_later_line_fails(run: Run, folder: Path) -> None:
    result = run("chat", "--session", "work", "--max-tokens", 3, stdin="Hello\n@none\n")
    assert result.exit_code == 2
    assert contents(folder)[0] == "Hello"


def test_a_reply_is_kept_while_it_is_written(
    folder: Path, open_ensemble: OpenEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_KEPT_EVERY", -1.0)
    ensemble = open_ensemble("bpe_a", "spm")
    console = make_console()
    session = Session(Chat(ensemble), Painter(console, ensemble.names), console, SessionFile("work"))
    session.chat.set(Overrides(seed=1, ignore_eos=True))
    steps = session.steps(session.chat.say("Hello"))
    written = "".join(next(steps).text for _ in range(5))
    next(steps)  # before it, what is there is written
    assert contents(folder) == ["Hello", written]
    assert session.chat.messages == []


def test_thoughts_are_kept(run: Run, tiny: dict[str, Path], tmp_path: Path, folder: Path) -> None:
    thinker = write_thinkers(tmp_path, tiny)
    options = ["--session", "work", "--seed", 16, "--max-tokens", 20]
    run("chat", *options, models=thinker, stdin="Hi\n")
    reply = kept(folder)["messages"][1]
    assert reply["reasoning_content"]
    result = run("chat", *options, models=thinker, stdin="/thought\n/export md\n")
    assert reply["reasoning_content"] in result.stderr
    assert f"<details><summary>Thought</summary>\n\n{reply['reasoning_content']}\n\n</details>" in result.stdout


def test_a_comparison_without_a_terminal(run: Run, folder: Path) -> None:
    result = run("chat", "--session", "work", "--seed", 1, "--max-tokens", 6, stdin="Hello\n/compare\n/pick 2\n")
    assert result.exit_code == 0, result.stderr
    first, again, *members = result.stdout.splitlines()
    assert first == again
    assert len(members) == 2
    assert [turn.get("by") for turn in kept(folder)["aside"]] == [None, "bpe_a", "spm"]
    assert contents(folder) == ["Hello", members[0]]
    assert "bpe_a 100%, spm 0%" in result.stderr
    assert "2   bpe_a" in result.stderr


def test_a_comparison_of_what_has_no_reply_yet(run: Run, tmp_path: Path) -> None:
    (tmp_path / "saved.json").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    result = run("chat", "--max-tokens", 6, stdin="/load saved.json\n/pick\n/compare\n")
    assert result.exit_code == 0, result.stderr
    assert "*1  ensemble" in result.stderr
    assert "3   spm" in result.stderr


def test_markdown(run: Run, tmp_path: Path) -> None:
    result = run(
        "chat", "--max-tokens", 6, "--seed", 1, stdin="/system Be brief.\nHello\n/export md\n/export md a.md\n"
    )
    reply, _, text = result.stdout.partition("\n")
    assert text == f"## System\n\nBe brief.\n\n## User\n\nHello\n\n## Assistant\n\n{reply}\n"
    assert (tmp_path / "a.md").read_text() == text
    assert "Wrote 2 messages to a.md." in result.stderr


def test_markdown_of_code_that_was_cut_off() -> None:
    messages = [Message("user", "Hi"), Message("assistant", "````py\nx = 1"), Message("user", "Go on")]
    assert "````py\nx = 1\n````\n\n## User" in as_markdown(None, messages)


def test_copying_by_a_program(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "wl-copy"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/copied\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    result = run("chat", "--max-tokens", 6, stdin="Hello\n/copy\n")
    assert "Copied the last reply, by wl-copy." in result.stderr
    assert (tmp_path / "copied").read_text() == result.stdout.removesuffix("\n")
    program.write_text("#!/bin/sh\nexit 3\n")
    one_line(run("chat", "--max-tokens", 6, stdin="Hello\n/copy\n"), 2, "/copy: wl-copy: ", "exit status 3")


def test_a_file_in_a_message(run: Run, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "notes.txt").write_text("one\n")
    run("chat", "--session", "work", "--max-tokens", 3, stdin="//etc of @notes.txt\n")
    assert contents(folder)[0] == "notes.txt:\n```\none\n```\n\n/etc of notes.txt"


@pytest.mark.parametrize("options", [("--strategy", "ce"), ("--strategy", "union"), ("--unit", "word")])
def test_members_are_asked_alone_in_every_way_to_mix(run: Run, options: tuple[str, str], folder: Path) -> None:
    result = run("chat", *options, "--session", "work", "--max-tokens", 4, "--seed", 1, stdin="Hello\n/compare\n")
    assert result.exit_code == 0, result.stderr
    assert [turn.get("by") for turn in kept(folder)["aside"]] == [None, "bpe_a", "spm"]
    assert "bpe_a 100%, spm 0%" in result.stderr
    assert "bpe_a 0%, spm 100%" in result.stderr


def test_names_of_sessions_are_completed_in_a_shell() -> None:
    for name in ("work", "wood", "other"):
        session = SessionFile(name)
        session.write({"system": None, "messages": [{"role": "user", "content": "Hi"}], "aside": []})
        session.close()
    found = ShellComplete(main, {}, "me-local", "_ME_LOCAL_COMPLETE").get_completions(["chat", "--session"], "wo")
    assert {item.value for item in found} == {"work", "wood"}
