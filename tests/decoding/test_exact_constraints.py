"""Whole replies under a constraint have exactly the probabilities that the definition gives them.

As in test_exact_replies.py and test_exact_words.py: the tree of all replies is worked out from the definition, and a
G-test compares replies of the product with it, with odds of a false alarm of at most 1e-6 each. The definition knows
nothing of llguidance. A constraint is a set of texts, all of them written out here, and

- a piece may come next where some text of the set begins with the reply and that piece; END where the reply is one;
- where the reply is none, whole characters with which all texts go on come next with the probability 1, in one piece
  that no member writes; so does END where no text goes on. In the middle of a character nothing is forced;
- in A_i, pieces that may not come next are taken out before anything else: temperature, top-k, top-p, min-p;
- a member has weight 0 where its vocabulary has no piece that may come next;
- by words, a border stands behind what is forced, and B_j is A_j where no piece that begins a word may come next.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from selection import slow_but
from test_exact_batching import EACH, PLACES, ROUTE_SEED, Made, places_of
from test_exact_replies import (
    EXACT,
    SETTINGS,
    Case,
    OpenAll,
    Remembered,
    Reply,
    Tree,
    case,
    g_test,
    request,
    tiny,
    truncated,
)
from test_exact_words import WordTree, strays

from me_local import Ensemble, Overrides, load
from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.config import Constraint
from me_local.decoding import strategies
from me_local.decoding.batching import Batching
from me_local.decoding.engine import FORCED, Course, Draw, Engine, Request
from me_local.decoding.generation import Generation
from me_local.decoding.reply import Draft
from me_local.decoding.strategies import Sampler
from me_local.jsonl import json_text
from me_local.llama.member import Member
from me_local.mixture.alignment import Distribution, top_k
from me_local.mixture.routing import SharedRoute
from me_local.sampling import Sampling
from me_local.text import constraints
from me_local.text.constraints import Matcher
from me_local.text.unified import END

__all__ = ["tiny"]

COUNT = 2_500  # replies of a case
BROKEN_COUNT = 5_000  # of one that is broken

Piece = bytes | int | None
NOTHING = "nothing"  # is forced


@dataclass(frozen=True)
class Language:
    """A set of texts, and a constraint that is to mean it."""

    texts: frozenset[bytes]
    constraint: Constraint

    def following(self, text: bytes) -> list[bytes]:
        """How the texts go on that begin so."""
        return [each[len(text) :] for each in self.texts if each.startswith(text)]

    def forced(self, text: bytes) -> bytes | str | None:
        """What comes next in any case: some whole characters, None for END, or NOTHING."""
        ways = self.following(text)
        if b"" in ways:
            return None if len(ways) == 1 else NOTHING
        if text.decode(errors="ignore").encode() != text:
            return NOTHING
        return common_beginning(ways).decode(errors="ignore").encode() or NOTHING


def common_beginning(texts: Sequence[bytes]) -> bytes:
    length = next(n for n in range(min(map(len, texts)), -1, -1) if len({text[:n] for text in texts}) == 1)
    return texts[0][:length]


def choice(*texts: str) -> Language:
    return Language(frozenset(text.encode() for text in texts), Constraint("choice", json_text(list(texts))))


def regex(pattern: str, texts: Sequence[str]) -> Language:
    return Language(frozenset(text.encode() for text in texts), Constraint("regex", pattern))


def strings(alphabet: str, least: int, most: int) -> list[str]:
    return ["".join(chars) for length in range(least, most + 1) for chars in product(alphabet, repeat=length)]


WORDS = choice("the cat sat", "the car", "then", "a", "", "the ca")
LETTERS = regex("[abc ]{1,4}", strings("abc ", 1, 4))
CUT = choice("né", "nè", "n😀 x", "n😁", "Жа", "Жб")
NUMBERS = Language(  # llguidance's JSON: no leading zeros, and none in front of 10
    frozenset(f'{{"n": {n}, "u": "{u}"}}'.encode() for n in range(8, 13) for u in ("m", "km", "é")),
    Constraint(
        "json_schema",
        '{"type":"object","properties":{"n":{"type":"integer","minimum":8,"maximum":12},"u":{"enum":["m","km","é"]}},'
        '"required":["n","u"],"additionalProperties":false}',
    ),
)
GRAMMAR = Language(
    frozenset(a + b + c for a in (b"ab", b"a") for b in (b"x", b"xx") for c in (b"", b" y")),
    Constraint("grammar", 'root ::= "a" "b"? "x"{1,2} (" " "y")?'),
)
# In the vocabulary that lacks every other byte from 0x80, 0xD0, with which these begin, has no token, and 0xC3 has one.
LACKED = choice("xЖ", "xЙ", "éa", "èb", "y")


@dataclass(frozen=True)
class Constrained:
    """A case, and what its replies have to be behind the head."""

    case: Case
    language: Language


def constrained(language: Language, *names: str, length: int = 12, **values: object) -> Constrained:
    return Constrained(case(*names, length=length, **values), language)


CASES = {
    "one vocabulary": constrained(WORDS, "bpe_a", "bpe_b", weights=(0.3, 0.7)),
    "BPE and SPM": constrained(WORDS, "bpe_c", "spm", temperature=0.7),
    "three members": constrained(LETTERS, "bpe_b", "bpe_c", "spm", weights=(0.5, 0.2, 0.3), top_k=5),
    "cut characters": constrained(CUT, "bpe_c", "spm", temperature=1.3),
    "cut characters of one vocabulary": constrained(CUT, "bpe_a", "bpe_b"),
    "a schema": constrained(NUMBERS, "bpe_a", "spm", temperature=0.7),
    "a schema, one vocabulary": constrained(NUMBERS, "bpe_a", "bpe_b", temperature=0.7),
    "a grammar": constrained(GRAMMAR, "bpe_c", "spm", head=b"x", top_k=3),
    "other memories": constrained(LETTERS, "hybrid", "recurrent", "swa", weights=(0.4, 0.3, 0.3), top_k=4),
    "temperature 0": constrained(LETTERS, "bpe_c", "spm", temperature=0.0),
    "no top-k": constrained(LETTERS, "bpe_c", "spm", top_k=0),
    "top-k 2": constrained(LETTERS, "bpe_c", "spm", top_k=2),
    "top-p": constrained(LETTERS, "bpe_a", "bpe_c", top_k=0, top_p=0.7),
    "min-p": constrained(LETTERS, "bpe_c", "spm", top_k=0, min_p=0.3),
    "each its own": constrained(
        LETTERS, "bpe_a", "spm", weights=(0.3, 0.7), sampling=(Sampling(0.5), Sampling(1.3, 4, top_p=0.8))
    ),
    "lacking bytes": constrained(LACKED, "bpe_c", "lacking", weights=(0.4, 0.6)),
    "no head": constrained(WORDS, "bpe_b", "spm", head=b""),
}
BROKEN = constrained(LETTERS, "bpe_c", "spm", weights=(0.8, 0.2), top_k=3)
AT_WORDS = [
    *("BPE and SPM", "three members", "cut characters", "a schema", "a grammar", "top-k 2", "each its own"),
    *("one vocabulary", "lacking bytes"),
]


def engine_of(members: Sequence[Member], this: Case) -> Engine:
    """An engine that evaluates each context once; its alignment is the real one, so that few pieces are asked for."""
    return Engine([Remembered(member) for member in members], this.router, top_k)


def asked(engine: Engine, this: Constrained, strategy: str, seed: int, unit: str) -> Request:
    made = request(engine.models, this.case, strategy, seed)
    if not this.case.head:  # a conversation's: there is something in front
        made = replace(made, prompts=tuple(np.array([*prompt, 300], np.int32) for prompt in made.prompts))
    return replace(made, constraint=this.language.constraint, unit=unit)  # type: ignore[arg-type]


def element(draw: Draw, same: bool) -> bytes | int | None:
    """What a draw is in a `Reply`: bytes that were forced are bytes, whatever the vocabularies."""
    if draw.number == END:
        return None
    return draw.number - 1 if same and draw.number != FORCED else draw.piece


def draw(
    engine: Engine, this: Constrained, strategy: str = "me", unit: str = "token", count: int = COUNT
) -> Counter[Reply]:
    drawn: Counter[Reply] = Counter()
    for seed in range(count):
        running = Generation(engine, asked(engine, this, strategy, seed, unit))
        reply: Reply = ()
        while len(reply) < this.case.length and reply[-1:] != (None,):
            step = running.step()
            assert step is not None
            reply += (element(step, engine.unified.same),)
        drawn[reply] += 1
    return drawn


class ConstrainedTree(Tree):
    """The probabilities of all replies of a case by the definition of CE."""

    def __init__(self, members: Sequence[Member], this: Constrained) -> None:
        super().__init__(members, this.case)
        self.language = this.language

    def written(self, reply: Reply) -> bytes:
        return self.text(reply)[len(self._case.head) :]

    def forced(self, reply: Reply) -> bytes | str | None:
        return self.language.forced(self.written(reply))

    def following(self, reply: Reply) -> dict[Piece, float]:
        forced = self.forced(reply)
        return super().following(reply) if forced is NOTHING else {forced: 1.0}  # type: ignore[dict-item]

    def weights(self, text: bytes) -> list[float]:
        possible = [self.has_piece(j, text) for j in range(len(self._members))]
        weights = [w if has else 0.0 for w, has in zip(super().weights(text), possible, strict=True)]
        return [weight / sum(weights) for weight in weights]

    def allowed(self, member: Member, text: bytes) -> list[int]:
        """The ids that may come behind a text."""
        ways = self.language.following(text[len(self._case.head) :])
        beginnings = {way[:n] for way in ways for n in range(1, len(way) + 1)}
        ends = set(member.vocabulary.end_ids)
        pieces = member.vocabulary.pieces
        return [i for i in range(len(pieces)) if (b"" in ways if i in ends else pieces[i] in beginnings)]

    def has_piece(self, j: int, text: bytes) -> bool:
        return bool(self.allowed(self._members[j], text))

    def _aligned(self, member: Member, reply: Reply, sampling: Sampling) -> dict[Piece, float]:
        return self._shaped(member, reply, sampling, self.allowed(member, self.text(reply)))

    def _shaped(self, member: Member, reply: Reply, sampling: Sampling, ids: list[int]) -> dict[Piece, float]:
        logits, pieces, ends = self._logits(member, reply), member.vocabulary.pieces, set(member.vocabulary.end_ids)
        best = sorted(ids, key=lambda i: -logits[i])
        found: dict[Piece, float] = {}
        for i, probability in zip(best, truncated([logits[i] for i in best], sampling), strict=False):
            piece = None if i in ends else i if self._same else pieces[i]
            found[piece] = found.get(piece, 0.0) + probability
        return found

    def _logits(self, member: Member, reply: Reply) -> list[float]:
        encode, head = member.vocabulary.encode, self._case.head
        before = [*([] if member.vocabulary.bos is None else [member.vocabulary.bos]), *([] if head else [300])]
        if self._same:
            ids = [*before, *encode(head, at_start=bool(head))]
            for piece in reply:
                ids += [piece] if isinstance(piece, int) else encode(piece)  # type: ignore[arg-type]
        else:
            ids = [*before, *encode(self.text(reply), at_start=bool(head))]
        member.forget()
        member.sync(np.array(ids, dtype=np.int32))
        return member.logits().tolist()  # type: ignore[no-any-return]


class ConstrainedWordTree(ConstrainedTree, WordTree):
    """The same of the mixture over words."""

    def following(self, reply: Reply) -> dict[Piece, float]:
        forced = self.forced(reply)
        if forced is not NOTHING:
            return {forced: 1.0}  # type: ignore[dict-item]
        return WordTree.following(self, reply)

    def _sum(self, reply: Reply, at: int, writer: int) -> float:
        if at < len(reply) and (forced := self.forced(reply[:at])) is not NOTHING:
            return self._sum(reply, at + 1, -1) if reply[at] == forced else 0.0
        return super()._sum(reply, at, writer)

    def able(self, j: int, reply: Reply) -> bool:
        return super().able(j, reply) and self.has_piece(j, self.text(reply))

    def free(self, j: int, reply: Reply) -> bool:
        return self.forced(reply) is not NOTHING or super().free(j, reply)

    def _restricted(self, j: int, reply: Reply) -> dict[Piece, float]:
        member = self._members[j]
        pieces, ends = member.vocabulary.pieces, set(member.vocabulary.end_ids)
        ids = self.allowed(member, self.text(reply))
        kept = [i for i in ids if self.begins(None if i in ends else pieces[i])]
        return self._shaped(member, reply, self._case.sampling[j], kept or ids)


@pytest.fixture
def open_all(open_member: Callable[..., Member]) -> OpenAll:
    """The members of a case."""
    return lambda this: [open_member(name, **SETTINGS) for name in this.names]


@pytest.fixture(autouse=True)
def _compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reply has a copy of one matcher here; it is small, so that no reply meets a limit because of others."""
    known: dict[Constraint, Any] = {}

    def start(constraint: Constraint, closing: bytes) -> Matcher:
        assert not closing
        if constraint not in known:
            known[constraint] = constraints.start(constraint)._matcher
        return Matcher(known[constraint].deep_copy())

    monkeypatch.setattr(strategies, "constraints", SimpleNamespace(start=start))


def check(drawn: Counter[Reply], tree: ConstrainedTree) -> None:
    cells = tree.cells(drawn.total())
    assert sum(cells.values()) == pytest.approx(1, abs=1e-9)
    assert [reply for reply in drawn if not tree.possible(reply)] == []
    assert {tree.written(reply) for reply in drawn if reply[-1] is None} <= tree.language.texts
    assert len(cells) == 1 or g_test(drawn, cells) > EXACT


@pytest.mark.parametrize("which", slow_but(product(CASES, ["me", "ce"]), ("a grammar", "me")), ids=" by ".join)
def test_replies_have_the_probabilities_of_the_definition(open_all: OpenAll, which: tuple[str, str]) -> None:
    name, strategy = which
    this = CASES[name]
    drawn = draw(engine_of(open_all(this.case), this.case), this, strategy)
    check(drawn, ConstrainedTree(open_all(this.case), this))


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_WORDS)
def test_replies_by_words(open_all: OpenAll, name: str) -> None:
    this = CASES[name]
    drawn = draw(engine_of(open_all(this.case), this.case), this, "me", "word")
    check(drawn, ConstrainedWordTree(open_all(this.case), this))


class MadeUnder(Made):
    """A draft that remembers its draws, the forced ones as bytes."""

    def take(self, draw: Draw | None) -> Any:  # type: ignore[override]
        assert draw is not None
        self.made += (element(draw, self._same),)
        return Draft.take(self, draw)


def by_place(made: Batching, engine: Engine, this: Constrained, unit: str = "token") -> list[Counter[Reply]]:
    """The first replies of each place, as in test_exact_batching.py."""
    names = tuple(model.name for model in engine.models)
    drawn: list[list[Reply]] = [[] for _ in range(PLACES)]
    seed = 0
    while min(map(len, drawn)) < EACH:
        while made.free:
            ask = asked(engine, this, "me", seed, unit)
            made.begin(
                ask,
                lambda generation, ask=ask: MadeUnder(generation, ask, names, 99, engine.unified.same),  # type: ignore[misc]
            )
            seed += 1
        for running, _ in made.step():
            assert running.error is None
            if running.draft.finish_reason:
                assert isinstance(running.draft, MadeUnder)
                drawn[running.place].append(running.draft.made)
    return [Counter(replies[:EACH]) for replies in drawn]


@pytest.mark.slow
@pytest.mark.parametrize("route", ["shared", "own"])
@pytest.mark.parametrize("name", ["one vocabulary", "three members", "a schema", "lacking bytes"])
def test_the_replies_of_each_place(open_all: OpenAll, name: str, route: str) -> None:
    this = CASES[name]
    engine = engine_of(open_all(this.case), this.case)
    made = places_of(engine, PLACES, SharedRoute(ROUTE_SEED) if route == "shared" else None)
    tree = ConstrainedTree(open_all(this.case), this)
    for counts in by_place(made, engine, this):
        check(counts, tree)


@pytest.mark.slow
def test_the_replies_of_each_place_by_words(open_all: OpenAll) -> None:
    this = CASES["three members"]
    engine = engine_of(open_all(this.case), this.case)
    tree = ConstrainedWordTree(open_all(this.case), this)
    for counts in by_place(places_of(engine, PLACES, None), engine, this, "word"):
        check(counts, tree)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_an_ensemble_as_users_run_it(write_models: Callable[..., Any], open_all: OpenAll, batch: int) -> None:
    """Without `Remembered`: real caches, and the way from the file to the reply; every third of two at once."""
    this = CASES["a grammar"]
    top = f"[sampling]\ntop_k = {this.case.sampling[0].top_k}"
    path = write_models(*this.case.names, top=top, member='type_k = "f32"\ntype_v = "f32"')
    drawn: Counter[Reply] = Counter()
    with load(path, batch=batch) as ensemble:
        assert isinstance(ensemble, Ensemble)
        overrides = Overrides(seed=0, max_tokens=99, constraint=this.language.constraint)
        for finished in ensemble.generate_many([this.case.head.decode()] * (COUNT), overrides, raw=True):
            assert finished.reply is not None
            assert finished.reply.finish_reason == "stop"
            if finished.index % 7 == 0 or batch == 1:
                drawn[(*(step.piece for step in finished.reply.steps), None)] += 1
    assert g_test(drawn, ConstrainedTree(open_all(this.case), this).cells(drawn.total())) > EXACT


def test_the_cases_are_what_they_are_for(open_all: OpenAll) -> None:
    """Members lack pieces, characters are cut, and much is forced, or the tests above would show little."""
    lacking = CASES["lacking bytes"]
    tree = ConstrainedTree(open_all(lacking.case), lacking)
    assert tree.weights(b"the catx") != [1.0, 0.0] or not tree.has_piece(1, b"the catx")
    assert tree.weights(b"the catx") == [1.0, 0.0]
    assert tree.weights(b"the cat") == [0.4, 0.6]
    assert CUT.forced(b"n") is NOTHING
    assert CUT.forced("Ж".encode()[:1]) is NOTHING
    assert choice("nop", "noé").forced(b"") == b"no"
    assert choice("né", "nè").forced(b"") == b"n"
    assert NUMBERS.forced(b"") == b'{"n": '
    assert NUMBERS.forced(b'{"n": 1') is NOTHING
    assert NUMBERS.forced(b'{"n": 11') == b', "u": "'
    assert WORDS.forced(b"the cat sat") is None
    assert WORDS.forced(b"the ca") is NOTHING
    assert strays("é".encode()[:1]) == [b"\xc3"]


def test_all_logits_are_asked_for(open_all: OpenAll) -> None:
    """Also where another reply, beside it in a batch, would do with the largest."""
    engine = engine_of(open_all(BROKEN.case), BROKEN.case)
    counts: list[int] = []
    for model in engine.models:
        model.shorten = lambda count, numbers: counts.append(count)  # type: ignore[method-assign]
    plain, under = request(engine.models, BROKEN.case, "ce", 0), asked(engine, BROKEN, "ce", 0, "token")
    Generation(engine, plain).step()
    assert counts == [7, 7]  # top_k, and some that may never be sampled
    Generation(engine, under).step()
    assert counts[2:] == [0, 0]
    counts.clear()
    made = places_of(engine, 2, None)
    for ask in (plain, under):
        made.begin(ask, lambda generation, ask=ask: Made(generation, ask, ("a", "b"), 9, False))  # type: ignore[misc]
    made.step()
    assert counts == [0, 0]


def filters_behind_the_truncation(patch: pytest.MonkeyPatch) -> None:
    """Takes out pieces of what top-k left, and puts all back where nothing is left."""

    def align(self: Sampler, member: int, row: Any, numbers: IntArray, otherwise: Any = None) -> Distribution:
        plain = top_k(row, numbers, Sampling(top_k=40))
        allows = self._permits(self._matcher)  # type: ignore[arg-type]
        kept = np.array([allows(int(number)) for number in plain.numbers])
        if not kept.any():
            return top_k(row, strategies.permitted(row, numbers, allows, 0), self._request.sampling[member])
        return Distribution(plain.numbers[kept], plain.probabilities[kept] / plain.probabilities[kept].sum())

    patch.setattr(Sampler, "_align", align)


def end_anywhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Matcher, "may_end", lambda self: True)


def no_end_before_it_has_to(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Matcher, "may_end", lambda self: bool(self._matcher.is_stopped()))


def asks_for_too_few(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(strategies, "sufficient", lambda sampling: 2)


def equals_in_any_order(patch: pytest.MonkeyPatch) -> None:
    """Takes the pieces in the order of their ids, so that top-k is of others."""

    def by_id(logits: LogitArray, numbers: IntArray, permits: Callable[[int], bool], wanted: int, _: Any) -> IntArray:
        kept = [i for i, number in enumerate(numbers.tolist()) if number >= 0 and permits(number)][: wanted or None]
        left = np.full_like(numbers, -1)
        left[kept] = numbers[kept]
        return left

    patch.setattr(strategies, "permitted", by_id)


def first_byte_is_enough(patch: pytest.MonkeyPatch) -> None:
    """Takes pieces whose first byte fits; what does not is cut off."""
    patch.setattr(Matcher, "allows", lambda self, piece: self._matcher.validate_tokens(list(piece[:1])) == 1)
    append = Matcher.append

    def fitting(self: Matcher, piece: bytes) -> None:
        append(self, piece[: self._matcher.validate_tokens(list(piece))])

    patch.setattr(Matcher, "append", fitting)


FAULTS = [
    filters_behind_the_truncation,
    end_anywhere,
    no_end_before_it_has_to,
    asks_for_too_few,
    equals_in_any_order,
    first_byte_is_enough,
]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["me", "ce"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_engine_is_found_out(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None], strategy: str
) -> None:
    tree = ConstrainedTree(open_all(BROKEN.case), BROKEN)
    fault(monkeypatch)
    drawn = draw(engine_of(open_all(BROKEN.case), BROKEN.case), BROKEN, strategy, count=BROKEN_COUNT)
    possible = all(tree.possible(reply) for reply in drawn)
    assert not possible or g_test(drawn, tree.cells(BROKEN_COUNT)) < EXACT


@pytest.mark.slow
def test_weights_of_members_without_a_piece_that_are_wrong_are_found_out(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = CASES["lacking bytes"]
    monkeypatch.setattr(Sampler, "has_piece", lambda self, member: member == 0)
    drawn = draw(engine_of(open_all(this.case), this.case), this, count=BROKEN_COUNT)
    assert g_test(drawn, ConstrainedTree(open_all(this.case), this).cells(BROKEN_COUNT)) < EXACT


def keeps_the_writer_behind_what_is_forced(patch: pytest.MonkeyPatch) -> None:
    step = Sampler.draw

    def kept(self: Sampler, weights: FloatArray) -> Course[Draw]:
        writer = self.writer
        drawn = yield from step(self, weights)
        if drawn.number == FORCED:
            self.writer = writer
        return drawn

    patch.setattr(Sampler, "draw", kept)


def follows_without_a_condition(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sampler, "_open_word", Sampler._predict)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [keeps_the_writer_behind_what_is_forced, follows_without_a_condition])
def test_words_that_are_drawn_wrongly_are_found_out(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    texts = [f"{a}x: {b}{c}" for a, b in product("ab", strings("aeinst", 1, 3)) for c in ("", " e")]
    this = constrained(regex("[ab]x: [aeinst]{1,3}( e)?", texts), "bpe_b", "spm", top_k=4)
    tree = ConstrainedWordTree(open_all(this.case), this)
    drawn = draw(engine_of(open_all(this.case), this.case), this, "me", "word", BROKEN_COUNT)
    assert g_test(drawn, tree.cells(BROKEN_COUNT)) > EXACT
    fault(monkeypatch)
    drawn = draw(engine_of(open_all(this.case), this.case), this, "me", "word", BROKEN_COUNT)
    assert g_test(drawn, tree.cells(BROKEN_COUNT)) < EXACT


@pytest.mark.slow
def test_forced_pieces_that_take_no_number_of_a_shared_route_are_found_out(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies then draw with the same numbers at other steps than those beside them: the route is no longer shared."""
    this = CASES["a schema"]
    engine = engine_of(open_all(this.case), this.case)

    def numbers_of(count: int) -> list[list[float]]:
        route = SharedRoute(ROUTE_SEED)
        begun: list[list[float]] = []

        def begin(step: int) -> Callable[[], float]:
            taken: list[float] = []
            begun.append(taken)
            following = SharedRoute.begin(route, step)
            return lambda: taken.append(following()) or taken[-1]  # type: ignore[func-returns-value]

        monkeypatch.setattr(route, "begin", begin)
        made = places_of(engine, PLACES, route)
        names = tuple(model.name for model in engine.models)
        for seed in range(PLACES):
            ask = asked(engine, this, "me", seed, "token")
            made.begin(ask, lambda generation, ask=ask: MadeUnder(generation, ask, names, 99, False))  # type: ignore[misc]
        for step in range(count):
            assert all(len(taken) == step for taken in begun)
            made.step()
        return begun

    first, *others = numbers_of(4)
    assert [first] * len(others) == others
    forced = Sampler._forced

    def without_a_number(self: Sampler, weights: FloatArray) -> Draw | None:
        kept = self._route_uniform
        self._route_uniform = lambda: 0.0
        drawn = forced(self, weights)
        self._route_uniform = kept
        return drawn

    monkeypatch.setattr(Sampler, "_forced", without_a_number)
    with pytest.raises(AssertionError):
        numbers_of(4)
