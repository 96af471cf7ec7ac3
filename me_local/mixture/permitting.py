"""Pieces that may not come next: they get the number of what is never sampled, before anything else is done to a row.

So each alignment, whatever it does, shapes what is left; and as the numbers follow from the logits and the text alone,
ME and CE go on sampling the same distribution.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from me_local.arrays import IntArray, LogitArray
from me_local.mixture.alignment import floor_of

_FIRST = 64
_GROWS = 8
_SMALL = 4096  # tokens of a vocabulary, of which all are looked at at once
_MANY = 1024  # of the largest, which are usually few, are not asked for before there are candidates

BoolArray = npt.NDArray[np.bool_]


class Beginnings:
    """The first two bytes of all pieces of a unified vocabulary, to find out at once which of them may come next."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        places = (_place(piece[:2]) for piece in pieces)
        self._places = np.fromiter(places, np.int32, len(pieces))  # in a table of all such beginnings

    def among(self, following: Callable[[bytes], BoolArray], numbers: IntArray, *, end: bool) -> BoolArray:
        """Which of these numbers begin with bytes that may follow, bool (k,).

        `following` says which bytes may come behind some bytes, bool (256,); `end` whether END may come.
        """
        table = np.zeros(_PLACES, dtype=bool)
        table[0] = end
        table[_SINGLE] = following(b"")
        for first in np.flatnonzero(table[_SINGLE]).tolist():
            place = _place(bytes([first, 0]))
            table[place : place + _BYTES] = following(bytes([first]))
        return table[self._places[numbers]]

    def single(self, numbers: IntArray) -> BoolArray:
        """Which bytes are pieces of their own among these numbers, -1 not counted: bool (256,)."""
        table = np.zeros(_PLACES, dtype=bool)
        table[self._places[numbers[numbers >= 0]]] = True
        return table[_SINGLE]


_BYTES = 256
_PLACES = 1 + _BYTES + _BYTES**2
_SINGLE = slice(1, 1 + _BYTES)


def _place(beginning: bytes) -> int:
    """In a table: END, then all bytes, then all pairs of them."""
    if len(beginning) < 2:
        return 1 + beginning[0] if beginning else 0
    return 1 + _BYTES + _BYTES * beginning[0] + beginning[1]


def permitted(
    logits: LogitArray,
    numbers: IntArray,
    permits: Callable[[int], bool],
    wanted: int,
    candidates: Callable[[IntArray], BoolArray],
) -> IntArray:
    """The numbers of the pieces that may come next, -1 for all others: int32 (k,), like `numbers`.

    `permits` is asked in the order of the logits, the largest first and the smallest id among equals, and no longer
    once `wanted` are found; 0: all of them. Where the likeliest are too few, `candidates` tells of all numbers at once
    which are worth to be asked for: those of a vocabulary are many, and often only some digits may come next.
    """
    left = np.full_like(numbers, -1)
    found = 0
    for ids in _descending(logits, numbers, candidates):
        for id_ in ids.tolist():
            number = int(numbers[id_])
            if permits(number):
                left[id_] = number
                found += 1
                if found == wanted:
                    return left
    return left


def _descending(
    logits: LogitArray, numbers: IntArray, candidates: Callable[[IntArray], BoolArray]
) -> Iterator[npt.NDArray[np.intp]]:
    """The ids to ask for, in that order: some of the largest, then the candidates in blocks that grow.

    Equals are in one block.
    """
    left = (logits > -np.inf) & (numbers >= 0)
    if len(logits) > _SMALL:
        largest = np.flatnonzero(left & (logits >= floor_of(logits, _FIRST)))
        if len(largest) <= _MANY:
            yield _sorted(logits, largest)
            left[largest] = False
    ids = np.flatnonzero(left & candidates(numbers))
    size = _FIRST
    while len(ids):
        scores = logits[ids]
        floor = -np.inf if size >= len(ids) else np.partition(scores, len(ids) - size)[len(ids) - size]
        yield _sorted(logits, ids[scores >= floor])
        ids, size = ids[scores < floor], size * _GROWS


def _sorted(logits: LogitArray, ids: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    return ids[np.lexsort((ids, -logits[ids]))]
