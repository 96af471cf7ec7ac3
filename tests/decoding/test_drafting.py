"""A member that writes ahead has no effect on replies either, and its guesses hold as often as they should.

Members compute in full precision, as in test_guessing.py.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import OpenEnsemble
from selection import slow_but
from test_exact_replies import case
from test_guessing import ASKED, Asked, OpenAll, begin, guessed, open_all, rest
from test_planning import BRANCHING, Rambling, limit_states, use_up

from me_local.asking import Tokens
from me_local.config import Constraint, Overrides
from me_local.decoding import drafting, generation
from me_local.decoding.drafting import price
from me_local.decoding.engine import Engine
from me_local.decoding.generation import Generation
from me_local.errors import RunError
from me_local.mixture.alignment import top_k
from me_local.sampling import Sampling
from me_local.text import constraints
from me_local.text.growing import Text

__all__ = ["open_all"]

CHEAP = 0.02
FULL = 'type_k = "f32"\ntype_v = "f32"'
FORCING = Constraint("regex", "([a-z]{1,3} 123, ){12}")
SELDOM = ("temperature 0", "each its own", "words")  # tiny models hardly ever agree there
TWINS = {  # the last, which writes ahead, is one of the others once more
    "of one with a weight": Asked(case("bpe_c", "spm", "spm", weights=(0.5, 0.25, 0.25), temperature=1.2)),
    "without a weight": Asked(case("bpe_c", "spm", "spm", weights=(0.5, 0.5, 0.0))),
    "temperature 0": Asked(case("bpe_c", "spm", "spm", weights=(0.1, 0.9, 0.0), temperature=0.0)),
    "CE": Asked(case("bpe_c", "spm", "spm", weights=(0.1, 0.9, 0.0), temperature=0.3), "ce"),
    "words": Asked(case("bpe_c", "spm", "spm", weights=(0.3, 0.7, 0.0)), unit="word"),
    "one vocabulary": Asked(case("bpe_a", "bpe_b", "bpe_b", weights=(0.3, 0.7, 0.0))),
    "constraint": Asked(case("bpe_c", "spm", "spm", weights=(0.3, 0.7, 0.0)), constraint=FORCING),
    "constraint, one vocabulary": Asked(case("bpe_a", "bpe_b", "bpe_b", weights=(0.3, 0.7, 0.0)), constraint=FORCING),
}


def set_price(monkeypatch: pytest.MonkeyPatch, price: float) -> None:
    """What a piece that is written ahead costs, whatever the sizes."""
    for module in (drafting, generation):
        monkeypatch.setattr(module, "price", lambda engine, request, member: price)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have about the same size, by which guesses would seldom pay."""
    set_price(monkeypatch, CHEAP)


def compare(open_all: OpenAll, asked: Asked, drafter: int, seeds: int) -> list[Generation]:
    """Write replies with a member that writes ahead and without, which have to be the same; those with it."""
    plain, drafting = (Engine(open_all(asked.case), asked.case.router, top_k) for _ in range(2))
    written = []
    for seed in range(seeds):
        expected = rest(begin(plain, asked, seed))
        found = begin(drafting, asked, seed, source=drafter)
        assert rest(found) == expected
        written.append(found)
    return written


@pytest.mark.parametrize("drafter", [0, -1])
@pytest.mark.parametrize("name", slow_but([n for n in ASKED if n != "other memories"], "one vocabulary", "words", "CE"))
def test_a_reply_does_not_depend_on_who_writes_ahead(open_all: OpenAll, name: str, drafter: int) -> None:
    asked = ASKED[name]
    written = compare(open_all, asked, drafter % len(asked.case.names), 30)
    assert guessed(written) > 0 or name in SELDOM


@pytest.mark.parametrize("name", slow_but(TWINS, "without a weight"))
def test_nor_on_a_twin_that_writes_ahead(open_all: OpenAll, name: str) -> None:
    written = compare(open_all, TWINS[name], 2, 30)
    assert guessed(written) > 30
    assert all(running.work[2].calls > 0 for running in written)


def test_beside_memories_that_cannot_be_cut(open_all: OpenAll) -> None:
    for running in compare(open_all, ASKED["other memories"], 3, 10):
        assert [work.guessed for work in running.work[:2]] == [0, 0]


def test_a_twin_is_always_right(open_all: OpenAll) -> None:
    """A member with the same file and settings draws the same pieces: all of its guesses hold, up to the last."""
    asked = Asked(case("spm", "spm", weights=(1.0, 0.0)))
    works = [running.work[0] for running in compare(open_all, asked, 1, 20)]
    calls, guessed = (sum(counts) for counts in zip(*((work.calls, work.guessed) for work in works), strict=True))
    assert calls < (calls + guessed) / 4  # one in 17, but where a guess ends inside a character, and at the end


def test_one_that_draws_otherwise_is_asked_less_and_less(open_all: OpenAll, monkeypatch: pytest.MonkeyPatch) -> None:
    set_price(monkeypatch, 0.9)
    sampling = (Sampling(0.2), Sampling(5.0, top_k=0))
    asked = Asked(case("spm", "bpe_a", weights=(1.0, 0.0), sampling=sampling))
    calls, pieces = 0, 0
    for running in compare(open_all, asked, 1, 10):
        calls += running.work[1].calls
        pieces += sum(work.calls + work.guessed for work in running.work[:1])
    assert calls < pieces / 5


def test_it_stops_where_its_context_does(open_all: OpenAll) -> None:
    asked = Asked(case("bpe_a", "bpe_b", "bpe_c", weights=(0.5, 0.5, 0.0), head=b"the cat " * 30))
    plain, ahead = (Engine(open_all(asked.case), asked.case.router, top_k) for _ in range(2))
    for seed in range(3):
        found = begin(ahead, asked, seed, source=2)
        ahead.models[2].n_ctx = len(found.ids(2)) + 10
        assert rest(found) == rest(begin(plain, asked, seed))
        assert found.work[2].calls > 0
        assert ahead.models[2].caches[0].length <= ahead.models[2].n_ctx


def test_it_waits_until_there_is_something_to_go_on_with(open_ensemble: OpenEnsemble) -> None:
    """A prompt of ids is that of those who write: where it has no token to begin with, another member has nothing."""
    ensemble = open_ensemble("bpe_c", "bpe_a", weights=(1.0, 0.0), member=FULL)
    prompt, length = Tokens((3, 4, 5)), 20
    plain, ahead = (
        ensemble.generate(prompt, Overrides(seed=1, max_tokens=length, draft=draft, ignore_eos=True), raw=True)
        for draft in ("none", "bpe_a")
    )
    assert ahead.text == plain.text
    assert ahead.usage[1].prompt_length == 0
    assert ahead.usage[1].calls > 0


class Sized:
    """A model of a size."""

    def __init__(self, size: int, *, picks: bool) -> None:
        self.foreseeing = SimpleNamespace(size=size, picks=picks) if size else None


@pytest.mark.parametrize(
    ("sizes", "weights", "strategy", "member", "expected"),
    [
        ((1, 8, 4), (0.0, 0.75, 0.25), "me", 0, 1 / 7),  # the others' mean is 7
        ((1, 8, 4), (0.0, 0.75, 0.25), "ce", 0, 1 / 12),
        ((2, 8, 4), (0.5, 0.5, 0.0), "me", 0, 1 / 4),
        ((8, 8), (0.5, 0.5), "me", 1, 1.0),
        ((4, 0, 8), (0.2, 0.4, 0.4), "me", 0, 1 / 2),  # one runs elsewhere
        ((4, 0), (0.5, 0.5), "me", 0, np.inf),
        ((4,), (1.0,), "ce", 0, np.inf),
    ],
)
def test_what_a_guess_costs(
    sizes: tuple[int, ...], weights: tuple[float, ...], strategy: Any, member: int, expected: float
) -> None:
    """On a processor, 0.6 of an evaluation is saved."""
    request: Any = SimpleNamespace(strategy=strategy, weights=np.array(weights))
    for picks, saved in ((True, 1.0), (False, 0.6)):
        engine: Any = SimpleNamespace(models=tuple(Sized(size, picks=picks) for size in sizes))
        assert price(engine, request, member) == pytest.approx(expected / saved)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_it_does_not_write_what_nobody_reads(open_all: OpenAll, most: int) -> None:
    asked = Asked(case("spm", "spm", weights=(1.0, 0.0)))  # always right
    engine = Engine(open_all(asked.case), asked.case.router, top_k)
    for seed in range(10):
        running = begin(engine, asked, seed, source=1, most=most)
        pieces = rest(running, most)
        assert running.work[1].calls < most
        assert pieces == rest(begin(engine, asked, seed), most)


def test_at_the_limit_of_a_constraint_it_writes_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies come there before the reply's own matcher, which must go on."""
    limit_states(monkeypatch)
    for _ in range(2):
        matcher = constraints.start(BRANCHING)
        ahead = drafting._Ahead(Text(), matcher)
        assert (ahead.forced(), ahead.is_over()) == (b"", False)
        with pytest.raises(RunError, match="states"):
            use_up(matcher, Rambling())
        ahead.append(b"a", [1])
        assert (ahead.forced(), ahead.is_over()) == (b"", True)
