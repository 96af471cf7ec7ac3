"""Majority votes, worked out by hand."""

import itertools
import operator
from collections import Counter

import pytest

from me_local.evaluation.voting import Vote, vote


def decide(answers: dict[str, str | None], weights: dict[str, float], name: str = "t/1/0") -> Vote:
    return vote(answers, weights, operator.eq, name)


@pytest.mark.parametrize(
    ("answers", "weights", "winner"),
    [
        ("xxy", (1, 1, 1), "x"),
        ("xyy", (0.5, 0.3, 0.2), None),  # as much on both sides: drawn, below
        ("xyy", (0.6, 0.2, 0.2), "x"),
        ("xyy", (0.4, 0.3, 0.3), "y"),
        ("xyz", (0.3, 0.3, 0.4), "z"),
        ("xxyyy", (0.2, 0.2, 0.2, 0.2, 0.2), "y"),
    ],
)
def test_the_most_weight_wins(answers: str, weights: tuple[float, ...], winner: str | None) -> None:
    names = "abcde"[: len(answers)]
    decided = decide(dict(zip(names, answers, strict=True)), dict(zip(names, weights, strict=True)))
    assert decided.drawn == (winner is None)
    assert decided.winner == winner if winner else decided.winner in answers


def test_a_member_without_an_answer_abstains() -> None:
    weights = {"a": 0.8, "b": 0.1, "c": 0.1}
    assert decide({"a": None, "b": "x", "c": None}, weights) == Vote("x", {"x": 0.1}, False)
    assert decide({"a": None, "b": None, "c": None}, weights) == Vote(None, {}, False)


def test_weights_that_are_equal_but_for_rounding_are_a_tie() -> None:
    """0.1 + 0.2 is above 0.3 by a bit."""
    assert 0.1 + 0.2 > 0.3
    assert decide({"a": "x", "b": "x", "c": "y"}, {"a": 0.1, "b": 0.2, "c": 0.3}).drawn


def test_a_tie_repeats_itself_and_knows_no_order() -> None:
    answers: dict[str, str | None] = {"a": "x", "b": "y", "c": "z"}
    weights = dict.fromkeys("abc", 1 / 3)
    for name in map(str, range(20)):
        orders = [dict(order) for order in itertools.permutations(answers.items())]
        assert len({decide(order, weights, name).winner for order in orders}) == 1
        exchanged: dict[str, str | None] = {"a": "z", "b": "x", "c": "y"}
        assert decide(exchanged, weights, name).winner == decide(answers, weights, name).winner


def test_ties_are_drawn_evenly() -> None:
    """Over 3,000 questions each of three answers wins a third, within 5 standard deviations of 26.

    The names are fixed, so that this cannot fail by chance.
    """
    weights = dict.fromkeys("abc", 1 / 3)
    won = Counter(decide({"a": "x", "b": "y", "c": "z"}, weights, f"t/{i}/0").winner for i in range(3000))
    assert sorted(won, key=str) == ["x", "y", "z"]
    assert all(abs(count - 1000) < 130 for count in won.values())


def test_answers_that_are_the_same_stand_behind_each_other() -> None:
    """1.0 and 1.1 are the same within 0.15, and so are 1.1 and 1.2: the one in the middle has all weight."""

    def near(one: str, other: str) -> bool:
        return abs(float(one) - float(other)) <= 0.15

    decided = vote({"a": "1.0", "b": "1.1", "c": "1.2", "d": "9"}, dict.fromkeys("abcd", 0.25), near, "t")
    assert decided == Vote("1.1", {"1.0": 0.5, "1.1": 0.75, "1.2": 0.5, "9": 0.25}, False)
    pair = vote({"a": "1.0", "b": "1.1", "c": "9"}, {"a": 0.3, "b": 0.3, "c": 0.4}, near, "t")
    assert pair.winner in ("1.0", "1.1")
    assert not pair.drawn
