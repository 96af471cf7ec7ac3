"""Each reply of several at once has exactly the ensemble's distribution, and they depend on the route alone.

As in test_exact_replies.py: the tree of all replies is worked out from the definition, thousands of replies are made by
`Batching`, and a G-test compares the counts; `Remembered` sequences evaluate each context once. Odds of a false alarm
are at most 1e-6 for each test over the choice of seeds, which are fixed.

Replies that run at the same time depend on each other, so counts of all of them would not follow the multinomial
distribution. Replies in one place do: they come one after the other, on parts of the route that do not overlap, and
which place a reply gets is known before it begins.

Pairs begin at the same step. Given the members that the route draws, both are independent: each has the product of
what these members give it, which the tree of one route says. The G-statistics of the routes add up, as do their degrees
of freedom.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
from scipy import stats
from test_exact_replies import (
    CASES,
    COUNT,
    EXACT,
    LEAST,
    SETTINGS,
    Case,
    OpenAll,
    Remembered,
    Reply,
    Tree,
    case,
    g_test,
    remembering,
    request,
    tiny,
)
from test_exact_words import WordTree
from test_exact_words import remembering as remembering_words

from me_local import Ensemble, Overrides, load
from me_local.arrays import IntArray, LogitArray
from me_local.decoding.batching import Batching, Running
from me_local.decoding.engine import Engine, Request
from me_local.decoding.generation import Generation
from me_local.decoding.reply import Draft
from me_local.llama.member import Member
from me_local.mixture.alignment import pick
from me_local.mixture.routing import SharedRoute
from me_local.model import Outcome, Target
from me_local.text.unified import END

__all__ = ["tiny"]

PLACES = 3
EACH = 4000  # replies of a place
NAMES = ["one vocabulary", "BPE and SPM, temperature 1.3", "three members", "router", "lacking bytes"]
PAIR = case("bpe_c", "spm", temperature=0.8, top_k=3, length=2)
PAIRS = 8_000
ROUTE_SEED = 20261124


class RememberedSequences:
    """Sequences of a `Remembered` member, which need no bringing up to date."""

    def __init__(self, member: Remembered) -> None:
        self._member = member

    def holds(self, sequence: int, ids: IntArray) -> bool:
        return True

    def prefill(self, prompts: Mapping[int, Target], most: int) -> dict[int, Outcome]:
        return {}

    def sync(self, wanted: Mapping[int, Target], others: Mapping[int, Target]) -> dict[int, Outcome]:
        return {sequence: Outcome(0, 0.0, self._logits(target.ids)) for sequence, target in wanted.items()}

    def _logits(self, ids: IntArray) -> LogitArray:
        self._member.sync(ids, lambda: False, final=0)
        return self._member.logits()


@pytest.fixture
def open_all(open_member: Callable[..., Member]) -> OpenAll:
    """The members of a case."""
    return lambda this: [open_member(name, **SETTINGS) for name in this.names]


class Made(Draft):
    """A draft that remembers its draws."""

    def __init__(
        self, generation: Generation, request: Request, names: tuple[str, ...], length: int, same: bool
    ) -> None:
        super().__init__(generation, request, names=names, max_tokens=length, stop=())
        self.made: Reply = ()
        self._same = same

    def take(self, draw: object) -> object:  # type: ignore[override]
        assert draw is not None
        self.made += (None if draw.number == END else draw.number - 1 if self._same else draw.piece,)  # type: ignore[attr-defined]
        return super().take(draw)  # type: ignore[arg-type]


def places_of(engine: Engine, count: int, route: SharedRoute | None) -> Batching:
    for model in engine.models:
        model.places = count  # type: ignore[attr-defined]
        model.several = partial(RememberedSequences, model)  # type: ignore[attr-defined]
    return Batching(engine, engine.models, route)  # type: ignore[arg-type]


def begin(made: Batching, engine: Engine, this: Case, seed: int, unit: str = "token") -> Running:
    asked = replace(request(engine.models, this, "me", seed), unit=unit)  # type: ignore[arg-type]
    names = tuple(model.name for model in engine.models)
    return made.begin(asked, lambda generation: Made(generation, asked, names, this.length, engine.unified.same))


def by_place(made: Batching, engine: Engine, this: Case, unit: str = "token") -> list[Counter[Reply]]:
    """The first replies of each place; a place is taken again as soon as it is free."""
    drawn: list[list[Reply]] = [[] for _ in range(PLACES)]
    seed = 0
    while min(map(len, drawn)) < EACH:
        while made.free:
            begin(made, engine, this, seed, unit)
            seed += 1
        for running, _ in made.step():
            if running.draft.finish_reason:
                assert isinstance(running.draft, Made)
                drawn[running.place].append(running.draft.made)
    return [Counter(replies[:EACH]) for replies in drawn]


def check_places(drawn: Sequence[Counter[Reply]], tree: Tree) -> None:
    cells = tree.cells(EACH)
    assert len(cells) > 10
    assert sum(cells.values()) == pytest.approx(1, abs=1e-9)
    for counts in drawn:
        assert [reply for reply in counts if not tree.possible(reply)] == []
        assert g_test(counts, cells) > EXACT / PLACES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_replies_of_each_place_by_a_shared_route(open_all: OpenAll, name: str) -> None:
    """Also where the weights depend on the text, so that one number draws other members for each."""
    this = CASES[name]
    engine = remembering(open_all(this), this)
    made = places_of(engine, PLACES, SharedRoute(ROUTE_SEED))
    check_places(by_place(made, engine, this), Tree(open_all(this), this))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three members", "router"])
def test_the_replies_of_each_place_by_own_routes(open_all: OpenAll, name: str) -> None:
    this = CASES[name]
    engine = remembering(open_all(this), this)
    drawn = by_place(places_of(engine, PLACES, None), engine, this)
    check_places(drawn, Tree(open_all(this), this))


@pytest.mark.slow
def test_the_replies_of_each_place_by_words(open_all: OpenAll) -> None:
    this = case("bpe_b", "spm", temperature=0.7, top_k=5, head=b"x")
    engine = remembering_words(open_all(this), this)
    drawn = by_place(places_of(engine, PLACES, None), engine, this, "word")
    check_places(drawn, WordTree(open_all(this), this))


def pairs(
    made: Batching, engine: Engine, this: Case, seeds: Callable[[int], tuple[int, int]]
) -> list[tuple[int, Reply, Reply]]:
    """Pairs of replies that begin at the same step, with that step."""
    found: list[tuple[int, Reply, Reply]] = []
    for number in range(PAIRS):
        step = made.clock
        both = [begin(made, engine, this, seed) for seed in seeds(number)]
        while any(running.draft.finish_reason is None for running in both):
            made.step()
        first, second = (running.draft.made for running in both)  # type: ignore[attr-defined]
        found.append((step, first, second))
    return found


def different(number: int) -> tuple[int, int]:
    return 2 * number, 2 * number + 1


def the_same(number: int) -> tuple[int, int]:
    return number, number


def replies_of(tree: Tree, length: int, reply: Reply = (), probability: float = 1.0) -> dict[Reply, float]:
    """All replies that begin so, with their probabilities."""
    if len(reply) == length or reply[-1:] == (None,):
        return {reply: probability}
    found: dict[Reply, float] = {}
    for piece, p in tree.following(reply).items():
        found |= replies_of(tree, length, (*reply, piece), probability * p)
    return found


class RouteTree(Tree):
    """The probabilities of replies, given the members that write their pieces."""

    def __init__(self, members: Sequence[Member], this: Case, route: Sequence[int]) -> None:
        super().__init__(members, this)
        self._route = route

    def following(self, reply: Reply) -> dict[bytes | int | None, float]:
        member = self._route[len(reply)]
        return self._aligned(self._members[member], reply, self._case.sampling[member])


def g_of_pairs(counts: Counter[tuple[Reply, Reply]], alone: Mapping[Reply, float]) -> tuple[float, int]:
    """The G-statistic of pairs under independence, each with these probabilities, and its degrees of freedom.

    Pairs that are expected less than `LEAST` times are one cell.
    """
    expected = {(a, b): alone[a] * alone[b] * counts.total() for a, b in product(alone, repeat=2)}
    kept = {pair: number for pair, number in expected.items() if number >= LEAST}
    observed = [counts[pair] for pair in kept] + [sum(n for pair, n in counts.items() if pair not in kept)]
    numbers = [*kept.values(), counts.total() - sum(kept.values())]
    if numbers[-1] < LEAST:
        observed[-2:], numbers[-2:] = [sum(observed[-2:])], [sum(numbers[-2:])]
    free = len(numbers) - 1
    g = 2 * sum(o * math.log(o / e) for o, e in zip(observed, numbers, strict=True) if o)
    return g / (1 + (sum(counts.total() / e for e in numbers) - 1) / (6 * counts.total() * free)), free


def p_given_routes(found: Sequence[tuple[int, Reply, Reply]], route: SharedRoute, open_all: OpenAll) -> float:
    """The p-value of independence, given the route."""
    strata: defaultdict[tuple[int, ...], Counter[tuple[Reply, Reply]]] = defaultdict(Counter)
    for step, first, second in found:
        members = tuple(pick(np.array(PAIR.weights), route.at(step + i)) for i in range(PAIR.length))
        strata[members][first, second] += 1
    assert len(strata) == 2**PAIR.length
    parts = [
        g_of_pairs(counts, replies_of(RouteTree(open_all(PAIR), PAIR, members), PAIR.length))
        for members, counts in strata.items()
    ]
    assert min(free for _, free in parts) > 5
    return float(stats.chi2.sf(sum(g for g, _ in parts), sum(free for _, free in parts)))


def p_of_independence(found: Sequence[tuple[int, Reply, Reply]], open_all: OpenAll) -> float:
    """The p-value of independence, whatever the route."""
    counts = Counter((first, second) for _, first, second in found)
    g, free = g_of_pairs(counts, replies_of(Tree(open_all(PAIR), PAIR), PAIR.length))
    return float(stats.chi2.sf(g, free))


@pytest.mark.slow
def test_pairs_by_a_shared_route(open_all: OpenAll) -> None:
    """They are independent given the route, and are not without it.

    The covariance of a quantity of both is the variance of its mean given the route. Here the quantity is 1 where a
    reply begins with the first member's likeliest piece, so that this is known. What is measured lies within 6 standard
    errors of it: odds of 2e-9.
    """
    members = open_all(PAIR)
    engine, route = remembering(members, PAIR), SharedRoute(ROUTE_SEED)
    found = pairs(places_of(engine, 2, route), engine, PAIR, different)
    assert p_given_routes(found, route, open_all) > EXACT
    assert p_of_independence(found, open_all) < 1e-12
    given = [RouteTree(members, PAIR, (member,)).following(()) for member in range(2)]
    piece = max(given[0], key=lambda p: given[0][p])
    expected = float(np.var([distribution.get(piece, 0.0) for distribution in given]))  # both are as likely
    first, second = (np.array([float(pair[i][0] == piece) for pair in found]) for i in (1, 2))
    products = (first - first.mean()) * (second - second.mean())
    assert expected > 0.01
    assert abs(products.mean() - expected) < 6 * products.std() / math.sqrt(PAIRS)


@pytest.mark.slow
def test_replies_that_share_the_numbers_of_their_pieces_are_found_out(open_all: OpenAll) -> None:
    engine, route = remembering(open_all(PAIR), PAIR), SharedRoute(ROUTE_SEED)
    found = pairs(places_of(engine, 2, route), engine, PAIR, the_same)
    assert p_given_routes(found, route, open_all) < EXACT


@pytest.mark.slow
def test_pairs_by_own_routes(open_all: OpenAll) -> None:
    engine = remembering(open_all(PAIR), PAIR)
    found = pairs(places_of(engine, 2, None), engine, PAIR, different)
    assert p_of_independence(found, open_all) > EXACT


@pytest.mark.slow
def test_an_ensemble_as_users_run_it(write_models: Callable[..., object], open_all: OpenAll) -> None:
    """The same without `Remembered`: real caches of two sequences, and the way from the file to the reply.

    While a reply of two pieces runs, at most two others begin in the other place, so that of every three one reply and
    the next do not overlap.
    """
    this = case("bpe_c", "spm", weights=(0.6, 0.4), length=2)
    path = write_models(*this.names, weights=this.weights, member='type_k = "f32"\ntype_v = "f32"')
    drawn: Counter[Reply] = Counter()
    with load(path, batch=2) as ensemble:  # type: ignore[arg-type]
        assert isinstance(ensemble, Ensemble)
        overrides = Overrides(seed=0, max_tokens=this.length)
        for finished in ensemble.generate_many([this.head.decode()] * (COUNT // 2), overrides, raw=True):
            assert finished.reply is not None
            if finished.index % 3 == 0:
                end = (None,) if finished.reply.finish_reason == "stop" else ()
                drawn[tuple(step.piece for step in finished.reply.steps) + end] += 1
    assert g_test(drawn, Tree(open_all(this), this).cells(drawn.total())) > EXACT


@pytest.mark.slow
def test_an_ensemble_that_is_off_by_a_twentieth_is_found_out(open_all: OpenAll) -> None:
    this = case("bpe_c", "spm", temperature=0.5, weights=(0.9, 0.1))
    engine = remembering(open_all(this), this)
    made = places_of(engine, PLACES, SharedRoute(ROUTE_SEED))
    drawn = by_place(made, engine, replace(this, weights=(0.85, 0.15)))
    cells = Tree(open_all(this), this).cells(EACH)
    assert max(g_test(counts, cells) for counts in drawn) < EXACT
