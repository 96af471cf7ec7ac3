"""`me-local models`, and `-m` wherever models are loaded."""

import json
from pathlib import Path
from typing import Any

import click
import make_home
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from commands import jsonl, one_line

from me_local.cli.program import main

ALONE = ["--max-tokens", "2", "--seed", "1", "--raw", "Hi"]


def invoke(*arguments: object, **env: str) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), env=env)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without a models.toml, as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_row_for_each_model(stocked: Path) -> None:
    result = invoke("models")
    assert result.exit_code == 0, result.output
    head, *rows = result.stdout.split("\n\n")[0].splitlines()
    titles = ["model", "architecture", "size", "quantisation", "file", "context", "vocabulary", "template"]
    assert head.split() == titles
    assert [row.split()[0] for row in rows] == [*make_home_names(), "~/gguf/own.gguf"]
    tiny = next(row for row in rows if row.startswith("ollama:tiny:latest"))
    assert " ".join(tiny.split()) == "ollama:tiny:latest llama 44.2 K F32 186.6 kB 2,048 BPE 400 chat"
    others = result.stdout.split("\n\n")[1].splitlines()
    assert others[0] == "No members of an ensemble:"
    assert "  ollama:lost:latest: there is no such file" in others
    assert any(line.startswith("  ~/'gguf/deep/cut off.gguf': it is not whole") for line in others)


def make_home_names() -> list[str]:
    """The order is that of the stores, and in Ollama's that of its manifests, of which later ones go first."""
    ollama = [name for name in make_home.MODELS if name.startswith("ollama:")]
    first = ["ollama:newer:3b", "ollama:hf.co/me/tiny-GGUF:Q4_K_M", "ollama:tiny:1b", "ollama:tiny:latest"]
    assert {*first, "ollama:somebody/tiny:3"} == set(ollama)
    studio = ["split-GGUF/split", "tiny-GGUF/tiny-Q4_K_M", "tiny-GGUF/tiny-Q8_0"]
    rest = [name for name in make_home.MODELS if name.startswith(("hf:", "lmstudio:old"))]
    return [*first, "ollama:somebody/tiny:3", *(f"lmstudio:me/{name}" for name in studio), *rest]


def test_as_json(stocked: Path) -> None:
    models = {model["name"]: model for model in json.loads(invoke("models", "--json").stdout)}
    assert models.keys() >= make_home.MODELS.keys()
    split = models["lmstudio:me/split-GGUF/split"]
    assert (split["store"], len(split["files"]), split["problem"]) == ("LM Studio", 2, None)
    assert (split["vocabulary"], split["vocabulary_size"], split["context"]) == ("SPM", 621, 2048)
    broken = models[f"{stocked}/gguf/page.gguf"]
    assert broken["problem"].startswith("not a GGUF file")
    assert "architecture" not in broken


def test_a_narrow_terminal_gets_two_lines_for_each(stocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from me_local.cli import models

    console = models.make_console()
    monkeypatch.setattr(type(console), "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = invoke("models").stdout.splitlines()
    place = lines.index("ollama:tiny:latest")
    assert lines[place + 1] == "  llama 44.2 K, F32, 186.6 kB, context 2,048, BPE 400, template: chat"


def test_nothing_is_on_this_machine(tmp_path: Path) -> None:
    result = invoke("models", HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), ME_LOCAL_MODEL_DIRS="")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No GGUF models are on this machine" in result.stderr
    assert "ME_LOCAL_MODEL_DIRS" in result.stderr
    assert json.loads(invoke("models", "--json", HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)).stdout) == []


def every_command_with_models() -> list[click.Command]:
    return [command for command in main.commands.values() if any(p.name == "models" for p in command.params)]


def test_members_are_taken_wherever_models_are(stocked: Path) -> None:
    commands = every_command_with_models()
    assert {command.name for command in commands} >= {"chat", "generate", "serve", "eval", "bench", "inspect"}
    for command in commands:
        (option,) = (param for param in command.params if param.name == "member")
        assert option.opts == ["--member", "-m"]


def test_an_ensemble_without_a_file(stocked: Path, elsewhere: Path) -> None:
    report = json.loads(invoke("inspect", "--json", "-m", "ollama:tiny:3", "--member", "hf:me/flat-GGUF:1").stdout)
    assert [member["name"] for member in report["members"]] == ["tiny", "flat-Q4_0"]
    named = invoke("generate", "-m", "ollama:tiny:1", "-m", "lmstudio:old:1", *ALONE)
    assert named.exit_code == 0, named.output
    other = invoke("generate", *ALONE, ME_LOCAL_MEMBER="ollama:tiny '~/gguf/own.gguf:0'")
    assert other.exit_code == 0, other.output
    text = elsewhere / "text.txt"
    text.write_text("the cat sat on the mat and then it sat again")
    assert (
        invoke("score", "-m", "ollama:tiny", "-m", "ollama:tiny:1b", "--weights", "tiny=1,tiny:1b=3", text).exit_code
        == 0
    )


def test_members_and_a_file(stocked: Path, elsewhere: Path, two_models: Path) -> None:
    both = ["-m", "ollama:tiny", "--models", two_models]
    one_line(invoke("generate", *both, *ALONE), 2, "--member and --models: name an ensemble by one of the two")
    names = ["inspect", "--json"]
    held = invoke(*names, "-m", "ollama:tiny", ME_LOCAL_MODELS=str(two_models)).stdout
    assert len(json.loads(held)["members"]) == 1
    both_held = invoke(*names, ME_LOCAL_MEMBER="ollama:tiny", ME_LOCAL_MODELS=str(two_models))
    one_line(both_held, 2, "--member and --models: name an ensemble by one of the two")
    said = invoke(*names, "--models", two_models, ME_LOCAL_MEMBER="ollama:tiny").stdout
    assert len(json.loads(said)["members"]) == 2


def test_without_either_three_ways_are_named(elsewhere: Path) -> None:
    for arguments in (["chat"], ["generate", "Hi"], ["inspect"], ["bench"], ["verify"]):
        ways = ("no models: ", "-m MODEL", "me-local models", "--models FILE", "me-local init write a models.toml here")
        one_line(invoke(*arguments), 2, *ways)
    one_line(invoke("inspect", "--models", "models.toml"), 2, "models.toml: cannot be read: no such file")


def test_wrong_members_are_one_line(stocked: Path, elsewhere: Path) -> None:
    one_line(invoke("chat", "-m", "ollama:tiny:1b", "-m", "tin"), 2, '--member "tin": there is no such file')
    one_line(invoke("chat", ME_LOCAL_MEMBER="'a"), 2, "ME_LOCAL_MEMBER: no closing quotation")
    one_line(invoke("inspect", "-m", "~/gguf/page.gguf"), 2, "page.gguf: not a GGUF file")
    one_line(invoke("inspect", "-m", "~/gguf/embedding.gguf"), 2, "embedding.gguf")


def test_weights_are_not_written_where_there_is_no_file(stocked: Path, elsewhere: Path) -> None:
    data = jsonl(elsewhere / "d.jsonl", {"prompt": "a", "continuation": "b"})
    one_line(invoke("fit", "-m", "ollama:tiny", "--data", data, "--write"), 2, "--write: there is no file to write to")


def test_a_prompt_that_is_too_long_says_what_to_do(stocked: Path) -> None:
    result = invoke("generate", "-m", "ollama:tiny", "--raw", "a b " * 3000)
    one_line(result, 2, "shorten it, or give it a larger n_ctx, in a models.toml")


def completed(text: str) -> list[Any]:
    shell = ShellComplete(main, {}, "me-local", "_ME_LOCAL_COMPLETE")
    return [(item.value, item.type) for item in shell.get_completions(["generate", "-m"], text)]


def test_names_are_completed_by_a_shell(stocked: Path) -> None:
    names = completed("ollama:t")
    assert names == [("ollama:tiny:1b", "plain"), ("ollama:tiny:latest", "plain")]
    assert completed("./q") == [("./q", "file")]
    assert completed("") == [("", "file")]
