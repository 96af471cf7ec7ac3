"""`verify`: it passes on sound ensembles, and finds faults that are planted in the engine."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from me_local import Ensemble
from me_local.arrays import FloatArray, IntArray
from me_local.cli.program import main
from me_local.decoding import strategies
from me_local.decoding.engine import Course
from me_local.decoding.planning import Rows
from me_local.decoding.strategies import Sampler
from me_local.llama.batch import Part
from me_local.llama.cache import Cache
from me_local.llama.member import Member
from me_local.measuring.verify import Report, g_test, verify
from me_local.mixture.alignment import Distribution, pick
from me_local.model import Row
from me_local.text.growing import TokenizedText

OpenEnsemble = Callable[..., Ensemble]
TINY = [
    ("bpe_a",),
    ("bpe_a", "bpe_b"),
    pytest.param(("bpe_a", "bpe_c"), marks=pytest.mark.slow),
    pytest.param(("bpe_c", "spm"), marks=pytest.mark.slow),
    pytest.param(("bpe_b", "bpe_c", "spm"), marks=pytest.mark.slow),
    pytest.param(("swa", "recurrent"), marks=pytest.mark.slow),
    pytest.param(("hybrid", "spm"), marks=pytest.mark.slow),
]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Ensemble], Report]]:
    """Runs `verify` with fewer draws than a user gets."""
    monkeypatch.setattr("me_local.measuring.verify.DRAWS", 300)
    with ExitStack() as stack:

        def run(ensemble: Ensemble) -> Report:
            references = [stack.enter_context(Member(m.config, m.weights)) for m in ensemble.members]
            return verify(ensemble, references, 0, lambda: None)

        yield run


@pytest.mark.parametrize("names", TINY, ids="+".join)
def test_tiny_ensembles_pass(
    open_ensemble: OpenEnsemble, check: Callable[[Ensemble], Report], names: Sequence[str]
) -> None:
    report = check(open_ensemble(*names, top="[sampling]\ntemperature = 0.7"))
    assert report.passed, report
    # On these models only bits of the 16-bit cache are lost.
    assert max(fidelity.largest for fidelity in report.fidelity) < 1e-3
    assert sum(fidelity.compared for fidelity in report.fidelity) == 80
    assert report.equality.draws == 1500
    assert report.equality.freedom > (20 if len(names) > 1 else 10)


GUESSING = '[ensemble]\ndraft = "ngram"\n[sampling]\ntemperature = 0.7'


def test_logits_of_guesses_are_compared(
    open_ensemble: OpenEnsemble, check: Callable[[Ensemble], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of them come by guesses, and those of the place before are found out."""
    report = check(open_ensemble("bpe_c", "spm", top=GUESSING))
    assert report.passed, report
    assert sum(fidelity.guessed for fidelity in report.fidelity) > 20
    keep = Rows.keep

    def late(
        self: Rows, member: int, ids: IntArray, guess: IntArray, counts: Sequence[int], rows: Sequence[Row]
    ) -> None:
        keep(self, member, ids, guess, counts, [rows[0], *rows[:-1]])

    monkeypatch.setattr(Rows, "keep", late)
    report = check(open_ensemble("bpe_c", "spm", top=GUESSING))
    assert not all(fidelity.passed for fidelity in report.fidelity)


@pytest.fixture
def faulty(open_ensemble: OpenEnsemble) -> Ensemble:
    return open_ensemble("bpe_c", "spm", top="[sampling]\ntemperature = 0.7")


@pytest.mark.slow
def test_it_finds_a_temperature_after_mixing(
    open_ensemble: OpenEnsemble, check: Callable[[Ensemble], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = open_ensemble("bpe_c", "spm", top="[sampling]\ntemperature = 0.4")
    mixture = Sampler.mixture

    def tempered_last(self: Sampler, weights: FloatArray) -> Course[tuple[Distribution, dict[int, Distribution]]]:
        request = self._request
        self._request = replace(request, sampling=tuple(replace(s, temperature=1.0) for s in request.sampling))
        mixed, parts = yield from mixture(self, weights)
        self._request = request
        sharpened = mixed.probabilities ** (1 / request.sampling[0].temperature)
        return Distribution(mixed.numbers, sharpened / sharpened.sum()), parts

    monkeypatch.setattr(Sampler, "mixture", tempered_last)
    report = check(faulty)
    assert not report.equality.passed
    assert report.canonical.passed
    assert all(fidelity.passed for fidelity in report.fidelity)


@pytest.mark.slow
def test_it_finds_a_backlog_that_is_off_by_one(faulty: Ensemble, check: Callable[[Ensemble], Report]) -> None:
    def decode(self: Member, parts: Sequence[Part]) -> int:
        cache, ids, outputs = parts[0]
        late = cache.length > 0 and len(ids) > 1
        return Member._decode(self, [Part(cache, np.concatenate([cache.ids[-1:], ids[:-1]]) if late else ids, outputs)])

    for member in faulty.members:
        member._decode = MethodType(decode, member)  # type: ignore[method-assign]
    report = check(faulty)
    assert not all(fidelity.passed for fidelity in report.fidelity)


@pytest.mark.slow
def test_it_finds_a_stale_cell(faulty: Ensemble, check: Callable[[Ensemble], Report]) -> None:
    common = Cache.common

    def one_too_many(self: Cache, ids: IntArray, most: int) -> int:
        length = common(self, ids, most)
        return min(length + 1, most, self.length)

    for member in faulty.members:
        member.caches[0].common = MethodType(one_too_many, member.caches[0])  # type: ignore[method-assign]
    report = check(faulty)
    assert not all(fidelity.passed for fidelity in report.fidelity)


@pytest.mark.slow
def test_it_finds_one_random_number_for_route_and_piece(
    faulty: Ensemble, check: Callable[[Ensemble], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    uniform = [0.0]

    def route(self: Sampler, weights: FloatArray) -> int:
        uniform[0] = self._route_uniform()
        return pick(weights, uniform[0])

    def sample(distribution: Distribution, noise: FloatArray) -> tuple[int, float]:
        at = pick(distribution.probabilities, uniform[0])
        return int(distribution.numbers[at]), float(distribution.probabilities[at])

    monkeypatch.setattr(Sampler, "_route", route)
    monkeypatch.setattr(strategies, "sample", sample)
    report = check(faulty)
    assert not report.equality.passed
    assert report.canonical.passed


@pytest.mark.slow
def test_it_finds_pieces_that_are_tokenised_one_by_one(
    faulty: Ensemble, check: Callable[[Ensemble], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(self: TokenizedText, text: bytes) -> IntArray:
        if len(text) > self._seen:
            self._length = self._write(self._length, self._encode(text[self._seen :]))
            self._seen = len(text)
        return self._ids[: self._length]

    monkeypatch.setattr(TokenizedText, "ids", ids)
    report = check(faulty)
    assert not report.canonical.passed
    assert report.canonical.different is not None


def test_a_piece_that_ce_never_draws_is_found() -> None:
    mixture = Distribution(np.array([3, 5], dtype=np.int32), np.array([0.5, 0.5]))
    assert g_test(mixture, Counter({3: 50, 5: 49, 9: 1}))[2] == 1


def test_g_is_that_of_a_worked_example() -> None:
    """With 60, 25, 5 and 10 draws where 50, 30, 12 and 8 are expected; the last has too few to stand alone."""
    mixture = Distribution(np.array([1, 2, 3, 4], dtype=np.int32), np.array([0.5, 0.3, 0.12, 0.08]))
    g, freedom, strangers = g_test(mixture, Counter({1: 60, 2: 25, 3: 5, 4: 10}))
    expected = 2 * (60 * np.log(60 / 50) + 25 * np.log(25 / 30) + 15 * np.log(15 / 20))
    williams = 1 + ((100 / 50 + 100 / 30 + 100 / 20) - 1) / (6 * 100 * 2)
    assert g == pytest.approx(expected / williams)
    assert (freedom, strangers) == (2, 0)


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_stated() -> None:
    """Simulated runs of five prefixes: p-values below 1 in 100 appear in about 1 of 100 runs (fixed seed)."""
    random = np.random.default_rng(1)
    runs, low = 3000, 0
    for _ in range(runs):
        total, degrees = 0.0, 0
        for _ in range(5):
            probabilities = np.sort(random.dirichlet(np.full(14, 0.4)))
            mixture = Distribution(np.arange(14, dtype=np.int32), probabilities)
            counts = Counter(dict(enumerate(random.multinomial(800, probabilities).tolist())))
            g, freedom, _ = g_test(mixture, counts)
            total, degrees = total + g, degrees + freedom
        low += stats.chi2.sf(total, degrees) < 0.01
    assert 0.005 * runs < low < 0.015 * runs


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(write_models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("me_local.measuring.verify.DRAWS", 20)
    models = str(write_models("bpe_c", "spm"))
    table = CliRunner().invoke(main, ["verify", "--models", models])
    assert table.exit_code == 0, table.output
    assert table.stdout.count(" ok\n") == 4
    printed = CliRunner().invoke(main, ["verify", "--models", models, "--json"])
    report = json.loads(printed.stdout)
    assert report["passed"]
    assert [fidelity["member"] for fidelity in report["fidelity"]] == ["bpe_c", "spm"]


@pytest.mark.slow
def test_the_status_is_1_when_a_check_fails(write_models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("me_local.measuring.verify.DRAWS", 20)
    monkeypatch.setattr("me_local.measuring.verify.FALSE_ALARM", 1.1)
    result = CliRunner().invoke(main, ["verify", "--models", str(write_models("bpe_c", "spm"))])
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
