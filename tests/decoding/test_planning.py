"""Plans follow a guess as the reply is going to be written: by the same members, at the same places.

With a constraint, members are not asked for bytes that are forced, and these take one number of the route.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, takewhile

import llguidance
import numpy as np
import pytest
from selection import slow_but
from test_exact_replies import case
from test_guessing import LENGTH, SOURCES, Asked, OpenAll, begin, compare, foreseeable, guessed, open_all, rest

from me_local.config import Constraint
from me_local.decoding.engine import FORCED, Engine
from me_local.decoding.generation import Generation
from me_local.decoding.guessing import Source
from me_local.decoding.planning import Planner, Trail, Trails
from me_local.errors import RunError
from me_local.mixture.alignment import top_k
from me_local.text import constraints
from me_local.text.constraints import Matcher
from me_local.text.unified import END

__all__ = ["open_all"]

NUMBERED = Constraint("regex", "([a-z]{1,3} 123, ){12}")  # behind the space, and behind three letters, all is forced
SCHEMA = Constraint(
    "json_schema",
    '{"type":"object","properties":{"name":{"type":"string","pattern":"^[a-z ]{3,12}$"},"kind":{"enum":["cat","dog"]},'
    '"n":{"type":"integer","minimum":8,"maximum":1200}},"required":["name","kind","n"],"additionalProperties":false}',
)
TWO = case("bpe_c", "spm")
ASKED = {
    "one vocabulary": Asked(case("bpe_a", "bpe_b"), constraint=NUMBERED),
    "BPE and SPM": Asked(TWO, constraint=NUMBERED),
    "CE": Asked(TWO, "ce", constraint=NUMBERED),
    "words": Asked(TWO, unit="word", constraint=NUMBERED),
    "a schema, one vocabulary": Asked(case("bpe_a", "bpe_b"), constraint=SCHEMA),
    "a schema": Asked(TWO, constraint=SCHEMA),
    "a schema, CE": Asked(TWO, "ce", constraint=SCHEMA),
    "a schema, words": Asked(TWO, unit="word", constraint=SCHEMA),
}
SEEDS = 50
STATES = 300
BRANCHING = Constraint("regex", "[ab]*a[ab]{12}")  # each text has a state of its own


@pytest.mark.slow
@pytest.mark.parametrize("source", ["always right", "always wrong"])
@pytest.mark.parametrize("name", ASKED)
def test_replies_with_forced_bytes_do_not_depend_on_guesses(open_all: OpenAll, name: str, source: str) -> None:
    right = source == "always right"
    written = compare(open_all, ASKED[name], source, SEEDS if right else 10)
    assert guessed(written) > foreseeable(written) / 3 if right else guessed(written) < foreseeable(written) / 20


def asked(engine: Engine, this: Asked, seed: int) -> tuple[bytes, dict[int, int]]:
    """The text of a reply, and who wrote the piece behind so many bytes; FORCED: nobody."""
    running, members = begin(engine, this, seed), dict[int, int]()
    for _ in range(LENGTH):
        at, draw = len(running.text), running.step()
        assert draw is not None
        members[at] = draw.member
        if draw.number == END:
            break
    return running.text, members


@pytest.mark.parametrize("name", slow_but(["one vocabulary", "BPE and SPM", "a schema"], "one vocabulary"))
def test_a_plan_names_the_members_that_are_asked(open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Up to where the reply has other pieces than the tokens of its text."""
    this, route, plans = ASKED[name], Planner._route, list[list[tuple[int, int]]]()

    def noted(self: Planner, member: int, trail: Trail) -> Iterator[tuple[int, int]]:
        start = len(self.text.whole)
        walk = [(member, 0), *route(self, member, trail)]
        plans.append([(start + offset, planned) for planned, offset in walk])
        return iter(walk[1:])

    monkeypatch.setattr(Planner, "_route", noted)
    engine = Engine(open_all(this.case), this.case.router, top_k)
    behind_forced = 0
    for seed in range(10):
        text, members = asked(engine, this, seed)
        due = [at for at, member in members.items() if member != FORCED]
        forced_before = {at for before, at in pairwise(members) if members[before] == FORCED}
        plans.clear()
        rest(begin(engine, this, seed, SOURCES["always right"](text, seed)))
        for plan in plans:
            places = due[due.index(plan[0][0]) :]
            agreed = list(takewhile(lambda both: both[0][0] == both[1], zip(plan, places, strict=False)))
            assert [member for (_, member), _ in agreed] == [members[at] for _, at in agreed]
            behind_forced += sum(at in forced_before for _, at in agreed[1:])
    assert behind_forced > 10


@pytest.mark.parametrize("name", slow_but(["one vocabulary", "BPE and SPM"], "one vocabulary"))
def test_plans_that_know_of_forced_bytes_save_evaluations(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    written = compare(open_all, ASKED[name], "always right", 10)
    monkeypatch.setattr(Trails, "of", lambda self, text, guess: Trail(guess, None))
    blind = compare(open_all, ASKED[name], "always right", 10)
    assert guessed(written) > 1.2 * guessed(blind)
    assert tokens(written) < 0.8 * tokens(blind)


def tokens(written: list[Generation]) -> int:
    return sum(work.text_tokens for running in written for work in running.work)


def trail(guess: str, constraint: Constraint) -> Trail:
    return Trail(guess.encode(), constraints.start(constraint))


def test_a_trail_goes_on_behind_what_is_forced() -> None:
    along = trail("ab 123, abc 123, ", NUMBERED)
    assert along.asked(2) == (2, 0)  # a letter may come, or the space
    assert along.asked(3) == (8, 1)
    assert along.asked(11) == (17, 1)  # three letters
    ending = trail("no and no", Constraint("choice", '["no and no", "yes"]'))
    assert ending.asked(1) is None  # all else is forced, and then the end


def test_a_guess_is_cut_where_it_breaks_the_constraint() -> None:
    assert trail("abcd", NUMBERED).asked(4) is None
    assert trail("ab 124", NUMBERED).asked(3) is None  # other bytes than those that are forced
    assert trail("ab 12", NUMBERED).asked(3) is None  # not all of them
    assert trail("ab!", NUMBERED).asked(2) == (2, 0)


def test_nothing_is_forced_inside_of_a_character() -> None:
    along = trail("né!", Constraint("choice", '["né!", "n"]'))
    assert along.asked(1) == (1, 0)
    assert along.asked(2) == (2, 0)
    assert along.asked(3) is None


class Rambling:
    """A source that guesses other letters each time."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(1)

    def append(self, piece: bytes) -> None:
        """What is written has no effect on it."""

    def guess(self, asked: Sequence[int], most: int) -> bytes:
        return self._random.choice(list(b"ab"), 30).astype(np.uint8).tobytes()


def test_guesses_do_not_use_up_the_states_of_a_constraint(open_all: OpenAll, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit that the reply keeps to; guesses of other texts go beyond it."""
    limit_states(monkeypatch)
    this = Asked(case("bpe_a", "bpe_b"), constraint=BRANCHING)
    engine = Engine(open_all(this.case), this.case.router, top_k)
    assert rest(begin(engine, this, 1, Rambling())) == rest(begin(engine, this, 1))
    with pytest.raises(RunError, match="states"):
        use_up(constraints.start(this.constraint), Rambling())


def limit_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give constraints few states."""
    limited = partial(llguidance.LLMatcher, limits=llguidance.LLParserLimits(max_lexer_states=STATES))
    limited.grammar_from_regex = llguidance.LLMatcher.grammar_from_regex
    monkeypatch.setattr(llguidance, "LLMatcher", limited)


def use_up(matcher: Matcher, source: Source) -> None:
    """Follow some guesses by copies of the matcher itself."""
    for _ in range(LENGTH):
        matcher.copy().append(source.guess([], 9))
        matcher.following()
