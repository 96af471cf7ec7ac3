"""The chat on a real pseudo-terminal: colours, Ctrl-C, several lines, history."""

import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from terminals import ME_LOCAL, PROMPT, ask, chats, spawn

WriteModels = Callable[..., Path]
Terminal = Callable[..., pexpect.spawn]

COLOUR = re.compile(r"\x1b\[3[0-7]m")


@pytest.fixture
def terminal(write_models: WriteModels, tmp_path: Path) -> Iterator[Terminal]:
    """Opens a chat that has greeted; see `chats`."""
    with chats(write_models, tmp_path) as open_chat:

        def greeted(*options: str, **env: str) -> pexpect.spawn:
            child = open_chat(*options, **env)
            child.expect("lists the commands")
            return child

        yield greeted


@pytest.mark.slow
def test_pieces_have_the_colour_of_their_member(terminal: Terminal) -> None:
    child = terminal()
    assert "\x1b[36m■ bpe_a" in child.before
    assert "\x1b[33m■ spm" in child.before
    ask(child, "Hello")
    child.expect("8 pieces")
    assert {"\x1b[36m", "\x1b[33m"} <= set(COLOUR.findall(child.before))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "env"), [(["--no-color"], {}), ([], {"NO_COLOR": "1"})])
def test_colours_can_be_turned_off(terminal: Terminal, options: list[str], env: dict[str, str]) -> None:
    child = terminal(*options, **env)
    assert not COLOUR.search(child.before)
    ask(child, "Hello")
    child.expect("8 pieces")
    assert not COLOUR.search(child.before)


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(terminal: Terminal) -> None:
    # With the best piece of each member alone, this seed's reply goes on until the context is full.
    child = terminal("--top-k", "1", "--seed", "2", "--max-tokens", "100000")
    ask(child, "Hello")
    child.expect(r"(?s)\x1b\[3[36]m.{1500}")  # some eighty pieces
    child.sendintr()
    child.expect(r"me: (\d+) pieces")
    pieces = int(child.match.group(1))
    child.expect(r"bpe_a (\d+)\+0")
    prompt = int(child.match.group(1))
    child.expect("cancelled, seed 2")
    assert 40 < pieces < 2048
    ask(child, "/set max_tokens 5")
    ask(child, "Again")
    child.expect(r"bpe_a (\d+)\+(\d+)")
    # All of the first prompt is still in the cache, and of the cancelled reply what was whole characters.
    assert int(child.match.group(2)) >= prompt
    child.expect(PROMPT)
    child.sendintr()
    child.expect("Ctrl-D or /exit leaves")
    child.expect(PROMPT)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.slow
def test_an_error_keeps_the_chat(terminal: Terminal) -> None:
    child = terminal()
    ask(child, "/set temperature hot")
    child.expect("Error: /set temperature: must be a number")
    ask(child, "Hello")
    child.expect("8 pieces")
    ask(child, "/exit")
    child.expect(pexpect.EOF)


@pytest.mark.slow
def test_several_lines_make_one_message(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal()
    child.expect(PROMPT)
    child.send("first line\x1b\rsecond line\r")
    child.expect("8 pieces")
    ask(child, f"/save {tmp_path}/chat.json")
    child.expect("Saved 2 messages")
    assert '"first line\\nsecond line"' in (tmp_path / "chat.json").read_text()


@pytest.mark.slow
def test_the_history_lasts_from_one_run_to_the_next(terminal: Terminal) -> None:
    child = terminal()
    ask(child, "remember me")
    child.expect("8 pieces")
    child.expect(PROMPT)
    child.sendeof()
    child.expect(pexpect.EOF)
    child = terminal()
    child.expect(PROMPT)
    child.send("\x1b[A")
    child.expect("remember me")


@pytest.mark.slow
def test_the_history_is_for_its_user_alone(terminal: Terminal, tmp_path: Path) -> None:
    folder = tmp_path / ".local" / "state" / "me-local"
    child = terminal()
    child.expect(PROMPT)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "history").stat().st_mode) == 0o600
    child.sendeof()
    child.expect(pexpect.EOF)
    (folder / "history").chmod(0o644)  # as an earlier version left it
    child = terminal()
    child.expect(PROMPT)
    assert stat.S_IMODE((folder / "history").stat().st_mode) == 0o600


@pytest.mark.slow
def test_ctrl_z_suspends_and_the_chat_goes_on(terminal: Terminal, tmp_path: Path) -> None:
    """In a shell with job control: elsewhere the system leaves out the signal, because nobody could go on with it."""
    shell = spawn(
        ["--norc", "--noprofile", "-i"], tmp_path, program="bash", PS1="shell: ", BASH_SILENCE_DEPRECATION_WARNING="1"
    )
    try:
        shell.sendline(f"{ME_LOCAL} chat --models {tmp_path}/models.toml")
        shell.expect("lists the commands")
        shell.expect(PROMPT)
        shell.send("\x1a")
        shell.expect("Stopped")
        shell.sendline("echo $((6 * 7)) in the shell")
        shell.expect("42 in the shell")
        shell.sendline("fg")
        ask(shell, "Hello")
        shell.expect("8 pieces")
        ask(shell, "/exit")
        shell.expect("shell: ")
    finally:
        shell.close(force=True)


@pytest.mark.slow
def test_ctrl_c_ends_generate_with_what_there_is(write_models: WriteModels, tmp_path: Path) -> None:
    models = write_models("bpe_a", "spm")
    models.write_text(models.read_text().replace("n_ctx = 512", "n_ctx = 2048"))
    options = ["--top-k", "1", "--seed", "2", "--max-tokens", "100000"]
    child = spawn(["generate", "--models", str(models), "--raw", "the cat", *options], tmp_path)
    child.expect(r"\w\w")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert "Traceback" not in child.before


@pytest.mark.slow
def test_a_new_user_lists_models_and_chats_with_two_of_them(stocked: Path, tmp_path: Path) -> None:
    listed = spawn(["models"], stocked, COLUMNS="200")
    listed.expect("ollama:tiny:latest")
    listed.expect("No members of an ensemble:")
    listed.expect(pexpect.EOF)
    named = ["-m", "ollama:tiny:0.5", "-m", "lmstudio:me/split-GGUF:0.5"]
    child = spawn(["chat", *named, "--seed", "1", "--max-tokens", "8"], stocked, XDG_STATE_HOME=str(tmp_path))
    child.expect("■ tiny")
    child.expect("■ split")
    ask(child, "Hello")
    child.expect("8 pieces|stop")
    ask(child, "/exit")
    child.expect(pexpect.EOF)


@pytest.mark.slow
def test_bash_completes_names_of_models(stocked: Path) -> None:
    shell = spawn(["--norc", "-i"], stocked, "bash", PS1="$ ", TERM="dumb", COMP_WORDBREAKS=" \t\n")
    shell.sendline(f'COMP_WORDBREAKS=" "; eval "$(_ME_LOCAL_COMPLETE=bash_source {ME_LOCAL})"; echo rea""dy')
    shell.expect("ready")
    shell.send("me-local chat -m lmstudio:me/s\t")
    shell.expect("lmstudio:me/split-GGUF/split")
    shell.close(force=True)
