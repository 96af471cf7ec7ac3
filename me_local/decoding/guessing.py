"""Guesses of how a reply goes on: bytes that stood behind the same bytes before.

A guess decides which positions members evaluate at once (`planning`), and never what a reply becomes. It follows from
the texts alone, not from any time that was measured: so do the batches of a reply, and a seed repeats it bit by bit.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol


class Source(Protocol):
    """Guesses the bytes behind a text that grows."""

    def append(self, piece: bytes) -> None:
        """Note that the text goes on with these bytes."""

    def guess(self, asked: Sequence[int], most: int) -> bytes:
        """The bytes that may come next, where these members are asked; none where a guess does not pay.

        So many pieces, one at least, may follow the one that they are asked for.
        """


SHORTEST = 8
"""Bytes that have to have stood there before."""
LONGEST = 96
"""Bytes of a guess, and so many of those that agree count."""
LEAST = 4
"""Bytes of a guess that is worth the trouble."""
DEAR, CHEAP = 0.7, 0.15
"""How likely a guess has to hold up to a byte that is in it: where each token that is evaluated costs, and on a GPU."""

_LENGTHS = (16, 24, 48, LONGEST)
"""From so many bytes that agree on, it is counted anew how often the next does not."""
_BROKEN = 2
"""So many that did not are taken for granted, at one in as many bytes as agree."""


class Repeats:
    """What stood behind the last bytes where they were before, in `shown` or in the text.

    As long as the text goes on like an earlier place, it is followed there; else the last place with the same
    `SHORTEST` bytes is looked up. How often the next byte was another is counted, by how many agreed before it, whether
    it was guessed or not; a guess ends where by these counts it holds with a probability below `sure`.
    """

    def __init__(self, shown: bytes = b"", sure: float = DEAR) -> None:
        self._bytes = bytearray()
        self._ends: dict[bytes, int] = {}  # of the last places with so many bytes
        self._at = 0  # the place that is followed
        self._agreed = 0  # bytes in front of it that are the last ones, 0: none is followed
        self._risk = -math.log(sure)
        self._followed, self._broken = ([0] * (len(_LENGTHS) + 1) for _ in range(2))
        self.append(shown)

    def append(self, piece: bytes) -> None:
        """Note that the text goes on with these bytes."""
        known, start = self._bytes, len(self._bytes)
        same = self._same(piece)
        if self._agreed:
            at = bisect_right(_LENGTHS, self._agreed)
            self._followed[at] += same
            self._broken[at] += same < len(piece)
        known += piece
        if self._agreed and same == len(piece):
            self._at += same
            self._agreed += same
        else:
            self._look_up()
        for end in range(max(start, SHORTEST - 1) + 1, len(known) + 1):
            self._ends[bytes(known[end - SHORTEST : end])] = end

    def guess(self, asked: Sequence[int], most: int) -> bytes:
        """The bytes that may come next, whoever is asked and however many may; none where a guess does not pay."""
        if not self._agreed:
            return b""
        length, risk = 0, 0.0
        while length < LONGEST and (risk := risk + self._breaks(self._agreed + length)) <= self._risk:
            length += 1
        return bytes(self._bytes[self._at : self._at + length]) if length >= LEAST else b""

    def _same(self, piece: bytes) -> int:
        """How many bytes of a piece stand at the place that is followed, from the first on."""
        there = self._bytes[self._at : self._at + len(piece)]
        return next((i for i, (a, b) in enumerate(zip(piece, there, strict=False)) if a != b), len(there))

    def _breaks(self, agreed: int) -> float:
        """How likely the next byte is to be another, where so many agree."""
        at = bisect_right(_LENGTHS, agreed)
        return (self._broken[at] + _BROKEN) / (self._followed[at] + _BROKEN * agreed)

    def _look_up(self) -> None:
        """Find the last place with the same bytes."""
        known = self._bytes
        self._at = self._ends.get(bytes(known[-SHORTEST:]), 0)
        self._agreed = 0
        if self._at:
            most = min(self._at, LONGEST)
            behind, here = known[self._at - most : self._at], known[-most:]
            self._agreed = next((n for n in range(most) if behind[-1 - n] != here[-1 - n]), most)
