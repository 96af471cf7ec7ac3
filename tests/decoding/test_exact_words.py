"""Whole replies by words have exactly the probabilities of the mixture over words.

As in test_exact_replies.py, but for `unit = "word"`: the tree of replies is worked out from the definition, word by
word. A reply is cut into words, and each word has the probability Σ_j λ_j P_j(word), where P_j is a product of j's
predictions for its pieces and, where another word follows, of the probability that the word is over. 20,000 replies of
the product are then compared with the tree by a G-test; odds of a false alarm are at most 1e-6 for each. Engines that
draw words wrongly on purpose have to fail.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_exact_replies import (
    COUNT,
    EXACT,
    SETTINGS,
    Case,
    OpenAll,
    Remembered,
    Reply,
    Tree,
    case,
    check,
    draw,
    g_test,
    tiny,
    truncated,
)

from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.decoding import strategies
from me_local.decoding.engine import Course, Draw, Engine
from me_local.decoding.generation import Generation
from me_local.decoding.strategies import Sampler
from me_local.llama.member import Member
from me_local.mixture.alignment import Distribution, top_k
from me_local.mixture.words import Openings
from me_local.sampling import Sampling

__all__ = ["tiny"]

SPACE = b" \t\n\r\x0b\x0c"
Piece = bytes | int | None
LONG = b"a-" * 29 + b"bcd"  # 61 bytes: a word that becomes long in the reply


def by_last_letter(text: bytes, weights: FloatArray) -> FloatArray:
    """Weights that depend on the text where words start, the first member having none behind a vowel."""
    return np.array([0.0, 1.0] if text[-1:] in b"aeiou" else [3.0, 1.0])


CASES = {
    "BPE and BPE": case("bpe_a", "bpe_c", temperature=0.7, weights=(0.3, 0.7)),
    "BPE and SPM": case("bpe_b", "spm", temperature=0.5, top_k=4, head=b"x", length=5),
    "one vocabulary": case("bpe_a", "bpe_b", temperature=0.5),
    "three members": case("bpe_b", "bpe_c", "spm", weights=(0.5, 0.2, 0.3), temperature=0.7, top_k=5),
    "top-k leaves no piece that begins a word": case("bpe_c", "spm", top_k=2, length=5),
    "temperature 0": case("bpe_c", "spm", temperature=0.0, length=5),
    "top-p": case("bpe_a", "bpe_c", top_k=0, top_p=0.7, length=2),
    "each its own": case("bpe_a", "spm", weights=(0.3, 0.7), sampling=(Sampling(0.5), Sampling(1.3, top_p=0.8))),
    "router": case("bpe_c", "spm", router=by_last_letter, temperature=0.7, head=b"def count("),
    "a head that ends with a space": case("bpe_c", "spm", head=b"the cat ", temperature=0.7),
    "a head of Han characters": case("bpe_c", "spm", head="说明书".encode(), temperature=0.7),
    "a long word": case("bpe_c", "spm", head=LONG, temperature=0.7),
    "lacking bytes": case("bpe_c", "lacking", head="é".encode(), temperature=1.3),
}
BROKEN = case("bpe_b", "spm", temperature=0.7, top_k=5, head=b"x")


def remembering(members: Sequence[Member], this: Case) -> Engine:
    known: dict[tuple[int, int], Distribution] = {}

    def align(logits: LogitArray, numbers: IntArray, sampling: Sampling) -> Distribution:
        key = id(logits), id(numbers)
        if key not in known:
            known[key] = top_k(logits, numbers, sampling)
        return known[key]

    return Engine([Remembered(member) for member in members], this.router, align)


class WordTree(Tree):
    """The probabilities of all replies of a case by the definition of the mixture over words."""

    def __init__(self, members: Sequence[Member], this: Case) -> None:
        super().__init__(members, this)
        self._single: dict[tuple[int, Reply], dict[Piece, float]] = {}
        self._opening: dict[tuple[int, Reply], dict[Piece, float]] = {}
        self._beginning: dict[Reply, float] = {(): 1.0}
        self._next: dict[Reply, dict[Piece, float]] = {}
        self.fallbacks = 0

    def following(self, reply: Reply) -> dict[Piece, float]:
        if reply not in self._next:
            before = self.probability(reply)
            pieces = {p for j in range(len(self._members)) if self.able(j, reply) for p in self.aligned(j, reply)}
            if self.may_end(reply):
                pieces |= {p for j in self.able_members(reply) for p in self.opening(j, reply)}
            found = {piece: self.probability((*reply, piece)) / before for piece in pieces}
            self._next[reply] = {piece: probability for piece, probability in found.items() if probability > 0}
        return self._next[reply]

    def probability(self, reply: Reply) -> float:
        """That a reply begins so: of the last word, that of its finished part."""
        if reply not in self._beginning:
            self._beginning[reply] = self._sum(reply, 0, -1)
        return self._beginning[reply]

    def _sum(self, reply: Reply, at: int, writer: int) -> float:
        """The probability of what follows the first `at` pieces, with a word that starts there.

        Where a word ends may depend on whether its writer can go on, so that the sum over writers is taken first.
        """
        if at == len(reply):
            return 1.0
        text = reply[:at]
        conditioned = writer >= 0 and not self.free(writer, text)
        total = 0.0
        for j, weight in enumerate(self.weights(self.text(text))):
            if weight:
                first = (self.opening if conditioned else self.aligned)(j, text)
                total += weight * self._word(reply, at, j, first.get(reply[at], 0.0))
        return total

    def _word(self, reply: Reply, at: int, j: int, probability: float) -> float:
        """The probability that j writes the piece at `at`, with this probability, and of all that follows."""
        if probability == 0:
            return 0.0
        end = at + 1
        while end < len(reply) and not self.free(j, reply[:end]):
            if self.begins(reply[end]) and self.may_end(reply[:end]):
                over = sum(p for piece, p in self.aligned(j, reply[:end]).items() if self.begins(piece))
                return probability * over * self._sum(reply, end, j) if over else 0.0
            probability *= self.aligned(j, reply[:end]).get(reply[end], 0.0)
            end += 1
        return probability * self._sum(reply, end, j)

    def able(self, j: int, reply: Reply) -> bool:
        return self._same or set(strays(self.text(reply))) <= set(self._members[j].vocabulary.pieces)

    def able_members(self, reply: Reply) -> list[int]:
        return [j for j in range(len(self._members)) if self.able(j, reply)]

    def free(self, j: int, reply: Reply) -> bool:
        """Whether a border stands after this text, for all who see it or because j cannot go on."""
        if not self.able(j, reply):
            return True
        text = self.text(reply)
        if in_character(text):
            return False
        if text.decode(errors="replace")[-1:] > "\u2e80":  # in the tiny vocabularies: Han and kana, and no other such
            return text.decode(errors="replace")[-1:] < "\ufff0"
        starts = [0]
        for i in range(1, len(text)):
            han = text[:i].decode(errors="ignore")[-1:] > "\u2e80" and not in_character(text[:i])
            if han or (text[i] in SPACE and text[i - 1] not in SPACE):
                starts.append(i)
        return len(text) - starts[-1] >= 64

    def may_end(self, reply: Reply) -> bool:
        return self.text(reply)[-1:] not in [bytes([space]) for space in SPACE]

    def begins(self, piece: Piece) -> bool:
        text = self._members[0].vocabulary.pieces[piece] if isinstance(piece, int) else piece
        return text is None or (text != b"" and text[0] in SPACE)

    def aligned(self, j: int, reply: Reply) -> dict[Piece, float]:
        if (j, reply) not in self._single:
            self._single[j, reply] = self._aligned(self._members[j], reply, self._case.sampling[j])
        return self._single[j, reply]

    def opening(self, j: int, reply: Reply) -> dict[Piece, float]:
        """What j may begin a word with."""
        if (j, reply) not in self._opening:
            kept = {piece: p for piece, p in self.aligned(j, reply).items() if self.begins(piece)}
            if not sum(kept.values()):
                self.fallbacks += 1
                kept = self._restricted(j, reply)
            self._opening[j, reply] = {piece: p / sum(kept.values()) for piece, p in kept.items()}
        return self._opening[j, reply]

    def _restricted(self, j: int, reply: Reply) -> dict[Piece, float]:
        """The alignment of the logits of pieces that begin a word."""
        member, sampling = self._members[j], self._case.sampling[j]
        pieces, ends = member.vocabulary.pieces, member.vocabulary.end_ids
        named: dict[int, Piece] = {i: i if self._same else piece for i, piece in enumerate(pieces) if piece}
        named |= dict.fromkeys(ends)
        logits = self._logits(member, reply)
        ids = sorted((i for i, piece in named.items() if self.begins(piece)), key=lambda i: -logits[i])
        found: defaultdict[Piece, float] = defaultdict(float)
        for i, probability in zip(ids, truncated([logits[i] for i in ids], sampling), strict=False):
            found[named[i]] += probability
        return found


def strays(text: bytes) -> list[bytes]:
    """Bytes that are not part of a whole character."""
    return [bytes([ord(c) - 0xDC00]) for c in text.decode(errors="surrogateescape") if "\udc80" <= c <= "\udcff"]


def in_character(text: bytes) -> bool:
    """Whether the last bytes are the beginning of a character: some others would complete it."""
    for length in range(1, 4):
        tail = text[-length:]
        for rest in (b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xa0\x80", b"\x90\x80\x80"):
            whole = (tail + rest).decode(errors="ignore")
            if len(whole) == 1 and len(whole.encode()) == length + len(rest):
                return True
    return False


def by_words(ensemble: Engine, this: Case, count: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replies of the product by words."""
    begin = Generation.__init__

    def with_words(self: Generation, engine: Engine, request: Any, interrupted: Callable[[], bool]) -> None:
        begin(self, engine, replace(request, unit="word"), interrupted)

    with monkeypatch.context() as patch:
        patch.setattr(Generation, "__init__", with_words)
        return draw(ensemble, this, "me", count)


@pytest.fixture
def open_all(open_member: Callable[..., Member]) -> OpenAll:
    """The members of a case."""
    return lambda this: [open_member(name, **SETTINGS) for name in this.names]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_replies_have_the_probabilities_of_the_definition(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    this = CASES[name]
    check(by_words(remembering(open_all(this), this), this, COUNT, monkeypatch), WordTree(open_all(this), this))


def test_top_k_often_leaves_no_piece_that_begins_a_word(open_all: OpenAll) -> None:
    this = CASES["top-k leaves no piece that begins a word"]
    tree = WordTree(open_all(this), this)
    tree.cells()
    assert tree.fallbacks > 20


def keeps_the_dropped_piece(patch: pytest.MonkeyPatch) -> None:
    step = Sampler._step_in_word

    def kept(self: Sampler, writer: int, weights: FloatArray) -> Course[Draw]:
        draws: list[Draw] = []
        write = self._write

        def noted(member: int) -> Course[Draw]:
            draws.append((yield from write(member)))
            return draws[-1]

        patch.setattr(self, "_write", noted, raising=False)
        drawn = yield from step(self, writer, weights)
        return draws[0]._replace(member=drawn.member)

    patch.setattr(Sampler, "_step_in_word", kept)


def follows_without_a_condition(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sampler, "_open_word", Sampler._predict)


def restricts_before_it_truncates(patch: pytest.MonkeyPatch) -> None:
    """A definition too, but then the piece of a writer that goes on must be drawn anew."""
    patch.setattr(Openings, "condition", lambda self, distribution: None)


def words_end_at_every_piece(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(strategies, "is_free", lambda text: True)


def space_ends_a_word_behind_space(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(strategies, "may_end", lambda text: True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        keeps_the_dropped_piece,
        follows_without_a_condition,
        restricts_before_it_truncates,
        words_end_at_every_piece,
        space_ends_a_word_behind_space,
    ],
)
def test_a_broken_engine_is_found_out(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    drawn = by_words(remembering(open_all(BROKEN), BROKEN), BROKEN, COUNT // 2, monkeypatch)
    assert g_test(drawn, WordTree(open_all(BROKEN), BROKEN).cells(COUNT // 2)) < EXACT
