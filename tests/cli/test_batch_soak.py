"""A thousand prompts at once, in fits and starts: each record is there once, and is that of an undisturbed run.

Two of the processes kill themselves in the middle of a record, and evaluations fail in all of them. Where, is the same
in each run of the tests, so that these always see the same numbers.
"""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
from click.testing import CliRunner

from me_local.cli.program import main

WriteModels = Callable[..., Path]

COUNT = 1000
KEYS = ("text", "finish_reason", "seed", "route", "error")
# Runs `me-local` in a process in which every tenth evaluation of several sequences fails, half of them after having
# decoded, and which is killed in the middle of a record.
DRIVER = """
import os, signal, sys
from me_local import records
from me_local.cli.program import main
from me_local.llama.member import Member

kill_at, *arguments = sys.argv[1:]
decode, write, calls, written = Member._decode, records.write_record, [0], [0]

def failing(self, parts):
    calls[0] += 1
    if len(parts) == 1 or calls[0] % 10:
        return decode(self, parts)
    if calls[0] % 20:
        decode(self, parts)
    return 1

class Half:
    def __init__(self, file):
        self.file = file
    def write(self, line):
        self.file.write(line[: len(line) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

def killing(file, record):
    written[0] += 1
    write(Half(file) if written[0] == int(kill_at) else file, record)

Member._decode = failing
sys.modules["me_local.cli.generate"].write_record = killing
main(arguments)
"""


def prompt(number: int) -> dict[str, Any]:
    text = "word " * 700 if number % 100 == 99 else f"{'Once more: ' * (number % 4)}number {number}"
    return {"id": f"p{number}", "prompt": text, "max_tokens": 1 + number * 7 % 6}


def records(path: Path) -> dict[str, dict[str, Any]]:
    """What has to be the same of each record, by its id."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert record["id"] not in found
        found[record["id"]] = {key: record.get(key) for key in KEYS}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("route", ["shared", "own"])
def test_a_thousand_prompts_that_are_killed_and_resumed(write_models: WriteModels, tmp_path: Path, route: str) -> None:
    models = write_models("bpe_a", "spm", member='type_k = "f32"\ntype_v = "f32"')
    source, whole, output = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "out.jsonl"))
    source.write_text("".join(json.dumps(prompt(number)) + "\n" for number in range(COUNT)))
    command = ["generate", "--models", str(models), "--input", str(source), "--batch", "8", "--seed", "5"]
    command += ["--route", route, "--resume", "--output"]
    assert CliRunner().invoke(main, [*command, str(whole)]).exit_code == 1
    undisturbed = records(whole)
    assert len(undisturbed) == COUNT
    assert sum(record["error"] is not None for record in undisturbed.values()) == 10
    assert {record["route"] is None for record in undisturbed.values() if not record["error"]} == {route == "own"}
    for kill_at, status in ((420, -signal.SIGKILL), (300, -signal.SIGKILL), (0, 1)):
        driven = [sys.executable, "-c", DRIVER, str(kill_at), *command, str(output)]
        ended = processes.run(driven, seconds=300)
        assert ended.returncode == status, ended.stderr
        assert output.read_bytes().endswith(b"\n") == (status == 1)
    assert records(output) == undisturbed
