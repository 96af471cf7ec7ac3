"""Whole replies with penalties, DRY, biases and further truncations have exactly the probabilities of the definition.

As in test_exact_replies.py: the tree of all replies is worked out from the definition, here in plain Python, and a
G-test compares replies of the product with it, with odds of a false alarm of at most 1e-6 each. In A_i, in this order:

- penalties on the tokens of the member's own context that do not end a generation, DRY, biases; no END before
  `min_tokens` pieces;
- top-n-sigma, temperature, top-k, typical-p, top-p, min-p, and XTC at a coin that all members see;
- equal pieces add up.

Where a member hands over its largest logits alone, replies are the same, seed by seed. That the tests can fail is
tested too.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from selection import slow_but
from test_exact_replies import EXACT, SETTINGS, Case, OpenAll, Remembered, Reply, Tree, case, g_test, request

from me_local.arrays import IntArray
from me_local.decoding import shaping
from me_local.decoding.engine import Engine, Request
from me_local.decoding.generation import Generation
from me_local.decoding.shaping import Shaper
from me_local.decoding.strategies import Sampler
from me_local.llama.member import Member
from me_local.mixture.alignment import Distribution, top_k
from me_local.model import Shortlist
from me_local.sampling import Bias, Sampling

COUNT = 800  # replies of a case
BROKEN_COUNT = 1_200
SEEDS = 25  # whose replies are the same by a shortlist
HEAD = b"the catckWCckckckck"
"""The models would go on with what stands in it already, and so behind the next."""
HEAD_OF_ONE_VOCABULARY = b"the cathatfPallzltDf?f sebf"

Piece = bytes | int | None


ENDS = (Bias(1, 5.0, "bpe_c"), Bias(2, 5.0, "spm"))
"""The members would end soon."""


@dataclass(frozen=True)
class Shaped:
    """A case, and before how many pieces END does not come."""

    case: Case
    min_tokens: int = 0


def shaped(*names: str, min_tokens: int = 0, length: int = 2, **sampling: Any) -> Shaped:
    weights = (0.6, 0.3, 0.1) if len(names) == 3 else (0.6, 0.4)
    head = HEAD_OF_ONE_VOCABULARY if "bpe_b" in names else HEAD
    each = (Sampling(**({"top_k": 6} | sampling)),) * len(names)
    return Shaped(case(*names, weights=weights, head=head, length=length, sampling=each), min_tokens)


def banned(*texts: str) -> tuple[Bias, ...]:
    return tuple(Bias(text, -math.inf) for text in texts)


CASES = {
    "penalties": shaped("bpe_c", "spm", repeat_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2),
    "penalties, one vocabulary": shaped("bpe_a", "bpe_b", repeat_penalty=1.4, presence_penalty=-0.5, repeat_last_n=6),
    "DRY": shaped("bpe_c", "spm", dry_multiplier=1.0, dry_allowed_length=1, dry_sequence_breakers=("W", "e")),
    "DRY, one vocabulary": shaped(
        "bpe_a", "bpe_b", dry_multiplier=2.0, dry_allowed_length=1, dry_penalty_last_n=20, dry_base=2.5
    ),
    "biases": shaped("bpe_c", "spm", logit_bias=(Bias("i", 1.5), Bias("in", -1.0), *banned("ck", "B"))),
    "a bias by an id": shaped("bpe_c", "spm", logit_bias=(Bias(300, 5.0, "spm"), Bias(301, 5.0, "bpe_c"))),
    "min_tokens": shaped("bpe_c", "spm", min_tokens=1, logit_bias=ENDS),
    "ignore_eos": shaped("bpe_c", "spm", min_tokens=99, logit_bias=ENDS),
    "typical-p": shaped("bpe_c", "spm", typical_p=0.6, top_k=12, top_p=0.9, min_p=0.05),
    "top-n-sigma": shaped("bpe_c", "spm", top_n_sigma=2.0, top_k=0, temperature=1.5),
    "XTC": shaped("bpe_c", "spm", xtc_probability=0.5, xtc_threshold=0.15),
    "all, three members": shaped(
        *("swa", "bpe_c", "spm"),
        **{"repeat_penalty": 1.2, "presence_penalty": 0.2, "dry_multiplier": 0.5, "typical_p": 0.9, "top_p": 0.95},
        **{"xtc_probability": 0.4, "xtc_threshold": 0.2, "logit_bias": (Bias("i", -0.5),), "temperature": 0.8},
        min_tokens=1,
        top_k=4,
    ),
}
QUICK = ("penalties", "DRY")
BROKEN = shaped(
    *("bpe_c", "spm"),
    **{"repeat_penalty": 1.8, "presence_penalty": 0.5, "dry_multiplier": 2.0, "dry_allowed_length": 1},
    **{"xtc_probability": 0.5},
)


class Short(Remembered):
    """A member that hands over no more than the logits that are said to be enough."""

    def shorten(self, count: int, numbers: IntArray) -> None:
        self._count, self._numbers = count, numbers

    def logits(self) -> Any:
        row = super().logits()
        if not self._count:
            return row
        usable = np.flatnonzero(self._numbers >= 0)
        ids = np.sort(usable[np.argsort(-row[usable], kind="stable")[: self._count]]).astype(np.int32)
        return Shortlist(ids, row[ids])


def engine_of(members: Sequence[Member], this: Shaped, kind: type[Remembered] = Remembered) -> Engine:
    return Engine([kind(member) for member in members], this.case.router, top_k)


def asked(engine: Engine, this: Shaped, strategy: str, seed: int) -> Request:
    return replace(request(engine.models, this.case, strategy, seed), min_tokens=this.min_tokens)


def written(engine: Engine, this: Shaped, strategy: str, seed: int) -> Reply:
    running = Generation(engine, asked(engine, this, strategy, seed), lambda: False)
    reply: Reply = ()
    while len(reply) < this.case.length and reply[-1:] != (None,):
        step = running.step()
        assert step is not None
        reply += (None if step.number == 0 else step.number - 1 if engine.unified.same else step.piece,)
    return reply


def draw(engine: Engine, this: Shaped, strategy: str, count: int = COUNT) -> Counter[Reply]:
    return Counter(written(engine, this, strategy, seed) for seed in range(count))


class ShapedTree(Tree):
    """The probabilities of all replies of a case by the definition of CE."""

    def __init__(self, members: Sequence[Member], this: Shaped) -> None:
        super().__init__(members, this.case)
        self._min_tokens = this.min_tokens
        self._mixed: dict[Any, dict[Piece, float]] = {}

    def following(self, reply: Reply) -> dict[Piece, float]:
        state = (len(reply), reply if self._same else self.text(reply))
        if state not in self._mixed:
            probability = max(sampling.xtc_probability for sampling in self._case.sampling)
            mixture: dict[Piece, float] = {}
            for drops, coin in ((False, 1 - probability), (True, probability)):
                for piece, share in self._mixture(reply, drops=drops).items() if coin else ():
                    mixture[piece] = mixture.get(piece, 0.0) + coin * share
            self._mixed[state] = mixture
        return self._mixed[state]

    def _mixture(self, reply: Reply, *, drops: bool) -> dict[Piece, float]:
        mixture: dict[Piece, float] = {}
        for member, weight, sampling in zip(
            self._members, self.weights(self.text(reply)), self._case.sampling, strict=True
        ):
            for piece, share in self._shaped(member, reply, sampling, drops=drops).items():
                mixture[piece] = mixture.get(piece, 0.0) + weight * share
        return mixture

    def _shaped(self, member: Member, reply: Reply, sampling: Sampling, *, drops: bool) -> dict[Piece, float]:
        vocabulary, ends = member.vocabulary, set(member.vocabulary.end_ids)
        logits = self._logits(member, reply)
        penalise(logits, self._ids(member, reply), vocabulary.pieces, ends, sampling)
        for bias in sampling.logit_bias:
            for i, piece in enumerate(vocabulary.pieces):
                if (
                    piece == bias.of.encode()
                    if isinstance(bias.of, str)
                    else (i, member.name) == (bias.of, bias.member)
                ):
                    logits[i] += bias.value
        if len(reply) < self._min_tokens:
            for i in ends:
                logits[i] = -math.inf
        usable = [i for i, piece in enumerate(vocabulary.pieces) if (piece or i in ends) and logits[i] > -math.inf]
        best = sorted(usable, key=lambda i: -logits[i])
        found: dict[Piece, float] = {}
        for i, share in zip(best, shares([logits[i] for i in best], sampling, drops=drops), strict=False):
            if share:
                piece = None if i in ends else i if self._same else vocabulary.pieces[i]
                found[piece] = found.get(piece, 0.0) + share
        return found

    def _ids(self, member: Member, reply: Reply) -> list[int]:
        encode, begin = member.vocabulary.encode, member.vocabulary.bos
        text = [*encode(self._case.head, at_start=True), *reply] if self._same else None  # type: ignore[list-item]
        return [*([] if begin is None else [begin]), *(text or encode(self.text(reply), at_start=True))]


def penalise(logits: list[float], context: list[int], pieces: list[bytes], ends: set[int], sampling: Sampling) -> None:
    seen = Counter(context[-sampling.repeat_last_n :] if sampling.repeat_last_n > 0 else context)
    for i in seen.keys() - ends:
        logits[i] = logits[i] / sampling.repeat_penalty if logits[i] > 0 else logits[i] * sampling.repeat_penalty
        logits[i] -= sampling.presence_penalty + seen[i] * sampling.frequency_penalty
    if sampling.dry_multiplier:
        last = context[-sampling.dry_penalty_last_n :] if sampling.dry_penalty_last_n > 0 else context
        breaks = {i for i, p in enumerate(pieces) if any(b.encode() in p for b in sampling.dry_sequence_breakers)}
        for i in set(last) - ends - breaks:
            before = [n for n in range(1, len(last)) if last[n] == i]
            length = max((in_common(last[:n], last, breaks) for n in before), default=0)
            if length >= sampling.dry_allowed_length:
                logits[i] -= sampling.dry_multiplier * sampling.dry_base ** (length - sampling.dry_allowed_length)


def in_common(a: list[int], b: list[int], breaks: set[int]) -> int:
    """How many ids two contexts have in common at their ends, up to one that breaks."""
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length] and a[-1 - length] not in breaks:
        length += 1
    return length


def shares(logits: list[float], sampling: Sampling, *, drops: bool) -> list[float]:
    """Probabilities of logits that descend, 0 for those that are taken away."""
    if sampling.top_n_sigma > 0:
        mean = sum(logits) / len(logits)
        sigma = math.sqrt(sum((logit - mean) ** 2 for logit in logits) / len(logits))
        logits = [logit for logit in logits if logit >= logits[0] - sampling.top_n_sigma * sigma]
    left = normalised([math.exp((x - logits[0]) / sampling.temperature) for x in logits[: sampling.top_k or None]])
    if sampling.typical_p < 1:
        entropy = -sum(p * math.log(p) for p in left)
        order = sorted(range(len(left)), key=lambda i: abs(-math.log(left[i]) - entropy))
        count = next(
            (n for n in range(1, len(left)) if sum(left[i] for i in order[:n]) > sampling.typical_p), len(left)
        )
        left = normalised([p if i in order[:count] else 0.0 for i, p in enumerate(left)])
    if sampling.top_p < 1:
        left = normalised([p if sum(left[:i]) < sampling.top_p else 0.0 for i, p in enumerate(left)])
    left = normalised([p if p >= sampling.min_p * max(left) else 0.0 for p in left])
    if drops:
        top = [i for i, p in enumerate(left) if p and p >= sampling.xtc_threshold]
        left = normalised([0.0 if i in top[:-1] else p for i, p in enumerate(left)])
    return left


def normalised(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@pytest.fixture
def open_all(open_member: Callable[..., Member]) -> OpenAll:
    """The members of a case."""
    return lambda this: [open_member(name, **SETTINGS) for name in this.names]


def distance(a: dict[Piece, float], b: dict[Piece, float]) -> float:
    return sum(abs(a.get(piece, 0.0) - b.get(piece, 0.0)) for piece in {*a, *b}) / 2


def is_as_defined(drawn: Counter[Reply], tree: ShapedTree) -> bool:
    cells = tree.cells(drawn.total())
    assert sum(cells.values()) == pytest.approx(1, abs=1e-9)
    return all(tree.possible(reply) for reply in drawn) and g_test(drawn, cells) > EXACT


@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
def test_replies_have_the_probabilities_of_the_definition(open_all: OpenAll, name: str) -> None:
    this = CASES[name]
    members = open_all(this.case)
    tree, engine = ShapedTree(members, this), engine_of(members, this)
    plain = [Sampling(each.temperature, each.top_k) for each in this.case.sampling]
    assert distance(tree.following(()), Tree(members, replace(this.case, sampling=plain)).following(())) > 0.02
    for strategy in ("me", "ce"):
        assert is_as_defined(draw(engine, this, strategy), tree)


@pytest.mark.parametrize("strategy", ["me", "ce"])
@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
def test_replies_by_the_largest_logits_are_the_same(open_all: OpenAll, name: str, strategy: str) -> None:
    this = CASES[name]
    members = open_all(this.case)
    whole, short = engine_of(members, this), engine_of(members, this, Short)
    for seed in range(SEEDS):
        assert written(short, this, strategy, seed) == written(whole, this, strategy, seed)


def a_context_without_its_last_id(patch: pytest.MonkeyPatch) -> None:
    shape = Shaper.shape

    def early(self: Shaper, row: Any, context: Callable[[], IntArray], written: int) -> Any:
        return shape(self, row, lambda: context()[:-1], written)

    patch.setattr(Shaper, "shape", early)


def rows_that_change(patch: pytest.MonkeyPatch) -> None:
    class InPlace(shaping._Copy):
        def __init__(self, row: Any) -> None:
            self._ids = None
            self.logits = row

    patch.setattr(shaping, "_Copy", InPlace)


def a_coin_for_each_alignment(patch: pytest.MonkeyPatch) -> None:
    """And that of the piece: what is dropped and what is drawn then depend on each other."""
    align = Sampler._align

    def thrown(self: Sampler, member: int, row: Any, numbers: IntArray, *rest: Any) -> Distribution:
        likeliest = numbers[np.argmax(np.where(numbers >= 0, row, -np.inf))]
        self._coin = float(np.exp(-self._noise.at(self._place, np.array([likeliest]))[0]))
        return align(self, member, row, numbers, *rest)

    patch.setattr(Sampler, "_align", thrown)


def penalties_behind_the_truncation(patch: pytest.MonkeyPatch) -> None:
    shape = Shaper.shape

    def late(self: Shaper, row: Any, context: Callable[[], IntArray], written: int) -> Any:
        cut = np.where(row >= np.sort(row)[-6], row, -np.inf).astype(np.float32)
        return shape(self, cut, context, written)

    patch.setattr(Shaper, "shape", late)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    "fault",
    [
        a_context_without_its_last_id,
        rows_that_change,
        a_coin_for_each_alignment,
        penalties_behind_the_truncation,
    ],
)
def test_a_broken_engine_is_found_out(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    members = open_all(BROKEN.case)
    tree = ShapedTree(members, BROKEN)
    fault(monkeypatch)
    assert not is_as_defined(draw(engine_of(members, BROKEN), BROKEN, "ce", BROKEN_COUNT), tree)


@pytest.mark.slow
@pytest.mark.parametrize("off", [-1, 1])
def test_an_end_at_another_piece_is_found_out(open_all: OpenAll, off: int) -> None:
    this = CASES["min_tokens"]
    members = open_all(this.case)
    drawn = draw(engine_of(members, this), replace(this, min_tokens=this.min_tokens + off), "me", BROKEN_COUNT)
    assert not is_as_defined(drawn, ShapedTree(members, this))


def test_ends_of_generation_are_spared(open_all: OpenAll) -> None:
    [member, _] = open_all(CASES["penalties"].case)
    vocabulary, [end] = member.vocabulary, member.vocabulary.end_ids
    sampling = Sampling(presence_penalty=1.0, dry_multiplier=1.0, dry_allowed_length=1)
    shaper = Shaper("bpe_c", vocabulary, sampling, n_ctx=8, min_tokens=0, breaks=lambda: np.zeros(999, dtype=bool))
    row = np.zeros(vocabulary.size, dtype=np.float32)
    changed = shaper.shape(row, lambda: np.array([300, end, 300, 301, 300], dtype=np.int32), 0)
    assert isinstance(changed, np.ndarray)
    assert {i: x for i, x in enumerate(changed.tolist()) if x} == {300: -1.0, 301: -2.0}
    assert not row.any()
    assert shaper.lowered == 8


def test_too_few_logits_are_found_out(open_all: OpenAll, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = shaped("bpe_c", "spm", top_k=6)
    members = open_all(plain.case)
    likely = [piece.decode() for piece in ShapedTree(members, plain).following(()) if isinstance(piece, bytes)]
    this = shaped("bpe_c", "spm", top_k=4, logit_bias=banned(*likely), presence_penalty=0.5)
    whole = [written(engine_of(members, this), this, "me", seed) for seed in range(SEEDS)]
    monkeypatch.setattr(Shaper, "_most_lowered", lambda self, n_ctx: 0)
    assert [written(engine_of(members, this, Short), this, "me", seed) for seed in range(SEEDS)] != whole
