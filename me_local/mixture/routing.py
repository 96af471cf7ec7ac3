"""Which member writes the next piece: the weights for this step, and the random draw."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from me_local.arrays import FloatArray
from me_local.errors import RunError

log = logging.getLogger(__name__)


class Router(Protocol):
    """Weights of the members for the next piece, a function of the text alone.

    A package provides one through the entry-point group `me_local.routers`.
    """

    def __call__(self, text: bytes, weights: FloatArray) -> FloatArray:
        """`text` is what stands before the piece (a raw prompt included); `weights` float64 (members,), sum 1, are
        the configured ones. Returns float64 (members,), not negative; they need not sum to 1.
        """


def constant(text: bytes, weights: FloatArray) -> FloatArray:
    """The configured weights, whatever the text."""
    return weights


def route(router: Router, text: bytes, weights: FloatArray, able: Sequence[bool]) -> FloatArray:
    """The router's weights, zero for members that cannot represent the text, normalised: float64 (members,).

    Raises RunError when the router gives no usable weights, or when no member is left.
    """
    if router is constant and all(able):
        return weights
    try:
        wanted = np.asarray(router(text, weights), dtype=np.float64)
    except Exception as error:  # whatever the router of another package may raise
        log.debug("router failed", exc_info=True)
        raise RunError(f"the router failed after {len(text)} bytes of text: {error}") from None
    if wanted.shape != weights.shape or not np.isfinite(wanted).all() or (wanted < 0).any():
        raise RunError(f"the router gave {wanted.tolist()}: not one weight, 0 or more, for each member")
    possible = np.where(able, wanted, 0.0)
    total = possible.sum()
    if total <= 0:
        raise RunError(
            f"no member with a weight above 0 can write the next piece after {len(text)} bytes of text"
            + (
                ""
                if all(able)
                else ": none has tokens for bytes that are no whole characters, or for what has to follow"
            )
        )
    normalised: FloatArray = possible / total
    return normalised


@dataclass(frozen=True, slots=True)
class Stretch:
    """The part of a shared route that a reply took, one of `batch` at once: its first step, and that after its last."""

    seed: NonNegativeInt
    start: NonNegativeInt
    end: NonNegativeInt
    batch: PositiveInt


class SharedRoute:
    """The random numbers by which members are drawn for several replies at once: one for each step of all of them.

    They do not depend on any text, so each reply by itself has the ensemble's distribution: at its t-th step it draws a
    member by λ(text) with a number that nothing before has seen. Replies depend on each other through these numbers
    alone. They are another stream than those of replies with the same seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
        self._numbers: list[float] = []

    def at(self, step: int) -> float:
        """The number of a step, in [0, 1)."""
        while len(self._numbers) <= step:
            self._numbers.append(self._random.random())
        return self._numbers[step]

    def begin(self, step: int) -> Callable[[], float]:
        """The numbers from a step on, one for each call."""
        steps = itertools.count(step)
        return lambda: self.at(next(steps))
