"""A text while it grows: its bytes, which of them are no whole characters, and its ids.

The ids are canonical ones, at the cost of the text's tail, or those that were sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from me_local.arrays import IntArray
from me_local.text.utf8 import utf8_runs
from me_local.text.vocabulary import Vocabulary


@dataclass(slots=True)
class Text:
    """The text so far, with the bytes in it that are not, or not yet, part of a whole UTF-8 character."""

    whole: bytes = b""
    strays: frozenset[int] = frozenset()
    _past_strays: frozenset[int] = field(default=frozenset(), repr=False)
    _open: bytes = field(default=b"", repr=False)

    def append(self, piece: bytes) -> None:
        """Add the bytes of a piece."""
        self.whole += piece
        if not self._open and piece.isascii():
            return
        runs = list(utf8_runs(self._open + piece))
        self._open = runs.pop()[0] if runs and _may_continue(runs[-1]) else b""
        stray = b"".join(run for run, valid in runs if not valid)
        self._past_strays |= frozenset(stray)
        self.strays = self._past_strays | frozenset(self._open)

    @property
    def in_character(self) -> bool:
        """Whether the text ends with the beginning of a character."""
        return bool(self._open)


def _may_continue(run: tuple[bytes, bool]) -> bool:
    """Whether a last run of bytes is the beginning of a character that is still to be completed."""
    text, valid = run
    if valid:
        return False
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


_LINE = 256  # bytes


class TokenizedText:
    """The canonical ids of a growing text in one vocabulary.

    Ids in front of the last seam (see `seams`) are final, and only what follows is tokenised again. In a text without
    any, all of it is. `at_start` and `typed` as in `Vocabulary.canonical`.
    """

    def __init__(self, vocabulary: Vocabulary, *, at_start: bool, typed: int = 0) -> None:
        self._vocabulary = vocabulary
        self._at_start = at_start
        self._typed = typed
        self._ids = np.empty(1024, dtype=np.int32)
        self._final = 0  # ids in front of the last seam
        self._length = 0  # all ids
        self._seam = 0  # bytes in front of the last seam
        self._seen = 0  # bytes tokenised so far

    @property
    def final(self) -> int:
        """How many ids, from the first, no longer change when the text grows."""
        return self._final

    @property
    def saved(self) -> int:
        """By how many the ids of this text, and of all it may grow into, will at least be fewer than its bytes."""
        return self._seam - self._final

    def ids(self, text: bytes) -> IntArray:
        """Ids of `text`, which starts with the text of the call before: int32 view, shape (tokens,)."""
        if len(text) != self._seen:
            self._advance(text)
        return self._ids[: self._length]

    def beyond(self, text: bytes, guess: bytes) -> tuple[list[int], int]:
        """The ids of `text` and `guess` from the last seam of the text on, and how many of them are the text's.

        -1 where its ids do not stay as they are when the guess follows.
        """
        own = self.ids(text)[self._final :].tolist()
        ids = self._encode(text[self._seam :] + guess)
        return ids, len(own) if ids[: len(own)] == own else -1

    def are(self, text: bytes, guess: bytes, ids: Sequence[int]) -> bool:
        """Whether these are the ids of `text` and `guess` from the last seam of the text on."""
        self.ids(text)
        return self._encode(text[self._seam :] + guess) == ids

    def _advance(self, text: bytes) -> None:
        seams = self._vocabulary.seams.find(text, self._seen)
        if len(text) - self._seen > _LINE:
            seams = seams[-1:]
        ids: list[int] = []
        for seam in seams:  # one by one: words come back, and so do their ids
            ids += self._encode(text[self._seam : seam])
            self._seam = seam
        self._final = self._write(self._final, ids)
        self._length = self._write(self._final, self._encode(text[self._seam :]))
        self._seen = len(text)

    def _encode(self, text: bytes) -> list[int]:
        typed = max(0, self._typed - self._seam)
        return self._vocabulary.canonical(text, typed=typed, at_start=self._at_start and self._seam == 0)

    def _write(self, position: int, ids: Sequence[int]) -> int:
        end = position + len(ids)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids[:position], np.empty(2 * end - position, dtype=np.int32)])
        self._ids[position:end] = ids
        return end


class SampledText:
    """The ids of a text as they were sampled, for members that all share one vocabulary: nothing to tokenise."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = np.empty(max(1024, 2 * len(ids)), dtype=np.int32)
        self._ids[: len(ids)] = ids
        self._length = len(ids)

    @property
    def final(self) -> int:
        """How many ids no longer change when the text grows: all of them."""
        return self._length

    @property
    def saved(self) -> int:
        """As in `TokenizedText`; nothing is known of the bytes."""
        return 0

    def append(self, token: int) -> None:
        """Add one sampled id."""
        if self._length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[self._length] = token
        self._length += 1

    def ids(self, text: bytes) -> IntArray:
        """All ids: int32 view, shape (tokens,). The text itself is not looked at."""
        return self._ids[: self._length]
