"""From a member's logits to a distribution over pieces, from several distributions to one, and the draw.

Pure functions on arrays. An alignment (A_i in the definition of an ensemble) sees one member's logits and nothing
else, which is what makes ME and CE have the same distribution. The default follows the paper: temperature, then
top-k, top-p and min-p, then renormalising, all inside the member; then ids become pieces and equal pieces add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from me_local.config import Sampling
from me_local.vocabulary import IntArray

FloatArray = npt.NDArray[np.float64]
LogitArray = npt.NDArray[np.float32]

_BLOCK = 128
_ROWS = np.arange(_BLOCK)[:, None]


@dataclass(frozen=True, slots=True)
class Distribution:
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

        Raises ValueError when no distribution can be made of the logits.
        """


def top_k(logits: LogitArray, numbers: IntArray, sampling: Sampling) -> Distribution:
    """The paper's alignment: temper, truncate, renormalise, and add up ids that stand for the same piece."""
    limit = 1 if sampling.temperature == 0 else sampling.top_k
    ids = _largest(logits, numbers, limit)
    scores = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # next to temperature 0, all others get nothing
        weights = np.exp((scores - scores[0]) / (sampling.temperature or 1.0))
    kept = _truncated(weights / weights.sum(), sampling)
    return _merged(numbers[ids[: len(kept)]], kept)


def mix(distributions: Sequence[Distribution], weights: Sequence[float]) -> Distribution:
    """The mixture of distributions: the probability of a piece is the weighted mean of the members'."""
    numbers = np.concatenate([d.numbers for d in distributions])
    parts = [w * d.probabilities for d, w in zip(distributions, weights, strict=True)]
    return _merged(numbers, np.concatenate(parts))


def sample(distribution: Distribution, uniform: float) -> tuple[int, float]:
    """The piece at `uniform` (0 <= uniform < 1) of the cumulative distribution: its number and probability."""
    at = pick(distribution.probabilities, uniform)
    return int(distribution.numbers[at]), float(distribution.probabilities[at])


def argmax(distribution: Distribution) -> tuple[int, float]:
    """The most probable piece, the one with the smallest number among equals: its number and probability."""
    at = int(np.argmax(distribution.probabilities))
    return int(distribution.numbers[at]), float(distribution.probabilities[at])


def pick(weights: FloatArray, uniform: float) -> int:
    """The index drawn with probability proportional to `weights` (not negative, not all zero) by one number."""
    cumulative = weights.cumsum()
    at = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    # Rounding may carry a draw past the last weight that is not zero.
    return at if at < len(weights) and weights[at] > 0 else int(np.flatnonzero(weights)[-1])


def _largest(logits: LogitArray, numbers: IntArray, limit: int) -> npt.NDArray[np.intp]:
    """Ids that may be sampled, largest logit first, smallest id first among equals; at most `limit` unless 0.

    The maximum of each block of logits comes first: only blocks whose maximum is among the `limit` largest can
    hold one of the `limit` largest logits, so the vocabulary is read once and never sorted. A block is a column
    of the logits laid out in `_BLOCK` rows, because the maximum of whole rows is quick.
    """
    columns = len(logits) // _BLOCK
    maxima = logits[: columns * _BLOCK].reshape(_BLOCK, columns).max(axis=0, initial=-np.inf)
    if not 0 < limit < columns:
        _check_finite(maxima)
        _check_finite(logits[columns * _BLOCK :])
        return _ranked(logits, np.flatnonzero(numbers >= 0), limit)
    blocks = maxima.argpartition(-limit - 1)[-limit - 1 :]
    best = maxima[blocks]  # the smallest of them first; NaN counts as the largest
    _check_finite(best)
    floor = best[1:].min()
    blocks = blocks[1:] if best[0] < floor else np.flatnonzero(maxima >= floor)
    ids = (blocks + columns * _ROWS).ravel()
    if columns * _BLOCK < len(logits):
        _check_finite(logits[columns * _BLOCK :])
        ids = np.concatenate([ids, np.arange(columns * _BLOCK, len(logits))])
    ids = ids[logits[ids] >= floor]
    ids = ids[numbers[ids] >= 0]  # of few ids: each is far from the others in memory
    if len(ids) < limit:  # ids that are never sampled hid some of the largest
        ids = np.flatnonzero(numbers >= 0)
    return _ranked(logits, ids, limit)


def _ranked(logits: LogitArray, ids: npt.NDArray[np.intp], limit: int) -> npt.NDArray[np.intp]:
    scores = logits[ids]
    if 0 < limit < len(ids):
        high = scores >= np.partition(scores, -limit)[-limit]
        ids, scores = ids[high], scores[high]
    ids = ids[np.lexsort((ids, -scores))]
    if len(ids) == 0 or not np.isfinite(logits[ids[0]]):
        raise ValueError("no token that may be sampled has a finite logit")
    return ids[:limit] if limit else ids


def _check_finite(logits: LogitArray) -> None:
    if len(logits) and not logits.max() < np.inf:  # NaN fails too
        raise ValueError("NaN or infinite logits")


def _truncated(probabilities: FloatArray, sampling: Sampling) -> FloatArray:
    """Top-p, then min-p, of probabilities that descend: the first of them, renormalised, none of them zero."""
    keep = int(np.count_nonzero(probabilities))
    if sampling.top_p < 1:
        keep = min(keep, int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1)
    if sampling.min_p > 0:
        keep = min(keep, int(np.count_nonzero(probabilities >= sampling.min_p * probabilities[0])))
    kept: FloatArray = probabilities[:keep] / probabilities[:keep].sum()
    return kept


def _merged(numbers: IntArray, probabilities: FloatArray) -> Distribution:
    order = numbers.argsort(kind="stable")
    ascending = numbers[order]
    if (ascending[1:] != ascending[:-1]).all():
        return Distribution(ascending, probabilities[order])
    distinct, where = np.unique(numbers, return_inverse=True)
    return Distribution(distinct, np.bincount(where, weights=probabilities).astype(np.float64, copy=False))
