"""From a member's logits to a distribution over pieces, from several distributions to one, and the draw.

Pure functions on arrays. An alignment (A_i in the definition of an ensemble) sees one member's logits and nothing
else, which is what makes ME and CE have the same distribution. The default follows the paper: top-n-sigma, temperature,
top-k, typical-p, top-p, min-p and XTC, then renormalising, all inside the member; then ids become pieces and equal
pieces add up.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.sampling import Sampling

_PART = 8  # of the vocabulary, one such part of which is searched for a floor
_COLUMNS = 32  # of it, for each token that is wanted: few of the largest share one
_SPARE = 4
"""So many more are looked for at first: some may never be sampled, and at the edge the smallest of equals counts."""
_FEW = 256
"""Up to so many tokens are handled one by one: each call of NumPy costs as much as some of them."""
_MANY = 1024
"""Up to so many are looked at one by one, to find these."""

_Ranked: TypeAlias = list[tuple[float, int, int]]
"""Tokens that may be sampled, the likeliest first: the negative of the logit, the id, the number of the piece."""


class Distribution(NamedTuple):
    """Probabilities of pieces: `numbers` int32 (k,), ascending and distinct; `probabilities` float64 (k,), sum 1."""

    numbers: IntArray
    probabilities: FloatArray

    def of(self, number: int) -> float:
        """The probability of one piece; 0 where it is not in the support."""
        at = int(np.searchsorted(self.numbers, number))
        found = at < len(self.numbers) and self.numbers[at] == number
        return float(self.probabilities[at]) if found else 0.0


class Alignment(Protocol):
    """Turns a member's logits into a distribution over pieces.

    A package provides one through the entry-point group `me_local.alignments`. It must be a function of its
    arguments alone: anything else would make ME and CE differ.
    """

    def __call__(self, logits: LogitArray, numbers: IntArray, sampling: Sampling) -> Distribution:
        """Logits (n,) and, for each id, the number of its piece (n,), -1 for an id that is never sampled.

        Penalties and biases are in the logits already, and a ban is minus infinity. The coin of XTC has been thrown:
        `sampling.xtc_probability` is 1 or 0. Raises ValueError when no distribution can be made of the logits.
        """


def top_k(logits: LogitArray, numbers: IntArray, sampling: Sampling) -> Distribution:
    """The paper's alignment: temper, truncate, renormalise, and add up ids that stand for the same piece."""
    limit = _limit(sampling)
    if sampling.top_n_sigma > 0 and sampling.temperature > 0:
        numbers = _near_the_best(logits, numbers, sampling.top_n_sigma)
    if 0 < limit <= _FEW and (largest := _largest(logits, numbers, limit)):
        return _of_few(largest, sampling)
    ids = _ranked(logits, numbers, limit)
    scores = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # next to temperature 0, all others get nothing
        weights = np.exp((scores - scores[0]) / (sampling.temperature or 1.0))
    weights = _truncated(weights, sampling)
    kept = np.flatnonzero(weights)
    return _merged(numbers[ids[kept]], weights[kept] / weights[kept].sum())


def sufficient(sampling: Sampling) -> int:
    """How many of the largest logits that may be sampled are enough for `top_k`; 0: none but all of them."""
    limit = _limit(sampling)
    if sampling.top_n_sigma > 0 and sampling.temperature > 0:
        return 0
    return limit + _SPARE if limit else 0


def _limit(sampling: Sampling) -> int:
    return 1 if sampling.temperature == 0 else sampling.top_k


def mix(distributions: Sequence[Distribution], weights: Sequence[float]) -> Distribution:
    """The mixture of distributions: the probability of a piece is the weighted mean of the members'."""
    numbers = np.concatenate([d.numbers for d in distributions])
    parts = [w * d.probabilities for d, w in zip(distributions, weights, strict=True)]
    return _merged(numbers, np.concatenate(parts))


def sample(distribution: Distribution, noise: FloatArray) -> tuple[int, float]:
    """The piece that is first in a race, drawn with its probability: its number and this probability.

    `noise` has an exponential random number for each piece, float64 (k,); the time that a piece takes is this number
    divided by its probability. This is the Gumbel-max trick without its logarithms.
    """
    with np.errstate(divide="ignore", over="ignore"):  # a piece of no probability never arrives
        at = int((noise / distribution.probabilities).argmin())
    return int(distribution.numbers[at]), float(distribution.probabilities[at])


def argmax(distribution: Distribution) -> tuple[int, float]:
    """The most probable piece, the one with the smallest number among equals: its number and probability."""
    at = int(np.argmax(distribution.probabilities))
    return int(distribution.numbers[at]), float(distribution.probabilities[at])


def pick(weights: FloatArray, uniform: float) -> int:
    """The index drawn with probability proportional to `weights` (not negative, not all zero) by one number."""
    sums = list(accumulate(weights.tolist()))
    at = bisect_right(sums, uniform * sums[-1])
    # Rounding may carry a draw past the last weight that is not zero.
    return at if at < len(weights) and weights[at] > 0 else int(np.flatnonzero(weights)[-1])


def _largest(logits: LogitArray, numbers: IntArray, limit: int) -> _Ranked | None:
    """The `limit` largest logits that may be sampled, the smallest id first among equals; None where that takes long.

    None of them is below the largest of a part. Vocabularies begin with what is frequent, so hardly more than these are
    not below the largest of their first eighth, and all logits are read once. Text in rarer scripts has some hundreds.
    """
    below = (logits < floor_of(logits, limit + _SPARE)).tobytes()
    found: _Ranked = []
    at = -1
    for _ in range(_MANY):
        at = below.find(b"\0", at + 1)
        if at < 0:
            break
        logit = logits.item(at)
        if not logit < math.inf:  # NaN, which is not below anything, fails too
            raise ValueError("NaN or infinite logits")
        if (number := numbers.item(at)) >= 0:
            found.append((-logit, at, number))
    found.sort()
    return found[:limit] if at < 0 and len(found) >= limit and math.isfinite(found[0][0]) else None


def floor_of(logits: LogitArray, count: int) -> float:
    """A number that `count` of the logits are not below, and few more; minus infinity where there are too few.

    It is one of the maxima of the columns of the first eighth of the logits in several rows.
    """
    logits = logits[: len(logits) // _PART]
    if len(logits) < count:
        return -math.inf
    rows = max(1, len(logits) // (_COLUMNS * count))
    columns = len(logits) // rows
    maxima = np.maximum.reduce(logits[: rows * columns].reshape(rows, columns))
    maxima.partition(columns - count)
    return float(maxima[columns - count])


def _of_few(candidates: _Ranked, sampling: Sampling) -> Distribution:
    """The distribution over these: tempered, truncated, renormalised, and equal pieces added up."""
    best, temperature = candidates[0][0], sampling.temperature or 1.0
    weights = [math.exp((best - score) / temperature) for score, _, _ in candidates]
    if sampling.top_p < 1 or sampling.min_p > 0 or sampling.typical_p < 1 or sampling.xtc_probability >= 1:
        weights = _truncated(np.array(weights), sampling).tolist()
    total = sum(weights)
    shares: dict[int, float] = {}
    for weight, (_, _, number) in zip(weights, candidates, strict=False):
        if weight > 0:
            shares[number] = shares.get(number, 0.0) + weight / total
    numbers = sorted(shares)
    return Distribution(np.array(numbers, dtype=np.int32), np.array([shares[number] for number in numbers]))


def _ranked(logits: LogitArray, numbers: IntArray, limit: int) -> npt.NDArray[np.intp]:
    """All ids that may be sampled, or the `limit` largest, ordered as in `_largest`."""
    _check_finite(logits)
    ids = np.flatnonzero(numbers >= 0)
    if 0 < limit < len(ids):
        scores = logits[ids]
        ids = ids[scores >= np.partition(scores, -limit)[-limit]]
    ids = ids[np.lexsort((ids, -logits[ids]))]
    if len(ids) == 0 or not np.isfinite(logits[ids[0]]):
        raise ValueError("no token that may be sampled has a finite logit")
    return ids[:limit] if limit else ids


def _check_finite(logits: LogitArray) -> None:
    if len(logits) and not logits.max() < np.inf:  # NaN fails too
        raise ValueError("NaN or infinite logits")


def _truncated(weights: FloatArray, sampling: Sampling) -> FloatArray:
    """Weights that descend, with 0 for those that typical-p, top-p, min-p and XTC take away one after the other."""
    if sampling.typical_p < 1:
        weights = _typical(weights, sampling.typical_p)
    if sampling.top_p < 1:
        cumulative = np.cumsum(weights)
        last = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1]))
        weights = np.where(np.arange(len(weights)) <= last, weights, 0.0)
    if sampling.min_p > 0:
        weights = np.where(weights >= sampling.min_p * weights.max(), weights, 0.0)
    if sampling.xtc_probability >= 1:
        weights = _without_top_choices(weights, sampling.xtc_threshold)
    return weights


def _typical(weights: FloatArray, share: float) -> FloatArray:
    """The weights whose surprise is nearest to the expected one, until they have more than this share.

    Source: Meister et al. 2023, "Locally Typical Sampling".
    """
    likely = np.flatnonzero(weights)
    probabilities = weights[likely] / weights.sum()
    surprise = -np.log(probabilities)
    order = np.abs(surprise - (probabilities * surprise).sum()).argsort(kind="stable")
    count = int(np.searchsorted(np.cumsum(probabilities[order]), share, side="right")) + 1
    kept = likely[order[:count]]
    left = np.zeros_like(weights)
    left[kept] = weights[kept]
    return left


def _without_top_choices(weights: FloatArray, threshold: float) -> FloatArray:
    """XTC: of the choices with at least this probability, the least likely alone is left.

    Source: github.com/oobabooga/text-generation-webui/pull/6335.
    """
    top = np.flatnonzero((weights > 0) & (weights >= threshold * weights.sum()))
    left = weights.copy()
    left[top[:-1]] = 0.0
    return left


def _near_the_best(logits: LogitArray, numbers: IntArray, sigmas: float) -> IntArray:
    """Numbers, with -1 for logits that are more standard deviations below the largest, of all that may be sampled.

    Source: Tang et al. 2024, "Top-nσ: Not All Logits Are You Need".
    """
    usable = (numbers >= 0) & (logits > -np.inf)
    if not usable.any():
        return numbers
    among = logits[usable].astype(np.float64)
    return np.where(usable & (logits >= among.max() - sigmas * among.std()), numbers, np.int32(-1))


def _merged(numbers: IntArray, probabilities: FloatArray) -> Distribution:
    order = numbers.argsort(kind="stable")
    ascending = numbers[order]
    if (ascending[1:] != ascending[:-1]).all():
        return Distribution(ascending, probabilities[order])
    distinct, where = np.unique(numbers, return_inverse=True)
    return Distribution(distinct, np.bincount(where, weights=probabilities).astype(np.float64, copy=False))
