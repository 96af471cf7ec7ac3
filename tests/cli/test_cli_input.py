"""What is read from standard input, from arguments and from the environment, as other systems write it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from commands import Run, jsonl, one_line, records

from me_local import InputError
from me_local.cli.input import argument_text
from me_local.cli.options import variable_of
from me_local.cli.program import main

WriteModels = Callable[..., Path]


@pytest.mark.parametrize(
    "stdin", [b"Hi there", b"Hi there\n", b"Hi there\r\n", b"\xef\xbb\xbfHi there\n", b"\xef\xbb\xbfHi there\r\n"]
)
def test_other_systems_write_the_same_prompt(run: Run, stdin: bytes) -> None:
    expected = run("generate", "--raw", "Hi there", "--seed", 1, "--max-tokens", 8).stdout
    assert run("generate", "--raw", "--seed", 1, "--max-tokens", 8, stdin=stdin).stdout == expected


@pytest.mark.parametrize(
    ("stdin", "text"),
    [(b"a\n\n", "a\n"), (b"a\r\n\r\n", "a\r\n"), (b"a\r\r\n", "a\r"), (b"a\r", "a"), (b"a\xef\xbb\xbf\n", "a\ufeff")],
)
def test_one_end_of_a_line_and_one_mark_are_taken_away_and_no_more(run: Run, stdin: bytes, text: str) -> None:
    piped = run("generate", "--raw", "--seed", 1, "--max-tokens", 8, stdin=stdin)
    assert piped.stdout == run("generate", "--raw", text, "--seed", 1, "--max-tokens", 8).stdout


def asked(run: Run, stdin: bytes, folder: Path, charset: str = "utf-8") -> list[str]:
    """What the user says in a scripted chat."""
    saved = folder / "chat.json"
    result = run("chat", "--max-tokens", 2, stdin=stdin + f"/save {saved}\n".encode(charset))
    assert result.exit_code == 0, result.stderr
    return [m["content"] for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"]


def test_lines_of_a_chat(run: Run, tmp_path: Path) -> None:
    script = "\ufeffHello\r\n\r\n//etc/hosts is readable\r\n///x\n"
    assert asked(run, script.encode(), tmp_path) == ["Hello", "/etc/hosts is readable", "//x"]
    one_line(run("chat", stdin="/etc/hosts?\n"), 2, 'there is no command "/etc/hosts?"', "begin a message with //")
    assert "//etc/hosts" in run("chat", stdin="/help\n").stderr


def test_input_in_the_encoding_of_the_locale(write_models: WriteModels) -> None:
    command = ["generate", "--models", str(write_models("bpe_a")), "--raw", "--seed", "1", "--max-tokens", "8"]
    expected = CliRunner().invoke(main, [*command, "é à"]).stdout
    for stdin in ("é à\n".encode("iso-8859-1"), "é à\n".encode()):
        result = CliRunner(charset="iso-8859-1").invoke(main, command, input=stdin)
        assert result.stdout_bytes == expected.encode("iso-8859-1", "replace")


def test_an_argument_that_is_no_text() -> None:
    assert argument_text("é", "PROMPT") == "é"
    with pytest.raises(InputError, match="PROMPT: not UTF-8 at byte 3"):
        argument_text("é\udcff", "PROMPT")


def test_prompts_from_standard_input_and_records_to_standard_output(run: Run, tmp_path: Path) -> None:
    source, output = jsonl(tmp_path / "in.jsonl", {"id": 5, "prompt": "Hi", "seed": 2}), tmp_path / "out.jsonl"
    options = ["generate", "--max-tokens", 3, "--input"]
    assert run(*options, source, "--output", output).exit_code == 0
    text = records(output)[0]["text"]
    for arguments, stdin in ((["-", "--output", "-"], source.read_bytes()), ([source, "--output", "-"], None)):
        result = run(*options, *arguments, stdin=stdin)
        assert (result.exit_code, json.loads(result.stdout)["text"], result.stdout.count("\n")) == (0, text, 1)
    assert run(*options, "-", "--output", tmp_path / "2.jsonl", stdin=source.read_bytes()).exit_code == 0
    assert records(tmp_path / "2.jsonl")[0]["text"] == text
    one_line(run(*options, "-", "--output", "-", stdin="\n"), 2, "standard input: it has no line with a prompt")
    one_line(run(*options, "-", "--output", "-", "--resume"), 2, "--resume goes with an --output that is a file")
    failed = json.loads(run(*options, "-", "--output", "-", stdin="{}\n").stdout)
    assert failed["error"].startswith("standard input, line 1: ")


def test_a_file_whose_name_is_a_dash(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "-", {"prompt": "Hi"})
    assert run("generate", "--input", "./-", "--output", "out.jsonl", "--max-tokens", 1).exit_code == 0
    assert len(records(tmp_path / "out.jsonl")) == 1


def test_the_home_where_no_shell_replaces_it(write_models: WriteModels, tmp_path: Path) -> None:
    models = write_models("bpe_a")
    home = tmp_path / "home"
    home.mkdir()
    (home / "x.toml").write_text(models.read_text())
    (home / "text.txt").write_text("the cat sat on the mat and then it sat again")
    jsonl(home / "in.jsonl", {"prompt": "Hi"})
    env = {"HOME": str(home)}
    options = ["--max-tokens", "1"]
    commands = [
        (["generate", "--models=~/x.toml", "Hi", *options], env),
        (["generate", "Hi", *options], env | {"ME_LOCAL_MODELS": "~/x.toml"}),
        (["generate", "--models=~/x.toml", "--input=~/in.jsonl", "--output=~/out.jsonl", *options], env),
        (["score", "--models=~/x.toml", "~/text.txt"], env),
    ]
    for arguments, variables in commands:
        result = CliRunner().invoke(main, arguments, env=variables)
        assert result.exit_code == 0, result.output
    assert len(records(home / "out.jsonl")) == 1


@pytest.mark.slow
def test_as_a_module() -> None:
    command = [sys.executable, "-m", "me_local", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.startswith("me-local")


def every_option() -> Iterator[tuple[str, click.Option]]:
    for name, command in {"": main, **main.commands}.items():
        yield from ((name, option) for option in command.params if isinstance(option, click.Option))


def test_variables_are_those_that_the_help_shows() -> None:
    """An option has the variable of its name or none, and shows it; a variable means one thing in all commands."""
    of_variable: dict[str, set[str]] = {}
    for command, option in every_option():
        longest = max(option.opts, key=len)
        assert option.envvar in (None, variable_of(longest)), (command, longest)
        assert (option.envvar is not None) == option.show_envvar, (command, longest)
        if option.envvar:
            help_ = CliRunner().invoke(main, [command, "--help"], terminal_width=200).stdout
            assert f"env var: {option.envvar}" in " ".join(help_.split())
            of_variable.setdefault(str(option.envvar), set()).add(f"{option.type} {option.multiple} {option.help}")
    assert all(len(meanings) == 1 for meanings in of_variable.values()), of_variable
    assert {"ME_LOCAL_STOP", "ME_LOCAL_CORS", "ME_LOCAL_SYSTEM", "ME_LOCAL_PORT"} <= set(of_variable)
    promise = " ".join(CliRunner().invoke(main, ["--help"]).stdout.split())
    assert "The environment variable that an option shows sets it, too" in promise


def test_a_stop_text_from_the_environment_is_one_with_its_white_space(run: Run) -> None:
    options = ["generate", "--raw", "the cat", "--seed", 3, "--max-tokens", 60]
    text = run(*options).stdout
    stop = next(text[i - 1 : i + 2] for i, c in enumerate(text) if c == " " and 5 < i < len(text) - 3)
    ended = run(*options, env={"ME_LOCAL_STOP": stop}).stdout
    assert ended == run(*options, "--stop", stop).stdout
    assert ended == text[: text.index(stop)] + "\n"


@pytest.mark.parametrize("value", ["tcp://10.43.12.7:8000", "udp://10.43.12.7:53"])
def test_the_address_that_kubernetes_puts_into_the_variable_of_the_port(value: str) -> None:
    port = next(option for command, option in every_option() if command == "serve" and option.name == "port")
    context = click.Context(main.commands["serve"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "ME_LOCAL_PORT", value)
        assert port.consume_value(context, {})[0] == 8000
        patch.setitem(os.environ, "ME_LOCAL_PORT", "8123")
        assert port.consume_value(context, {})[0] == "8123"


def test_a_port_that_is_none(two_models: Path) -> None:
    result = CliRunner().invoke(main, ["serve", "--models", str(two_models)], env={"ME_LOCAL_PORT": "http"})
    assert result.exit_code == 2
    assert "'http' is not a valid integer" in result.stderr
