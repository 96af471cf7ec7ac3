"""Majority vote: the answer that has most of the members' weight behind it. Knows answers alone, not their order."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_ROUNDING = 1e-9
"""Weights are sums of rounded numbers: 0.2 and 0.3 are as much as 0.5."""


@dataclass(frozen=True, slots=True)
class Vote:
    """The answer that won, None where no member has one; `weights` of all answers, and whether it won by a draw."""

    winner: str | None
    weights: dict[str, float]
    drawn: bool


def vote(
    answers: Mapping[str, str | None], weights: Mapping[str, float], same: Callable[[str, str], bool], name: str
) -> Vote:
    """What the `answers` of members come to; a member that has found none abstains.

    An answer's weight is that of all members whose answer is the `same`. Where several have the most, one of them is
    drawn by a number that follows from the answer and the `name` of the question: so it repeats itself, prefers no
    member, and does not depend on the order of anything.
    """
    given = {member: answer for member, answer in answers.items() if answer is not None}
    behind = {
        answer: math.fsum(weights[member] for member, other in given.items() if same(answer, other))
        for answer in sorted(set(given.values()))
    }
    most = max(behind.values(), default=0.0)
    best: list[str] = []
    for answer, weight in behind.items():
        if math.isclose(weight, most, rel_tol=_ROUNDING) and not any(same(answer, other) for other in best):
            best.append(answer)
    winner = min(best, key=lambda answer: hashlib.sha256(f"{name}/{answer}".encode()).digest(), default=None)
    return Vote(winner, behind, len(best) > 1)
