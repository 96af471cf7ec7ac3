"""--preset and /preset."""

import json
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from commands import Run, one_line
from conftest import WriteModels

from me_local.cli.program import main

TOP = "[sampling]\nignore_eos = true\nmax_tokens = 2\n[presets.long]\nmax_tokens = 5\n[presets.longer]\nmax_tokens = 7"


@pytest.fixture
def models(write_models: WriteModels) -> Path:
    return write_models("bpe_a", "spm", top=TOP)


@pytest.mark.parametrize(
    ("options", "env", "length"),
    [
        ([], {}, 2),
        (["--preset", "long"], {}, 5),
        ([], {"ME_LOCAL_PRESET": "long"}, 5),
        (["--preset", "longer"], {"ME_LOCAL_PRESET": "long"}, 7),
        (["--preset", "long", "--max-tokens", 3], {}, 3),
        (["--preset", "long"], {"ME_LOCAL_MAX_TOKENS": "4"}, 4),
        ([], {"ME_LOCAL_PRESET": ""}, 2),
    ],
)
def test_file_preset_options(run: Run, models: Path, options: list[object], env: dict[str, str], length: int) -> None:
    result = run("generate", "--raw", "the cat", "--json", *options, models=models, env=env)
    assert len(json.loads(result.stdout)["pieces"]) == length


def test_one_that_there_is_not(run: Run, models: Path) -> None:
    result = run("generate", "the cat", "--preset", "lon", models=models)
    one_line(result, 2, '--preset: unknown preset "lon"; did you mean "long"?')


def test_one_that_is_wrong_is_said_whoever_asks(run: Run, write_models: WriteModels) -> None:
    models = write_models("bpe_a", top="[presets.x]\ntop_k = 0.5")
    one_line(run("generate", "the cat", models=models), 2, f"{models}: [presets.x].top_k: must be an integer, got 0.5")


def test_a_chat_lists_and_takes_them(run: Run, models: Path) -> None:
    script = "/preset\nthe cat\n/preset longer\nthe cat\n/preset -\nthe cat\n/preset lng\n"
    result = run("chat", "--preset", "long", models=models, stdin=script)
    one_line(result, 2, '--preset: unknown preset "lng"; did you mean "long"?')
    lines = result.stderr.splitlines()
    assert "Presets: long, longer; now: long" in lines
    assert [line.split()[1] for line in lines if line.startswith("me: ")] == ["5", "7", "2"]
    assert lines.index("preset = longer") < lines.index("preset = -")


def test_a_chat_without_any(run: Run) -> None:
    assert "Presets: none: models.toml has no [presets.NAME]; now: -" in run("chat", stdin="/preset\n").stderr


def test_a_shell_completes_them(models: Path) -> None:
    shell = ShellComplete(main, {}, "me-local", "_ME_LOCAL_COMPLETE")
    found = shell.get_completions(["chat", "--models", str(models), "--preset"], "longe")
    assert [item.value for item in found] == ["longer"]
    assert shell.get_completions(["chat", "--models", "nowhere.toml", "--preset"], "") == []
