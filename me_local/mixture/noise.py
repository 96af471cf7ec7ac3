"""Random numbers of pieces: each belongs to a place in a text and to a piece, whoever draws there and among whatever.

So two distributions that are drawn from at the same place agree as often as they are alike: with probability
(1 - d) / (1 + d) or more, if d is their total variation distance. Source: Daliri, Musco and Suresh 2024, "Coupling
without Communication and Drafter-Invariant Speculative Decoding".
"""

import numpy as np

from me_local.arrays import FloatArray, IntArray

_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


class Noise:
    """Exponential random numbers that follow from a seed, a place and the number of a piece, and nothing else.

    A place has a SplitMix64 of its own, and a piece its output of that index. Source: Steele, Lea and Flood 2014, "Fast
    Splittable Pseudorandom Number Generators".
    """

    def __init__(self, seed: np.random.SeedSequence) -> None:
        self._key = int(seed.generate_state(1, np.uint64)[0])

    def at(self, place: int, numbers: IntArray) -> FloatArray:
        """Those of pieces at a place of the text: float64 (k,), above 0, with mean 1."""
        start = _mixed(np.array([(self._key + _STEP * (place + 1)) & _WORD], dtype=np.uint64))
        bits = _mixed(start + np.uint64(_STEP) * (numbers.astype(np.uint64) + np.uint64(1)))
        uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        return np.asarray(-np.log(uniform))


def _mixed(states: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """What SplitMix64 makes of its states: uint64 (k,)."""
    states = (states ^ (states >> np.uint64(30))) * np.uint64(_FIRST)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(_SECOND)
    return states ^ (states >> np.uint64(31))
