"""`me-local init`: from a home with models to a file that chats."""

import os
import resource
import shlex
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from commands import one_line
from terminals import spawn

from me_local.cli import init as init_module
from me_local.cli.program import main
from me_local.config import load_config
from me_local.errors import RunError


def invoke(*arguments: object, text: str | None = None, **env: str) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), env=env, input=text)


@pytest.fixture
def here(tmp_path: Path, stocked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, in a home with models."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(path: Path) -> list[str]:
    return [member.name for member in load_config(path).members]


def test_the_proposal_is_tried_written_and_chats(here: Path) -> None:
    result = invoke("init", "--yes")
    assert result.exit_code == 0, result.output
    config = load_config(here / "models.toml")
    # One of the four files with bpe_a, which alone has a template, and the other model with its vocabulary.
    assert [(member.name, member.weight, member.n_ctx) for member in config.members] == [
        ("tiny", 0.8, 2048),
        ("tiny:3", 0.2, 2048),
    ]
    assert "proposed are tiny and tiny:3, which share a vocabulary, are near in size, need 1.3 MB" in result.stderr
    assert "me: " in result.stderr  # the figures of the reply
    assert "tiny and tiny:3 have one vocabulary" in result.stderr
    text = (here / "models.toml").read_text()
    assert "# ollama:tiny:latest: 44.2 K parameters as F32" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("path")) <= 120
    chat = invoke("chat", "--max-tokens", 3, "--seed", 1, text="Hello\n")
    assert chat.exit_code == 0, chat.output
    assert chat.stdout.strip()


@pytest.mark.slow
def test_names_are_the_members(here: Path) -> None:
    output = here / "two.toml"
    result = invoke("init", "ollama:tiny:1b:3", "hf:me/hub-GGUF:Q4_K_M", "--output", output)
    assert result.exit_code == 0, result.output
    config = load_config(output)
    assert [(member.name, member.weight) for member in config.members] == [("tiny:1b", 0.75), ("hub-Q4_K_M", 0.25)]
    assert f"me-local chat --models {output}" in result.stderr
    assert "at the same places" in result.stderr


@pytest.mark.slow
def test_a_member_of_each_store(here: Path) -> None:
    stores = [
        "ollama:tiny",
        "lmstudio:me/split-GGUF/split",
        "hf:me/hub-GGUF:Q8_0",
        "hf:me/flat-GGUF",
        "~/gguf/own.gguf",
    ]
    result = invoke("init", *stores)
    assert result.exit_code == 0, result.output
    assert names(here / "models.toml") == ["tiny", "split", "hub-Q8_0", "flat-Q4_0", "own"]
    for command in (["chat", "--max-tokens", 3], ["inspect"], ["inspect", "--prompt", "Hello"]):
        done = invoke(*command, text="Hello\n")
        assert done.exit_code == 0, done.output


def test_a_model_below_the_folder_keeps_its_relative_path(here: Path, tiny: dict[str, Path]) -> None:
    odd = here / 'a "model" é.gguf'
    odd.write_bytes(tiny["bpe_a"].read_bytes())
    assert invoke("init", "./" + odd.name).exit_code == 0
    assert f'path = "{odd.name}"'.replace('"model"', '\\"model\\"') in (here / "models.toml").read_text()
    assert load_config(here / "models.toml").members[0].path == odd
    assert f"{shlex.quote(str(odd))}: 44.2 K parameters" in (here / "models.toml").read_text().replace("\n# ", " ")


def test_numbers_where_there_is_no_terminal(here: Path) -> None:
    result = invoke("init", text="6, 5\n")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stderr.splitlines() if line[1:4].strip().isdigit()]
    starred = [row.split()[1] for row in rows if row.startswith("*")]
    assert (len(rows), starred) == (13, ["1", "9"])
    assert names(here / "models.toml") == ["tiny:1b", "newer:3b"]


@pytest.mark.parametrize(
    ("text", "part"), [("99\n", '"99" is no number of the list: 1 to 13'), ("a\n", '"a" is no number'), ("", "--yes")]
)
def test_wrong_numbers_are_one_line(here: Path, text: str, part: str) -> None:
    one_line(invoke("init", text=text), 2, part)
    assert not (here / "models.toml").exists()


def test_a_file_that_exists_is_left_as_it_is(here: Path) -> None:
    (here / "models.toml").write_text("mine")
    one_line(invoke("init", "--yes"), 2, "models.toml: it exists already", "--output")
    one_line(invoke("init", "--yes", "--output", here / "no" / "m.toml"), 2, "there is no folder")
    (here / "link.toml").symlink_to(here / "nowhere.toml")
    one_line(invoke("init", "--yes", "--output", "link.toml"), 2, "link.toml: it exists already")
    assert (here / "models.toml").read_text() == "mine"


def test_a_full_disk_gets_no_part_of_a_file(tmp_path: Path) -> None:
    output, limit = tmp_path / "models.toml", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(RunError, match="File too large"):
            init_module._write(output, "x" * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not output.exists()


def test_what_cannot_be_loaded_is_not_written(here: Path, stocked: Path) -> None:
    broken = here / "broken.gguf"
    broken.write_bytes((stocked / "gguf" / "own.gguf").read_bytes()[:-1000])
    one_line(invoke("init", "ollama:tiny", broken), 2, "broken.gguf", "nothing is written: choose other models")
    one_line(invoke("init", "ollama:none"), 2, "Ollama has no such model here")
    assert not (here / "models.toml").exists()


def test_a_name_that_no_file_can_hold(here: Path, tiny: dict[str, Path]) -> None:
    odd = here / os.fsdecode(b"\xff.gguf")
    odd.write_bytes(tiny["bpe_a"].read_bytes())
    one_line(invoke("init", odd), 2, "no models.toml can name it")
    lines = here / "a\nb.gguf"
    odd.rename(lines)
    assert invoke("init", lines).exit_code == 0
    assert load_config(here / "models.toml").members[0].path == lines


def test_without_models_it_says_where_to_get_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "ME_LOCAL_MODEL_DIRS": ""}
    one_line(invoke("init", "--yes", **home), 2, "no models are on this machine", "ollama pull", "ME_LOCAL_MODEL_DIRS")


def test_where_nothing_fits_it_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("me_local.cli.init.available_memory", lambda: 100_000)
    result = invoke("init", "--yes")
    one_line(result, 2, "there is no ensemble to propose")
    one_line(invoke("init", text="\n"), 2, "nothing is chosen")
    assert "Note: nothing fits: " in result.stderr
    assert "100.0 kB are free" in result.stderr
    monkeypatch.setattr("me_local.cli.init.available_memory", lambda: 700_000)
    result = invoke("init", "--yes")
    assert result.exit_code == 0, result.output
    assert "would be the better choice, but need 1.3 MB together" in result.stderr
    assert names(here / "models.toml") == ["tiny"]


def test_names_are_completed_by_a_shell(here: Path) -> None:
    shell = ShellComplete(main, {}, "me-local", "_ME_LOCAL_COMPLETE")
    names = [item.value for item in shell.get_completions(["init", "ollama:newer:3b"], "lmstudio:me/s")]
    assert names == ["lmstudio:me/split-GGUF/split"]


@pytest.fixture
def terminal(here: Path, stocked: Path) -> Iterator[pexpect.spawn]:
    child = spawn(["init"], stocked, ME_LOCAL_NO_CHECK="1")
    child.expect("Escape leaves")
    yield child
    child.close(force=True)


UP, DOWN = "\x1b[A", "\x1b[B"


def test_arrow_keys_choose(terminal: pexpect.spawn, here: Path) -> None:
    # The first of the proposal is one no more, and ollama:tiny:1b is another. Only what changes is drawn: see the file.
    terminal.send(" " + DOWN * 6 + UP + " " + "\r")
    terminal.expect("models.toml is written")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert names(here / "models.toml") == ["tiny:1b", "tiny:3"]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["\x1b", "\x03"])
def test_leaving_writes_nothing(terminal: pexpect.spawn, here: Path, key: str) -> None:
    terminal.send(key)
    terminal.expect("nothing is written")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 130
    assert not (here / "models.toml").exists()
