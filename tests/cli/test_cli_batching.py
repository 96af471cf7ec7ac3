"""`me-local generate` with several replies at once: what it says, and how bad input ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Run, jsonl, one_line, records

from me_local import ConfigError, LoadError, Overrides, load
from me_local.cli import options

WriteModels = Callable[..., Path]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--batch", "0"], ["--batch: must be a number from 1 to 256", '"0"']),
        (["--batch", "x"], ["--batch: must be a number from 1 to 256", '"x"']),
        (["--batch", "-1"], ["--batch: must be", '"-1"']),
        (["--batch", "1.5"], ["--batch: must be", '"1.5"']),
        (["--batch", "²"], ["--batch: must be"]),
        (["--batch", "300"], ["--batch: must be a number from 1 to 256", '"300"']),
        (["--route", "shared", "--unit", "word"], ["--route", 'unit "word" needs route "own"']),
    ],
)
def test_wrong_options_are_one_line_and_status_2(run: Run, arguments: list[str], parts: list[str]) -> None:
    one_line(run("generate", "Hello", "-n", 300, *arguments), 2, *parts)


def test_a_route_that_there_is_not(run: Run) -> None:
    result = run("generate", "Hello", "--route", "both")
    assert result.exit_code == 2
    assert "'both' is not one of 'shared', 'own'" in result.stderr


def test_more_sequences_than_fit_into_memory_are_one_line(run: Run, write_models: WriteModels) -> None:
    models = write_models("bpe_a")
    models.write_text(models.read_text().replace("n_ctx = 512", "n_ctx = 2048"))
    many = 'Error: member "bpe_a"'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("me_local.llama.context.available_memory", lambda: 10**6)
        result = run("generate", "Hello", "-n", 200, "--batch", 200, models=models)
    one_line(
        result, 2, "not enough memory: 200 contexts of 2,048 tokens", "lower n_ctx or the number of replies at once"
    )
    assert many in result.stderr


@pytest.mark.parametrize(
    "route",
    [
        "x",
        5,
        [1, 2],
        {},
        {"seed": 1, "start": 0},
        {"seed": 1, "start": 0, "end": 3},
        {"seed": 1, "start": 0, "end": 3, "batch": 0},
        {"seed": -1, "start": 0, "end": 3, "batch": 2},
        {"seed": 1, "start": 0, "end": "x", "batch": 2},
        {"seed": 1, "start": -5, "end": 3, "batch": 2},
        {"seed": 1.5, "start": 0, "end": 3, "batch": 2},
    ],
)
def test_a_record_with_a_bad_route_is_one_line(run: Run, tmp_path: Path, route: Any) -> None:
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "Hello"}, {"prompt": "Hi"})
    output = jsonl(tmp_path / "out.jsonl", {"id": 1, "text": "x", "route": route})
    before = output.read_bytes()
    result = run("generate", "--input", source, "--output", output, "--resume", "--batch", 2)
    one_line(result, 2, "out.jsonl, line 1: not a record of an earlier run; give another --output")
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "3 replies at once, all by the same route"),
        (["--route", "own"], "3 replies at once, each by a route of its own"),
        (["--unit", "word"], "3 replies at once, each by a route of its own"),
        (["--strategy", "ce"], "3 replies at once\n"),
    ],
)
def test_it_says_how_replies_are_made(run: Run, arguments: list[str], said: str) -> None:
    result = run("generate", "Hello", "-n", 3, "--batch", 8, "--max-tokens", 3, "--seed", 1, *arguments)
    assert result.exit_code == 0
    assert said in result.stderr


def test_several_replies_come_in_their_order(run: Run) -> None:
    result = run("generate", "Hello", "-n", 6, "--batch", 3, "--max-tokens", 12, "--seed", 4, "--json")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["seed"] for record in found] == list(range(4, 10))
    again = run("generate", "Hello", "-n", 6, "--batch", 3, "--max-tokens", 12, "--seed", 4, "--json")
    assert [json.loads(line)["text"] for line in again.stdout.splitlines()] == [record["text"] for record in found]


def test_the_number_that_was_found_best(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(members: Any, weights: list[float], way: str, most: int) -> int:
        asked.append((len(members), weights, way, most))
        return 2

    monkeypatch.setattr(options, "choose_batch", choose)
    source = jsonl(tmp_path / "in.jsonl", *({"prompt": f"Hello {i}"} for i in range(5)))
    for number, arguments in enumerate(([], ["--route", "own"], ["--strategy", "ce"])):
        output = tmp_path / f"{number}.jsonl"
        result = run(
            "generate", "--input", source, "--output", output, "--batch", "auto", "--max-tokens", 2, *arguments
        )
        assert result.exit_code == 0
        assert "2 replies at once" in result.stderr
        assert sorted(record["id"] for record in records(output)) == [1, 2, 3, 4, 5]
    assert asked == [(2, [0.5, 0.5], way, 5) for way in ("me shared", "me own", "ce")]


def test_no_reply_wants_no_pieces_forever(run: Run, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", *({"prompt": "Hello", "max_tokens": i % 2} for i in range(5)))
    output = tmp_path / "out.jsonl"
    assert run("generate", "--input", source, "--output", output, "--batch", 2).exit_code == 0
    assert [len(record["pieces"]) <= 1 for record in records(output)] == [True] * 5


@pytest.mark.parametrize("name", ["bpe_a", "swa"])
def test_more_replies_than_llama_cpp_has_room_for(write_models: WriteModels, name: str) -> None:
    path = write_models(name)
    with load(path, batch=256) as ensemble:
        assert {f.index for f in ensemble.generate_many(["a"] * 3, Overrides(max_tokens=2))} == {0, 1, 2}
    with pytest.raises(LoadError, match="room for 256 replies at once, and 257 are wanted"):
        load(path, batch=257)


@pytest.mark.parametrize("batch", [0, -1])
def test_less_than_one_reply(write_models: WriteModels, batch: int) -> None:
    with pytest.raises(ConfigError, match=f"at least one reply at once, got {batch}"):
        load(write_models("bpe_a"), batch=batch)
