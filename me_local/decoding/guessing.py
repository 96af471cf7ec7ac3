"""Guesses of how a reply goes on: bytes that stood behind the same bytes before.

A guess decides which positions members evaluate at once (`planning`), and never what a reply becomes. It follows from
the texts alone, not from any time that was measured: so do the batches of a reply, and a seed repeats it bit by bit.
"""

from collections.abc import Sequence
from typing import Protocol


class Source(Protocol):
    """Guesses the bytes behind a text that grows."""

    def append(self, piece: bytes) -> None:
        """Note that the text goes on with these bytes."""

    def guess(self, asked: Sequence[int]) -> bytes:
        """The bytes that may come next, where these members are asked; none where a guess does not pay."""


SHORTEST = 12
"""Bytes that have to have stood there before."""
LONGEST = 96
"""Bytes of a guess."""


class Repeats:
    """What stood behind the last bytes where they were before, in `shown` or in the text.

    As long as the text goes on like an earlier place, it is followed there; else the last place with the same
    `SHORTEST` bytes is looked up. A guess has half as many bytes as have agreed so far; each that fails doubles the
    number that it takes for the next, and each that holds halves it.
    """

    def __init__(self, shown: bytes = b"") -> None:
        self._bytes = bytearray()
        self._ends: dict[bytes, int] = {}  # of the last places with so many bytes
        self._at = 0  # the place that is followed
        self._agreed = 0  # bytes in front of it that are the last ones, 0: none is followed
        self._needed = SHORTEST
        self._guessed = 0  # bytes of a guess that are still to come
        self.append(shown)

    def append(self, piece: bytes) -> None:
        """Note that the text goes on with these bytes."""
        known, start = self._bytes, len(self._bytes)
        holds = self._agreed > 0 and known[self._at : self._at + len(piece)] == piece
        self._judge(len(piece), holds)
        known += piece
        if holds:
            self._at += len(piece)
            self._agreed += len(piece)
        else:
            self._look_up()
        for end in range(max(start, SHORTEST - 1) + 1, len(known) + 1):
            self._ends[bytes(known[end - SHORTEST : end])] = end

    def guess(self, asked: Sequence[int]) -> bytes:
        """The bytes that may come next, whoever is asked; none where a guess does not pay."""
        if self._agreed < self._needed:
            return b""
        guess = bytes(self._bytes[self._at : self._at + min(self._agreed // 2, LONGEST)])
        self._guessed = len(guess)
        return guess

    def _judge(self, count: int, holds: bool) -> None:
        """Note whether so many bytes of a guess, if there was one, were right."""
        if not self._guessed:
            return
        if not holds:
            self._needed, self._guessed = min(2 * self._needed, LONGEST), 0
        elif count >= self._guessed:
            self._needed, self._guessed = max(self._needed // 2, SHORTEST), 0
        else:
            self._guessed -= count

    def _look_up(self) -> None:
        """Find the last place with the same bytes."""
        known = self._bytes
        self._at = self._ends.get(bytes(known[-SHORTEST:]), 0)
        self._agreed = 0
        if self._at:
            most = min(self._at, LONGEST)
            behind, here = known[self._at - most : self._at], known[-most:]
            self._agreed = next((n for n in range(most) if behind[-1 - n] != here[-1 - n]), most)
