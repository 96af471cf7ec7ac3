"""A guess of what follows, evaluated together with what a member's cache lacks, by one call of llama.cpp."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from me_local.arrays import IntArray, LogitArray
from me_local.llama.batch import Part
from me_local.llama.sequences import Context
from me_local.llama.weights import Weights
from me_local.model import Evaluated, EvaluationInterruptedError, Row

GUESS = 24
"""Tokens of the longest guess."""


class Syncing(Context, Protocol):
    """What it needs of a member."""

    name: str
    seconds: float
    weights: Weights
    on_gpu: bool

    def sync(self, ids: IntArray, interrupted: Callable[[], bool] = ...) -> Evaluated:
        """Make the first cache hold exactly `ids`."""

    def whole_row(self, index: int) -> LogitArray:
        """All logits after one of the tokens of the last evaluation."""


class Foresight:
    """Evaluates guesses of at most `ahead` tokens with the first sequence of a member.

    `size` is that of its model, in bytes; `picks`: without guesses only the largest logits leave the GPU.
    """

    def __init__(self, member: Syncing, ahead: int) -> None:
        self._member = member
        self.ahead = ahead
        self.size = member.weights.size
        self.picks = member.on_gpu

    def foresee(
        self,
        ids: IntArray,
        guess: IntArray,
        wanted: Sequence[int],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> tuple[Evaluated, list[Row]]:
        """Make the cache hold `ids` and a guess of what follows; copies of logits after both.

        The first are those after `ids`, the others those after so many tokens of the guess as `wanted` has. The next
        `sync` takes back what was wrong. Raises what `Member.sync` raises.
        """
        member = self._member
        with member.use():
            member.require_open()
            cache, before = member.caches[0], member.seconds
            whole = np.concatenate([ids, guess])
            keep = cache.cut(cache.common(ids, len(ids) - 1))
            if len(whole) - keep > member.n_batch:  # what one call cannot take goes first
                member.sync(ids[:-1], interrupted)
            start = cache.length
            if interrupted():
                raise EvaluationInterruptedError(f'member "{member.name}": stopped at token {start} of {len(ids)}')
            outputs = tuple(len(ids) - 1 - start + count for count in (0, *wanted))
            member.evaluate([Part(cache, whole[start:], outputs)])
            rows: list[Row] = [member.whole_row(index).copy() for index in outputs]
            return Evaluated(len(whole) - keep, member.seconds - before), rows
