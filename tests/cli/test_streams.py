"""What models, templates and names of files hold reaches no terminal raw; no encoding of the locale ends a command."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import jsonl, one_line
from terminals import ME_LOCAL, spawn

from me_local.cli.program import main
from me_local.cli.streams import printable

WriteModels = Callable[..., Path]
Show = Callable[..., str]

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b1mX\r"
SHOWN = "\ufffd]0;owned\ufffd\ufffd[2J\ufffd1mX"
# What the commands write themselves: colours, and the cursor of progress bars.
OWN = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[1A|\r?\x1b\[2K|\r(?=\n|$|\x1b)")
WILD = ["--temperature", "20", "--top-k", "0", "--seed", "1", "--max-tokens", "80"]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Show:
    """Runs a command whose standard streams are terminals; what these got."""
    monkeypatch.setenv("TERM", "xterm-256color")

    def run(*arguments: object, stdin: str = "") -> str:
        stdout, stderr = Terminal(), Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
            with pytest.raises(SystemExit):
                main([str(argument) for argument in arguments])
        return stdout.getvalue() + stderr.getvalue()

    return run


def safe(text: str) -> bool:
    """Whether all control characters in it are those of our own sequences."""
    rest = OWN.sub("", text)
    return printable(rest) == rest.replace("\r\n", "\n")


@pytest.fixture
def evil(write_models: WriteModels, tiny: dict[str, Path], tmp_path: Path) -> Path:
    """An ensemble whose template raises an error with escapes in it, and whose file is named so, too."""
    (tmp_path / "own.jinja").write_text(f"{{{{ raise_exception({EVIL!r}) }}}}")
    file = tmp_path / "model\x1b]0;owned\x07[red].gguf"
    file.symlink_to(tiny["bpe_a"])
    models = write_models("bpe_a", member='chat_template = "./own.jinja"')
    models.write_text(models.read_text().replace(f'"{tiny["bpe_a"]}"', json.dumps(str(file))))
    return models


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["generate", "Hi"], ""),
        (["generate", "--raw", "Hi", *WILD], ""),
        (["generate", "--raw", "Hi", "--json", *WILD], ""),
        (["generate", "--raw", "Hi", "-n", "2", "--batch", "2", *WILD], ""),
        (["-v", "generate", "--raw", "Hi", *WILD], ""),
        (["chat"], f"/members\n/set temperature {EVIL}\n"),
        (["chat"], f"/load {EVIL}\n"),
        (["chat"], f"/{EVIL}\n"),
        (["chat"], "Hello\n"),
        (["inspect"], ""),
        (["inspect", "--json"], ""),
        (["verify", "--seed", EVIL], ""),
        (["score", EVIL], ""),
        (["fit", "--data", EVIL], ""),
        (["eval", "--task", EVIL, "--data", "."], ""),
        (["generate", "Hi", "--strategy", EVIL], ""),
        (["generate", "--input", EVIL, "--output", "o"], ""),
        ([EVIL], ""),
        ([f"--{EVIL}"], ""),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[:3]).encode("unicode_escape").decode(),
)
def test_no_command_shows_control_characters(show: Show, evil: Path, arguments: list[str], stdin: str) -> None:
    commands = {"generate", "chat", "inspect", "verify", "score", "fit", "eval"}
    at = next((i + 1 for i, word in enumerate(arguments) if word in commands), 0)
    models = ["--models", evil] if at else []
    shown = show(*arguments[:at], *models, *arguments[at:], stdin=stdin)
    assert len(shown) > 20
    assert safe(shown), shown


def test_an_error_shows_what_a_template_says(evil: Path) -> None:
    result = CliRunner().invoke(main, ["generate", "--models", str(evil), "Hi"])
    one_line(result, 2, SHOWN)


def test_a_reply_is_shown_without_controls_and_piped_with_them(show: Show, write_models: WriteModels) -> None:
    models = write_models("spm")
    command = ["generate", "--models", models, "--raw", "the cat", *WILD]
    piped = CliRunner().invoke(main, list(map(str, command))).stdout
    assert printable(piped) != piped
    assert "\x1b" in piped or "\x9b" in piped or "\x07" in piped
    shown = OWN.sub("", show(*command))
    assert printable(piped).replace("\n", "") in shown.replace("\n", "")


def test_escapes_are_kept_off_a_terminal(write_models: WriteModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also whole sequences, which click.echo takes out there."""
    monkeypatch.setattr("me_local.decoding.reply.ReplyStream.__next__", _one_step("\x1b[31mred\x1b[0m\x85"))
    result = CliRunner().invoke(main, ["generate", "--models", str(write_models("bpe_a")), "Hi"])
    assert result.stdout.startswith("\x1b[31mred\x1b[0m\x85")


def _one_step(text: str) -> Callable[..., object]:
    from me_local.decoding.reply import Step

    steps = iter([Step(text.encode(), text, "bpe_a", 1.0, (1.0,), answer=text)])
    return lambda _: next(steps)


@pytest.mark.slow
def test_on_a_real_terminal(evil: Path, tmp_path: Path) -> None:
    child = spawn(["generate", "--models", str(evil), "Hi"], tmp_path)
    child.expect("Error: ")
    child.expect("\r\n")
    assert SHOWN in child.before
    child.close(force=True)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["iso-8859-1", "ascii", "utf-8"])
def test_every_encoding_takes_every_reply(two_models: Path, tmp_path: Path, encoding: str) -> None:
    """Text is in the encoding of the locale, with replacements; JSON is UTF-8 everywhere."""

    def run(command: str, *arguments: object, stdin: bytes = b"") -> bytes:
        given = [command, "--models", str(two_models), *map(str, arguments)]
        result = CliRunner(charset=encoding).invoke(main, given, input=stdin)
        assert result.exit_code == 0, result.output
        return result.stdout_bytes

    wild = ["--seed", 3, "--top-k", 0, "--temperature", 1.5, "--max-tokens", 120]
    reply = json.loads(run("generate", *wild, "--json", "Hi").decode())["text"]
    assert not reply.isascii()
    assert run("generate", *wild, "Hi") == (reply + "\n").encode(encoding, "replace")
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "Hi"})
    assert run("generate", *wild, "--input", source, "--output", tmp_path / "out.jsonl") == b""
    written = run("generate", *wild, "--input", "-", "--output", "-", stdin=source.read_bytes())
    for line in (written, (tmp_path / "out.jsonl").read_bytes()):
        assert json.loads(line.decode())["text"] == reply
    assert run("chat", *wild, stdin=b"Hi\n") == (reply + "\n").encode(encoding, "replace")
    assert len(run("inspect").splitlines()) > 20


@pytest.mark.slow
def test_closed_streams(two_models: Path) -> None:
    command = f'exec "{ME_LOCAL}" generate --models "{two_models}" --max-tokens 2 Hi <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], timeout=60, check=False).returncode == 0


@pytest.mark.slow
def test_a_reader_that_has_gone(two_models: Path) -> None:
    command = f'"{ME_LOCAL}" generate --models "{two_models}" --raw --max-tokens 300 Hi | true'
    result = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in result.stderr
    assert b"Error" not in result.stderr
    assert b"Exception" not in result.stderr


@pytest.mark.parametrize("verbose", [[], ["-v"]])
def test_a_fault_of_the_program_is_one_line(
    two_models: Path, monkeypatch: pytest.MonkeyPatch, verbose: list[str]
) -> None:
    def fails(*_: object) -> None:
        raise TypeError("what\nnobody thought of\x1b[2J")

    monkeypatch.setattr(sys.modules["me_local.cli.generate"], "configured", fails)
    result = CliRunner().invoke(main, [*verbose, "generate", "--models", str(two_models), "Hi"])
    one_line(result, 1, "an error of the program: TypeError: what nobody thought of\ufffd[2J; me-local -v shows where")
    assert ("Traceback" in result.stderr) == bool(verbose)
