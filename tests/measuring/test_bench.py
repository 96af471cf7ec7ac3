"""The benchmark: the limit that it predicts, what it measures, and what it prints."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import OpenEnsemble
from gguf import GGUFReader

from me_local.cli.bench import remarks
from me_local.cli.program import main
from me_local.measuring.bench import bench, endless, limit, make_generation, work
from me_local.text.unified import END

WriteModels = Callable[..., Path]
BACKLOGS = (1, 2, 4, 8, 16)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("me_local.measuring.bench.ROUNDS", 2)
    monkeypatch.setattr("me_local.measuring.bench.STEPS", 12)


def line(a: float, b: float) -> dict[int, float]:
    return {k: a + b * k for k in BACKLOGS}


@pytest.mark.parametrize(
    ("times", "weights", "expected"),
    [
        ([line(8, 2), line(8, 2)], [0.5, 0.5], 20 / 12),  # Σ(a + b) / Σ(λa + b)
        ([line(7, 5), line(24, 3.5)], [0.7, 0.3], 39.5 / (0.7 * 7 + 5 + 0.3 * 24 + 3.5)),
        ([line(9, 0)] * 4, [0.25] * 4, 4.0),
        ([line(9, 1)], [1.0], 1.0),
        ([line(9, 1), line(5, 5)], [1.0, 0.0], 1.0),
        ([line(0, 3)] * 3, [0.2, 0.3, 0.5], 1.0),
    ],
)
def test_the_limit_of_a_linear_cost(times: list[dict[int, float]], weights: list[float], expected: float) -> None:
    assert limit(times, weights) == pytest.approx(expected, rel=1e-6)


def test_the_limit_of_a_cost_that_is_not_linear() -> None:
    """Against a simulated route of 200,000 pieces (standard error below 0.3%)."""
    times = [{1: 9.3, 2: 16.4, 4: 23.6, 8: 37.9, 16: 65.0}, {1: 13.9, 2: 16.5, 4: 20.6, 8: 29.0, 16: 41.6}]
    route = np.random.default_rng(1).random(200_000) < 0.7
    total, since = 0.0, [0, 0]
    for first in route:
        since = [count + 1 for count in since]
        member = 0 if first else 1
        k = since[member]
        total += float(np.interp(k, list(times[member]), list(times[member].values())))
        since[member] = 0
    assert limit(times, [0.7, 0.3]) == pytest.approx((9.3 + 13.9) * len(route) / total, rel=0.01)


def test_without_an_end_members_write_on(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_c", "spm")
    generation = make_generation(endless(ensemble.engine), ensemble, length=20)
    numbers = [draw.number for draw in (generation.step() for _ in range(300)) if draw]
    assert len(numbers) == 300
    assert END not in numbers


def test_a_report(open_ensemble: OpenEnsemble) -> None:
    ensemble, ticks = open_ensemble("bpe_c", "spm", weights=(0.7, 0.3)), []
    report = bench(ensemble, lambda: ticks.append(1))
    assert len(ticks) == work(ensemble)
    assert [speed.name for speed in report.speeds] == ["bpe_c", "spm", "CE", "CE in parallel", "ME"]
    assert [(call.member, call.tokens) for call in report.calls] == [(n, k) for n in ("bpe_c", "spm") for k in BACKLOGS]
    assert all(speed.pieces > 0 and speed.bytes > 0 for speed in report.speeds)
    assert all(0 < (speed.decode_share or 0.5) < 1 for speed in report.speeds)
    assert report.speed_up > 0
    assert report.limit > 0
    assert any("ME is" in sentence for sentence in remarks(report))


@pytest.mark.slow
def test_the_command(write_models: WriteModels, tmp_path: Path) -> None:
    models, picture = str(write_models("bpe_c", "spm")), tmp_path / "bench.png"
    result = CliRunner().invoke(main, ["bench", "--models", models, "--json", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["measured_over_limit"] == pytest.approx(report["speed_up"] / report["limit"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = CliRunner().invoke(main, ["bench", "--models", models, "--members", "3"])
    assert table.exit_code == 0, table.output
    assert "bpe_c-3" in table.stdout
    assert "CE in parallel" in table.stdout


@pytest.mark.slow
def test_copies_of_a_member_take_its_weights_once(write_models: WriteModels, tiny: dict[str, Path]) -> None:
    command = ["bench", "--models", str(write_models("bpe_c")), "--json", "--members"]
    one, four = (json.loads(CliRunner().invoke(main, [*command, count]).stdout)["memory_bytes"] for count in "14")
    weights = sum(int(tensor.n_bytes) for tensor in GGUFReader(tiny["bpe_c"]).tensors)
    assert four - weights == 4 * (one - weights)


@pytest.mark.slow
def test_several_replies_at_once(write_models: WriteModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("me_local.measuring.bench_batch.STEPS", 4)
    models, picture = str(write_models("bpe_c", "spm")), tmp_path / "bench.png"
    command = ["bench", "--models", models, "--batch"]
    result = CliRunner().invoke(main, [*command, "1,3", "--json", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["batches"]
    names = ["bpe_c", "spm", "CE", "ME, shared route", "ME, own routes"]
    assert [(row["batch"], row["name"]) for row in rows] == [(count, name) for count in (1, 3) for name in names]
    assert all(row["pieces"] > 0 and row["predicted"] > 0 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = CliRunner().invoke(main, [*command, "2"]).stdout
    assert "pieces/s of N at once" in table
    assert "ME, shared route" in table
    for wrong in ("0", "1,x", "300", ","):
        refused = CliRunner().invoke(main, [*command, wrong])
        assert refused.exit_code == 2
        assert "--batch: must be numbers from 1 to 256" in refused.stderr
