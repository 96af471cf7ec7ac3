"""Pieces that may not come next: they get the number of what is never sampled, before anything else is done to a row.

So each alignment, whatever it does, shapes what is left; and as the numbers follow from the logits and the text alone,
ME and CE go on sampling the same distribution.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from me_local.arrays import IntArray, LogitArray

_FIRST = 64
_GROWS = 8


def permitted(logits: LogitArray, numbers: IntArray, permits: Callable[[int], bool], wanted: int) -> IntArray:
    """The numbers of the pieces that may come next, -1 for all others: int32 (k,), like `numbers`.

    Asked in the order of their logits, the largest first and the smallest id among equals, and no longer once `wanted`
    are found; 0: all of them.
    """
    left = np.full_like(numbers, -1)
    found = 0
    for ids in _descending(logits, numbers):
        for id_ in ids.tolist():
            number = int(numbers[id_])
            if permits(number):
                left[id_] = number
                found += 1
                if found == wanted:
                    return left
    return left


def _descending(logits: LogitArray, numbers: IntArray) -> Iterator[npt.NDArray[np.intp]]:
    """The ids that may be sampled, in that order, in blocks that grow; equals are in one block."""
    ids = np.flatnonzero((numbers >= 0) & (logits > -np.inf))
    size = _FIRST
    while len(ids):
        scores = logits[ids]
        floor = -np.inf if size >= len(ids) else np.partition(scores, len(ids) - size)[len(ids) - size]
        block = ids[scores >= floor]
        yield block[np.lexsort((block, -logits[block]))]
        ids, size = ids[scores < floor], size * _GROWS
