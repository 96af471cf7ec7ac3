"""Output files of long runs: what is taken for a record, where a file was cut off, and one run at a time."""

import errno
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from commands import Run, jsonl, one_line

from me_local import InputError, records
from me_local.batch import RECORDS
from me_local.cli.program import main
from me_local.records import open_records, write_record

WriteModels = Callable[..., Path]

MADE = [
    {"id": 12, "text": 'a "b"', "finish_reason": "stop"},
    {"id": 'p"1\\', "error": "none"},
    {"id": -3, "text": "", "finish_reason": "length", "route": None},
]


def earlier(path: Path) -> list[dict[str, Any]]:
    with open_records(path, RECORDS, resume=True) as (_, found):
        return list(found)


def test_wherever_a_file_was_cut_off_the_whole_records_stay(tmp_path: Path) -> None:
    """All lengths of a file of three records: a record counts once its last brace is there."""
    path = tmp_path / "out.jsonl"
    lines = [json.dumps(record).encode() for record in MADE]
    ends = [sum(len(line) + 1 for line in lines[: i + 1]) - 1 for i in range(3)]
    whole = b"\n".join(lines) + b"\n"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        count = sum(end <= size for end in ends)
        assert earlier(path) == MADE[:count], size
        assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:count])


@pytest.mark.parametrize(
    "content",
    [
        b'{"id": 1, "prompt": "a"}\n{"id": 2, "prompt": "b"}',
        b'{"id": 1, "prompt": "a"}',
        b'{"id": 1, "prompt": "a',
        b'{"id": "x", "messages": [{"role"',
        b'{"id": 1, "text": "a"}\n',
        b'{"id": 1, "text": "a"}',
        b'{"id": [1], "text": "a", "finish_reason": "stop"}',
        b'{"id": true, "text": "a", "finish_reason": "stop"}',
        b'{"id": 1, "text": "a", "finish_reason": "stop"}\n{"id": 2, "prompt": "b"}',
        b'{"id": 1, "text": "a", "finish_reason": "stop"}\n{"id": {"a',
        b'{"id": "t/1", "task": "t", "question": "1", "settings": {}, "correct": {}}\n',
        b"[1, 2]",
        b"12",
        b"\n",
    ],
)
def test_a_file_that_is_not_ours_stays_as_it_is(run: Run, tmp_path: Path, content: bytes) -> None:
    source, output = jsonl(tmp_path / "in.jsonl", {"prompt": "x"}), tmp_path / "o.jsonl"
    output.write_bytes(content)
    result = run("generate", "--input", source, "--output", output, "--resume")
    one_line(result, 2, "o.jsonl, line", "not a record of an earlier run; give another --output")
    assert output.read_bytes() == content


def test_records_of_replies_are_none_of_an_evaluation(write_models: WriteModels, tmp_path: Path) -> None:
    (tmp_path / "gsm8k_test.jsonl").write_text('{"id": "1", "question": "1 + 1?", "answer": "#### 2"}\n')
    output = jsonl(tmp_path / "o.jsonl", *MADE)
    before = output.read_bytes()
    command = ["eval", "--models", str(write_models("bpe_a")), "--task", "gsm8k", "--data", str(tmp_path)]
    result = CliRunner().invoke(main, [*command, "--output", str(output), "--resume"])
    one_line(result, 2, "o.jsonl, line 1: not a record of an earlier run")
    assert output.read_bytes() == before


def test_a_last_record_without_the_end_of_its_line_is_not_made_again(run: Run, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", *({"id": i, "prompt": "Hello", "seed": i} for i in range(2)))
    output = tmp_path / "o.jsonl"
    first = '{"id": 0, "text": "kept", "finish_reason": "stop"}'
    output.write_text(first)
    result = run("generate", "--input", source, "--output", output, "--resume", "--max-tokens", 2)
    assert result.exit_code == 0, result.stderr
    kept, made, end = output.read_text().split("\n")
    assert (kept, json.loads(made)["id"], end) == (first, 1, "")


@pytest.mark.parametrize("content", [b"", b'{"id": 1, "text": "a", "finish_reason": "stop"}\n{"id": 2, "te'])
def test_one_run_at_a_time(run: Run, tmp_path: Path, content: bytes) -> None:
    source, output = jsonl(tmp_path / "in.jsonl", {"prompt": "x"}), tmp_path / "o.jsonl"
    output.write_bytes(content)
    with output.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        one_line(
            run("generate", "--input", source, "--output", output, "--resume"), 2, "o.jsonl: another run is writing"
        )
        assert output.read_bytes() == content
    with open_records(output, RECORDS, resume=True) as (file, _):
        with (
            pytest.raises(InputError, match="another run is writing to it"),
            open_records(output, RECORDS, resume=True),
        ):
            pass
        write_record(file, MADE[0])
    assert earlier(output)[-1] == MADE[0]


def test_where_there_are_no_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = jsonl(tmp_path / "o.jsonl", MADE[0])
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", none)
        assert earlier(path) == MADE[:1]
    monkeypatch.setattr(records, "fcntl", None)
    assert earlier(path) == MADE[:1]
