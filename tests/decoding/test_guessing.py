"""Guesses have no effect on replies: the same seeds give the same replies, byte by byte, with and without.

Members compute in full precision, where batches of other sizes change the low bits of logits and nothing that is drawn.
A source that is right knows the reply, which was written without guesses before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selection import slow_but
from test_exact_replies import SETTINGS, Case, by_last_byte, case, request

from me_local import Ensemble, Overrides
from me_local.arrays import IntArray
from me_local.config import Constraint, MemberConfig, Sampling, Strategy, Unit
from me_local.decoding.engine import Engine
from me_local.decoding.generation import Generation
from me_local.decoding.guessing import CHEAP, DEAR, LEAST, LONGEST, SHORTEST, Repeats, Source
from me_local.decoding.planning import Rows
from me_local.errors import RunError
from me_local.llama.foresight import GUESS
from me_local.llama.member import Member
from me_local.llama.weights import Weights
from me_local.mixture.alignment import top_k
from me_local.model import EvaluationInterruptedError, Row
from me_local.text.unified import END

LENGTH = 40  # pieces of a reply

OpenAll = Callable[..., list[Member]]
Pieces = list[tuple[bytes, int]]


class Knowing:
    """A source that knows the text that is going to be, and leads away from it in some of its guesses."""

    def __init__(self, text: bytes, seed: int, right: float) -> None:
        self._text, self._written, self._right = text, 0, right
        self._random = np.random.default_rng(seed)

    def append(self, piece: bytes) -> None:
        self._written += len(piece)

    def guess(self, asked: Sequence[int], most: int) -> bytes:
        guess = self._text[self._written : self._written + 30]
        if self._random.random() < self._right:
            return guess
        kept = int(self._random.integers(0, 1 + len(guess) // 2)) if self._right else 0
        return guess[:kept] + b"zq" + guess[kept + 2 :]


SOURCES: dict[str, Callable[[bytes, int], Source]] = {
    "always right": lambda text, seed: Knowing(text, seed, 1.0),
    "right half of the time": lambda text, seed: Knowing(text, seed, 0.5),
    "always wrong": lambda text, seed: Knowing(text, seed, 0.0),
    "repeats": lambda text, seed: Repeats(),
}


@dataclass(frozen=True)
class Asked:
    """A case, and how its replies are drawn."""

    case: Case
    strategy: Strategy = "me"
    unit: Unit = "token"
    constraint: Constraint | None = None


ASKED = {
    "one vocabulary": Asked(case("bpe_a", "bpe_b")),
    "BPE and SPM": Asked(case("bpe_c", "spm", temperature=1.3, top_k=5)),
    "three members": Asked(case("bpe_b", "bpe_c", "spm", weights=(0.6, 0.2, 0.2), temperature=0.5)),
    "CE": Asked(case("bpe_c", "spm", temperature=0.7), "ce"),
    "CE of one vocabulary": Asked(case("bpe_a", "bpe_b"), "ce"),
    "words": Asked(case("bpe_c", "spm", temperature=0.7), unit="word"),
    "router": Asked(case("bpe_c", "spm", router=by_last_byte, weights=(0.1, 0.9))),
    "temperature 0": Asked(case("bpe_c", "spm", temperature=0.0)),
    "top-p": Asked(case("bpe_a", "bpe_c", top_k=0, top_p=0.7)),
    "other memories": Asked(case("hybrid", "recurrent", "swa", "bpe_a", weights=(0.2,) * 3 + (0.4,), top_k=5)),
    "each its own": Asked(case("bpe_a", "spm", sampling=(Sampling(0.5), Sampling(1.3, top_p=0.8)))),
    "constraint": Asked(case("bpe_c", "spm"), constraint=Constraint("regex", "( [a-z]{1,6}){60} the end")),
}


@pytest.fixture
def open_all(tiny: dict[str, Path]) -> Iterator[OpenAll]:
    """The members of a case, with room for guesses."""
    with ExitStack() as stack:

        def open_one(name: str, **settings: Any) -> Member:
            config = MemberConfig(name=name, path=tiny[name], **({"n_ctx": 512, "n_threads": 1} | SETTINGS | settings))
            weights = stack.enter_context(closing(Weights(config)))
            return stack.enter_context(Member(config, weights, outputs=GUESS + 1))

        yield lambda this, **settings: [open_one(name, **settings) for name in this.names]


def begin(engine: Engine, asked: Asked, seed: int, source: Source | int | None = None, **kwargs: Any) -> Generation:
    """A reply with this seed."""
    plain = request(engine.models, asked.case, asked.strategy, seed)
    return Generation(engine, replace(plain, unit=asked.unit, constraint=asked.constraint), source=source, **kwargs)


def rest(running: Generation, length: int = LENGTH) -> Pieces:
    """The next pieces of a reply, each with its member."""
    pieces: Pieces = []
    while len(pieces) < length:
        draw = running.step()
        assert draw is not None
        if draw.number == END:
            break
        pieces.append((draw.piece, draw.member))
    return pieces


def compare(open_all: OpenAll, asked: Asked, source: str, seeds: int) -> list[Generation]:
    """Write replies with guesses and without, which have to be the same; those with guesses."""
    plain, guessing = (Engine(open_all(asked.case), asked.case.router, top_k) for _ in range(2))
    written = []
    for seed in range(seeds):
        expected = begin(plain, asked, seed)
        pieces = rest(expected)
        found = begin(guessing, asked, seed, SOURCES[source](expected.text, seed))
        assert rest(found) == pieces
        written.append(found)
    return written


def guessed(written: list[Generation]) -> int:
    """How many predictions came out of guesses."""
    return sum(work.guessed for running in written for work in running.work)


def foreseeable(written: list[Generation]) -> int:
    """How many could have come out of guesses: all but the first of each member in a reply."""
    return sum(max(0, work.calls + work.guessed - 1) for running in written for work in running.work)


@pytest.mark.parametrize("name", slow_but(ASKED, "one vocabulary", "BPE and SPM", "CE", "words"))
def test_a_reply_does_not_depend_on_guesses(open_all: OpenAll, name: str) -> None:
    assert guessed(compare(open_all, ASKED[name], "right half of the time", 5)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_two_hundred_replies_do_not_depend_on_guesses(open_all: OpenAll, name: str) -> None:
    assert guessed(compare(open_all, ASKED[name], "right half of the time", 200)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("source", ["always right", "always wrong", "repeats"])
@pytest.mark.parametrize("name", ASKED)
def test_replies_do_not_depend_on_other_guesses(open_all: OpenAll, name: str, source: str) -> None:
    assert guessed(compare(open_all, ASKED[name], source, 30)) > 0 or source != "always right"


def by_length(rows: Rows, member: int, ids: IntArray) -> Row | None:
    """What `find` would do if it looked at the number of the ids alone."""
    return next((row for key, row in rows._rows[member].items() if len(key) == ids.nbytes), None)


@pytest.mark.parametrize("name", ["one vocabulary", "BPE and SPM"])
def test_logits_after_other_ids_would_be_found_out(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(Rows, "find", by_length)
    with pytest.raises(AssertionError):
        compare(open_all, ASKED[name], "right half of the time", 10)


@pytest.mark.parametrize("name", ["one vocabulary", "BPE and SPM", "CE of one vocabulary"])
def test_right_guesses_save_evaluations(open_all: OpenAll, name: str) -> None:
    """Fewer than two for three pieces, though some texts have borders that a vocabulary does not know."""
    written = compare(open_all, ASKED[name], "always right", 5)
    calls = sum(work.calls for running in written for work in running.work)
    assert calls < 2 * guessed(written)


def test_memories_that_cannot_be_cut_are_left_out(open_all: OpenAll) -> None:
    members = open_all(ASKED["other memories"].case)
    assert [member.foreseeing is not None for member in members] == [False, False, True, True]
    windows = open_all(case("swa"), swa_full=False)
    assert windows[0].foreseeing is None
    for running in compare(open_all, ASKED["other memories"], "always right", 3):
        assert [work.guessed for work in running.work[:2]] == [0, 0]


@pytest.mark.parametrize("fault", [RunError("it broke"), EvaluationInterruptedError("stopped")])
def test_a_reply_goes_on_after_a_guess_that_failed(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """The evaluation of a guess fails once its tokens are in the memory, but not in the mirror."""
    asked = ASKED["one vocabulary"]
    plain, guessing = (Engine(open_all(asked.case), asked.case.router, top_k) for _ in range(2))
    expected = begin(plain, asked, 1)
    pieces = rest(expected)
    found = begin(guessing, asked, 1, SOURCES["right half of the time"](expected.text, 1))
    decode, failed = Member._decode, []

    def failing(self: Member, parts: Any) -> int:
        code = decode(self, parts)
        if isinstance(parts[0].outputs, tuple) and len(failed) < 3:
            failed.append(len(parts[0].ids))
            raise fault
        return code

    monkeypatch.setattr(Member, "_decode", failing)
    written: Pieces = []
    while len(written) < len(pieces):
        try:
            written += rest(found, 1)
        except type(fault):
            assert found.text == expected.text[: len(found.text)]
            # The route's number of this step is gone, as it is without guesses: the reply begins anew.
            found = begin(guessing, asked, 1, SOURCES["right half of the time"](expected.text, 1))
            written = []
    assert written == pieces
    assert len(failed) == 3


def test_an_interrupted_guess_leaves_the_cache_right(open_all: OpenAll) -> None:
    (member,) = open_all(case("bpe_a"))
    assert member.foreseeing is not None
    ids = np.arange(5, 25, dtype=np.int32)
    with pytest.raises(EvaluationInterruptedError):
        member.foreseeing.foresee(ids[:10], ids[10:], (1, 5), lambda: True)
    _, rows = member.foreseeing.foresee(ids[:10], ids[10:], (1, 5))
    for row, length in zip(rows, (10, 11, 15), strict=True):
        member.sync(ids[:length])
        np.testing.assert_allclose(row, member.logits(), atol=1e-4)


def test_a_backlog_longer_than_a_batch_goes_first(open_all: OpenAll) -> None:
    (member,) = open_all(case("bpe_a"), n_batch=32)
    assert member.foreseeing is not None
    ids = 5 + np.arange(120, dtype=np.int32) % 90
    _, (row, last) = member.foreseeing.foresee(ids[:100], ids[100:], (20,))
    for found, length in ((row, 100), (last, 120)):
        member.sync(ids[:length])
        np.testing.assert_allclose(found, member.logits(), atol=1e-4)


def test_guesses_end_where_a_context_does(open_all: OpenAll) -> None:
    asked = replace(ASKED["one vocabulary"], case=case("bpe_a", "bpe_b", head=b"the cat " * 30))
    plain, guessing = (Engine(open_all(asked.case, n_ctx=256), asked.case.router, top_k) for _ in range(2))
    full = 0
    for seed in range(5):
        expected, pieces = begin(plain, asked, seed), []
        while (draw := expected.step()) and draw.number != END:
            pieces.append(draw.piece)
        found = begin(guessing, asked, seed, SOURCES["always right"](expected.text + b"the cat " * 9, seed))
        assert [piece for piece, _ in rest(found, len(pieces))] == pieces
        full += draw is None
        assert (found.step() is None) == (draw is None)
    assert full > 0


KNOWN = bytes(range(33, 127)) + bytes(range(128, 256))  # no byte twice


def test_repeats_follow_the_last_place_with_the_same_bytes() -> None:
    """Two in 2n are taken for granted, where n bytes agree: 1/11 + ... + 1/14 = 0.323 is below -ln 0.7 = 0.357."""
    source = Repeats(b"the quick cat. the quick brown fox jumps over the lazy dog. and ")
    source.append(b"the quick ")  # 11 bytes agree with those at the second place
    assert source.guess([], 9) == b"brow"
    source.append(b"brown")  # 1/16 + ... + 1/21 = 0.327
    assert source.guess([], 9) == b" fox j"
    source.append(b"!")
    assert source.guess([], 9) == b""


def test_too_few_bytes_are_no_guess() -> None:
    source = Repeats(KNOWN)
    source.append(KNOWN[:SHORTEST])  # 1/8 + 1/9 + 1/10 = 0.336 are three bytes, where 4 are worth it
    assert source.guess([], 9) == b""
    source.append(KNOWN[SHORTEST : SHORTEST + 2])  # 1/10 + ... + 1/13 = 0.351
    assert source.guess([], 9) == KNOWN[SHORTEST + 2 : SHORTEST + 6]
    source = Repeats(KNOWN, CHEAP)
    source.append(KNOWN[: SHORTEST - 1])
    assert source.guess([], 9) == b""
    source.append(KNOWN[SHORTEST - 1 : SHORTEST])
    assert len(source.guess([], 9)) > LEAST


def test_what_broke_off_before_is_counted() -> None:
    """Where 16 to 23 agree: 24 went on and 3 broke off, so that it is (3 + 2) / (24 + 2n) from then on.

    5/56 + ... + 5/62 = 0.339, and with 5/64 it would be 0.418.
    """
    source = Repeats(KNOWN)
    for start in (0, 40, 80):
        source.append(KNOWN[start : start + 16])
        source.append(KNOWN[start + 16 : start + 24] + b"\x00")  # seen as 8 bytes that agree, and one that does not
    source.append(KNOWN[:16])
    assert source.guess([], 9) == KNOWN[16:20]


def test_a_guess_is_longer_where_tokens_cost_less() -> None:
    lengths = []
    for sure in (DEAR, CHEAP):
        source = Repeats(KNOWN, sure)
        source.append(KNOWN[:40])
        lengths.append(len(source.guess([], 9)))
    assert lengths[1] > 2 * lengths[0] > 2 * LEAST


def test_a_guess_is_not_longer_than_the_longest() -> None:
    text = np.random.default_rng(1).bytes(1000)
    source = Repeats(text, CHEAP)
    source.append(text[:500])
    source.append(text[500:800])
    assert source.guess([], 9) == text[800 : 800 + LONGEST]


def test_guesses_by_the_option(open_ensemble: Callable[..., Ensemble]) -> None:
    """What a prompt shows and what was written are where they come from."""
    ensemble = open_ensemble("bpe_c", member='type_k = "f32"\ntype_v = "f32"')
    settings = Overrides(seed=3, max_tokens=120, temperature=0.0)
    plain = ensemble.generate("the cat sat on the mat", replace(settings, draft="none"))
    reply = ensemble.generate("the cat sat on the mat", replace(settings, draft="ngram"))
    assert reply.text == plain.text
    assert plain.guessed == 0 < reply.guessed
    assert reply.calls_per_piece < plain.calls_per_piece == 1
    assert reply.as_dict()["usage"]["calls_per_piece"] == reply.calls_per_piece


def test_members_that_are_left_out_are_named(open_ensemble: Callable[..., Ensemble]) -> None:
    ensemble = open_ensemble("bpe_a", "recurrent", top='[ensemble]\ndraft = "ngram"')
    assert [notice for notice in ensemble.notices if "guesses" in notice] == [
        "recurrent: it evaluates no guesses (draft): it runs elsewhere, or its memory cannot be cut back"
    ]
    assert ensemble.generate("the cat", Overrides(seed=1, max_tokens=20)).steps
    ensemble = open_ensemble("bpe_a", "recurrent")
    assert not any("guesses" in notice for notice in ensemble.notices)
