"""Commands through click's runner, for the tests of several packages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from me_local.cli.program import main

WriteModels = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture
def run(write_models: WriteModels) -> Run:
    """Runs a command on an ensemble of bpe_a and spm, or on the file that is given as `models`."""
    default = write_models("bpe_a", "spm")

    def invoke(*arguments: object, models: Path = default, stdin: bytes | str | None = None, **kwargs: Any) -> Result:
        command, *rest = map(str, arguments)
        return CliRunner().invoke(main, [command, "--models", str(models), *rest], input=stdin, **kwargs)

    return invoke


def one_line(result: Result, status: int, *parts: str) -> None:
    """The result is one line of error with these parts, and no traceback."""
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    for part in parts:
        assert part in errors[0]


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
