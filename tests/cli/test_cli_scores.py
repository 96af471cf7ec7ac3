"""`me-local score` and `me-local fit` through click's runner."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from commands import one_line

from me_local import Ensemble
from me_local.cli.program import main
from me_local.config import load_config

OpenEnsemble = Callable[..., Ensemble]
WriteModels = Callable[..., Path]
Run = Callable[..., Result]

TEXT = "the cat sat on the mat, and the dog ran to the house. " * 40
PAIRS = [{"prompt": "the cat", "continuation": f" sat on {i} mats"} for i in range(6)]


@pytest.fixture
def run(write_models: WriteModels, tmp_path: Path) -> Run:
    write_models("bpe_a", "spm", weights=(0.3, 0.7), top="# mine\n")

    def invoke(command: str, *arguments: object) -> Result:
        return CliRunner().invoke(main, [command, "--models", str(tmp_path / "models.toml"), *map(str, arguments)])

    return invoke


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def test_score_of_pairs_is_the_sum_of_their_scores(run: Run, pairs: Path, open_ensemble: OpenEnsemble) -> None:
    report = json.loads(run("score", pairs, "--raw", "--json").stdout)
    ensemble = open_ensemble("bpe_a", "spm", weights=(0.3, 0.7))
    scores = [ensemble.score(row["prompt"], row["continuation"], raw=True) for row in PAIRS]
    size = sum(len(row["continuation"]) for row in PAIRS)
    for i, name in enumerate(ensemble.names):
        expected = -sum(score.members[i] for score in scores) / math.log(2) / size
        assert report["members"][name] == pytest.approx(expected)
    assert report["ensemble"] == pytest.approx(-sum(s.log_likelihood for s in scores) / math.log(2) / size)
    assert report["bytes"] == size
    assert report["weights"] == {"bpe_a": 0.3, "spm": 0.7}
    chat = json.loads(run("score", pairs, "--json").stdout)
    assert chat["members"]["bpe_a"] != pytest.approx(report["members"]["bpe_a"], rel=1e-3)


def test_score_of_a_text(run: Run, text: Path) -> None:
    result = run("score", text)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["bits", "per", "byte", "weight"]
    assert [line[0] for line in lines[1:4]] == ["bpe_a", "spm", "ensemble"]
    assert f"{len(TEXT) - 3:,} bytes in 9 blocks" in result.stdout
    report = json.loads(run("score", text, "--json", "--weights", "1,0").stdout)
    assert report["ensemble"] == pytest.approx(report["members"]["bpe_a"])


def test_fit_finds_the_best_weights(run: Run, text: Path, tmp_path: Path) -> None:
    before = (tmp_path / "models.toml").read_text()
    report = json.loads(run("fit", "--data", text, "--json").stdout)
    assert list(report["members"]) == ["bpe_a", "spm"]
    others = [*report["members"].values(), report["equal"]]
    assert report["fitted"]["fitted_part"] <= min(rates["fitted_part"] for rates in others)
    assert set(report["fitted"]) == {"fitted_part", "held_out_part"}
    assert sum(report["weights"].values()) == pytest.approx(1)
    assert report["bytes"]["held_out_part"] == pytest.approx(sum(report["bytes"].values()) / 4, rel=0.2)
    assert (tmp_path / "models.toml").read_text() == before
    scores = [json.loads(run("score", text, "--json", "--weights", f"{w},{1 - w}").stdout) for w in (0.25, 0.5, 0.75)]
    assert len({score["units"] for score in scores}) == 1
    assert np.sign(scores[0]["ensemble"] - scores[2]["ensemble"]) == np.sign(report["weights"]["bpe_a"] - 0.5)


def test_fit_writes_what_it_shows(run: Run, pairs: Path, tmp_path: Path) -> None:
    result = run("fit", "--data", pairs, "--raw", "--write")
    assert result.exit_code == 0, result.output
    models = tmp_path / "models.toml"
    shown = result.stdout.rstrip().splitlines()[-1]
    written = {member.name: member.weight for member in load_config(models).members}
    assert shown == "fitted weights: " + ", ".join(f"{name} {weight:.4g}" for name, weight in written.items())
    assert models.read_text().startswith("# mine\n")
    assert "models.toml has these weights now" in result.stderr


@pytest.mark.parametrize(
    ("command", "content", "parts"),
    [
        ("fit", "one two", ["data.txt: too little to fit weights to: blocks: 1, at least 4 are needed"]),
        ("fit", "", ["data.txt: at least two words are wanted"]),
        ("score", "one", ["data.txt: at least two words are wanted"]),
    ],
)
def test_texts_that_are_too_short(run: Run, tmp_path: Path, command: str, content: str, parts: list[str]) -> None:
    path = tmp_path / "data.txt"
    path.write_text(content)
    one_line(run(*([command, "--data", path] if command == "fit" else [command, path])), 2, *parts)


def test_pairs_that_cannot_be_used_name_file_and_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [*PAIRS[:3], {"prompt": "the cat"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_line(run("fit", "--data", path), 2, 'pairs.jsonl, line 4: "continuation" is missing')
    rows[3] = {"prompt": "the cat " * 400, "continuation": "x"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_line(run("fit", "--data", path, "--raw"), 2, "pairs.jsonl, line 4: the prompt has")
    rows[3] = {"prompt": "th", "continuation": "e"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_line(run("score", path, "--raw"), 2, "pairs.jsonl, line 4: ", "has nothing in front of the text")


def test_fit_wants_constant_weights(run: Run, text: Path, write_models: WriteModels) -> None:
    write_models("bpe_a", "spm", top='[ensemble]\nrouter = "other"')
    one_line(run("fit", "--data", text), 2, "[ensemble].router", '"constant" alone')
