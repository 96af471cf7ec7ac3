"""Whole replies that are written with guesses have exactly the probabilities that the definition gives them.

As in test_exact_replies.py and test_exact_words.py, with their trees and odds of a false alarm, and with sources that
are always right, right half of the time, and always wrong. A guess that is right is what the same seed gives without
guesses. A member that remembers its logits gives those that a guess asks for in advance, too: after the ids that it was
asked for, and after no others. Which predictions a source that is right can bring is worked out from the ids alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    start,
)
from test_exact_words import WordTree
from test_guessing import SOURCES, Asked, begin, by_length, guessed

from me_local.arrays import IntArray
from me_local.decoding.engine import Engine
from me_local.decoding.generation import Generation
from me_local.decoding.planning import Rows
from me_local.llama.member import Member
from me_local.mixture.alignment import top_k
from me_local.model import Evaluated, Row

COUNT = 4_000  # replies of a case
BROKEN_COUNT = 500  # of one that is broken
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


class Ask(NamedTuple):
    """A member, its context, and the text, where its logits were needed."""

    member: int
    ids: list[int]
    text: bytes


def noted(running: Generation) -> list[Ask]:
    """What a reply is going to ask for, as it does."""
    asks: list[Ask] = []
    bring = running._bring

    def note(members: Sequence[int]) -> dict[int, Row]:
        asks.extend(Ask(member, running.ids(member).tolist(), running.text) for member in members)
        return bring(members)

    running._bring = note  # type: ignore[method-assign]
    return asks


def known_ahead(engine: Engine, asks: Sequence[Ask], whole: bytes) -> int:
    """How many of the predictions a member could have given when it was asked before, with the whole text known."""
    return sum(any(leads_to(engine, before, ask, whole) for before in asks[:at]) for at, ask in enumerate(asks))


def leads_to(engine: Engine, before: Ask, ask: Ask, whole: bytes) -> bool:
    """Whether both contexts are beginnings of the one that the member would have after the whole text."""
    if before.member != ask.member or len(before.ids) >= len(ask.ids):
        return False
    model = engine.models[ask.member]
    if engine.unified.same:
        ids = before.ids + model.vocabulary.canonical(whole[len(before.text) :])
    else:
        ids = start(model) + model.vocabulary.encode(whole, at_start=True)
    return all(ids[: len(each.ids)] == each.ids for each in (before, ask))


@dataclass
class Drawn:
    """Replies with guesses; of the predictions those out of guesses, and those that may be; evaluations, guesses."""

    replies: Counter[Reply] = field(default_factory=Counter)
    guessed: int = 0
    known: int = 0
    calls: int = 0
    guesses: int = 0

    def are_of(self, source: str) -> bool:
        """Whether this is what comes of a source.

        One that is right brings what can be known, but where pieces are not the tokens that a plan takes them for. One
        that is wrong brings something only where the first token of its guess is right by chance.
        """
        if source == "always right":
            return 0.95 * self.known <= self.guessed <= self.known
        if source == "always wrong":
            return self.guessed < self.known / 30 and self.guesses > 0.8 * self.calls
        return 0.5 * self.known < self.guessed < 0.9 * self.known


Texts = dict[tuple[str, int], bytes]


@pytest.fixture(scope="module")
def texts() -> Texts:
    """The texts of replies without guesses, by case and seed: what a source knows."""
    return {}


def draw(open_all: OpenAll, texts: Texts, name: str, source: str, count: int) -> Drawn:
    asked, this, drawn = CASES[name], CASES[name].case, Drawn()
    align = top_k if asked.unit == "word" else remembered_top_k()
    members = [Foreseeing(member) for member in open_all(this)]
    engine = Engine(members, this.router, align)
    for seed in range(count):
        if (name, seed) not in texts:
            plain = begin(engine, asked, seed)
            reply_of(plain, engine.unified.same, this.length)
            texts[name, seed] = plain.text + b" the end"
        running = begin(engine, asked, seed, SOURCES[source](texts[name, seed], seed))
        asks = noted(running)
        drawn.replies[reply_of(running, engine.unified.same, this.length)] += 1
        drawn.known += known_ahead(engine, asks, texts[name, seed])
        drawn.guessed += guessed([running])
        drawn.calls += sum(work.calls for work in running.work)
    drawn.guesses = sum(member.guesses for member in members)
    return drawn


def tree_of(open_all: OpenAll, asked: Asked) -> Tree:
    return (WordTree if asked.unit == "word" else Tree)(open_all(asked.case), asked.case)


@pytest.mark.parametrize("source", ["always right", "right half of the time", "always wrong"])
@pytest.mark.parametrize("name", slow_but(CASES, "temperature 0"))
def test_replies_with_guesses_have_the_probabilities_of_the_definition(
    open_all: OpenAll, texts: Texts, name: str, source: str
) -> None:
    count = 200 if name == "temperature 0" else COUNT
    drawn = draw(open_all, texts, name, source, count)
    tree = tree_of(open_all, CASES[name])
    assert drawn.are_of(source)
    assert [reply for reply in drawn.replies if not tree.possible(reply)] == []
    assert g_test(drawn.replies, tree.cells(count)) > EXACT


keep = Rows.keep


def one_late(
    rows: Rows, member: int, ids: IntArray, guess: IntArray, counts: Sequence[int], found: Sequence[Row]
) -> None:
    """What `keep` would do if it took each row for that of the next position, and the last for that of the first."""
    keep(rows, member, ids, guess, counts, [*found[-1:], *found[:-1]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("always right", {"keep": one_late}),
        ("right half of the time", {"find": by_length}),
        ("always wrong", {"find": by_length}),
    ],
)
@pytest.mark.parametrize("name", ["ME", "CE", "words"])
def test_logits_after_other_ids_would_be_found_out(
    open_all: OpenAll, texts: Texts, monkeypatch: pytest.MonkeyPatch, name: str, source: str, fault: dict[str, Any]
) -> None:
    for method, broken in fault.items():
        monkeypatch.setattr(Rows, method, broken)
    drawn = draw(open_all, texts, name, source, BROKEN_COUNT)
    tree = tree_of(open_all, CASES[name])
    impossible = [reply for reply in drawn.replies if not tree.possible(reply)]
    assert impossible or g_test(drawn.replies, tree.cells(BROKEN_COUNT)) < EXACT
