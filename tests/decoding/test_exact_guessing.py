"""Whole replies that are written with guesses have exactly the probabilities that the definition gives them.

As in test_exact_replies.py and test_exact_words.py, with their trees and odds of a false alarm, and with a source that
is right half of the time. A guess that is right is what the same seed gives without guesses. A member that remembers
its logits gives those that a guess asks for in advance, too: after the ids that it was asked for, and after no others.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from selection import slow_but
from test_exact_replies import (
    EXACT,
    SETTINGS,
    OpenAll,
    Remembered,
    Reply,
    Tree,
    by_last_byte,
    case,
    g_test,
    remembered_top_k,
    reply_of,
)
from test_exact_words import WordTree
from test_guessing import Asked, Knowing, begin, by_length

from me_local.arrays import IntArray
from me_local.decoding.engine import Engine
from me_local.decoding.planning import Rows
from me_local.llama.member import Member
from me_local.mixture.alignment import top_k
from me_local.model import Evaluated, Row

COUNT = 4_000  # replies of a case
CASES = {
    "ME": Asked(case("bpe_c", "spm", temperature=1.3, top_k=5)),
    "one vocabulary": Asked(case("bpe_a", "bpe_b")),
    "CE": Asked(case("bpe_c", "spm", temperature=0.7), "ce"),
    "words": Asked(case("bpe_b", "spm", temperature=0.5, top_k=4, head=b"x", length=5), unit="word"),
    "router": Asked(case("bpe_c", "spm", router=by_last_byte, weights=(0.1, 0.9))),
    "temperature 0": Asked(case("bpe_c", "spm", temperature=0.0)),
    "top-p": Asked(case("bpe_a", "bpe_c", top_k=0, top_p=0.7, length=2)),
}


class Foreseeing(Remembered):
    """A remembered member that evaluates guesses."""

    ahead = 8

    def __init__(self, member: Member) -> None:
        super().__init__(member)
        self.guesses = 0

    @property
    def foreseeing(self) -> "Foreseeing":
        return self

    def foresee(
        self, ids: IntArray, guess: IntArray, wanted: Sequence[int], interrupted: Callable[[], bool]
    ) -> tuple[Evaluated, list[Row]]:
        self.guesses += 1
        return Evaluated(0, 0.0), [self._after(np.concatenate([ids, guess[:count]])) for count in (0, *wanted)]

    def _after(self, ids: IntArray) -> Row:
        self.sync(ids, lambda: False, final=0)
        return self.logits()


@pytest.fixture
def open_all(open_member: Callable[..., Member]) -> OpenAll:
    """The members of a case."""
    return lambda this: [open_member(name, **SETTINGS) for name in this.names]


def draw(open_all: OpenAll, asked: Asked, count: int) -> tuple[Counter[Reply], int]:
    """Replies with guesses, and how many predictions came out of these."""
    this = asked.case
    align = top_k if asked.unit == "word" else remembered_top_k()
    engine = Engine([Foreseeing(member) for member in open_all(this)], this.router, align)
    drawn: Counter[Reply] = Counter()
    guessed = 0
    for seed in range(count):
        plain = begin(engine, asked, seed)
        reply_of(plain, engine.unified.same, this.length)
        running = begin(engine, asked, seed, Knowing(plain.text + b" the end", seed, 0.5))
        drawn[reply_of(running, engine.unified.same, this.length)] += 1
        guessed += sum(work.guessed for work in running.work)
    return drawn, guessed


def tree_of(open_all: OpenAll, asked: Asked) -> Tree:
    return (WordTree if asked.unit == "word" else Tree)(open_all(asked.case), asked.case)


@pytest.mark.parametrize("name", slow_but(CASES, "temperature 0"))
def test_replies_with_guesses_have_the_probabilities_of_the_definition(open_all: OpenAll, name: str) -> None:
    count = 200 if name == "temperature 0" else COUNT
    drawn, guessed = draw(open_all, CASES[name], count)
    tree = tree_of(open_all, CASES[name])
    assert guessed > count / 10
    assert [reply for reply in drawn if not tree.possible(reply)] == []
    assert g_test(drawn, tree.cells(count)) > EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ME", "CE", "words"])
def test_logits_after_other_ids_would_be_found_out(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(Rows, "find", by_length)
    drawn, _ = draw(open_all, CASES[name], COUNT)
    tree = tree_of(open_all, CASES[name])
    impossible = [reply for reply in drawn if not tree.possible(reply)]
    assert impossible or g_test(drawn, tree.cells(COUNT)) < EXACT
