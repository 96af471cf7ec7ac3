"""Checkpoints of a memory that cannot be cut back: that of recurrent and hybrid models.

The contract: a checkpoint is the state of the memory after the first `length` tokens of what the cache holds. A cache
that is shortened drops those that lie beyond (`cut`), so every one that is left is a prefix of it. Says when the next
one is due. Knows nothing of llama.cpp or of what a state consists of.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_KEPT = 2  # of prompts and of the text each: one state can take tens of megabytes
_SPACING = 16  # tokens


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a memory after its first `length` tokens, as llama.cpp wrote it: uint8 (bytes,)."""

    length: int
    state: npt.NDArray[np.uint8]


class Checkpoints:
    """The last checkpoints of prompts, to which another reply goes back, and those of the text behind them."""

    def __init__(self) -> None:
        self._prompts: deque[Checkpoint] = deque(maxlen=_KEPT)
        self._text: deque[Checkpoint] = deque(maxlen=_KEPT)

    @property
    def newest(self) -> Checkpoint | None:
        """The longest of them."""
        return max((*self._prompts, *self._text), key=lambda checkpoint: checkpoint.length, default=None)

    def add(self, checkpoint: Checkpoint, *, prompt: bool) -> None:
        """Keep this one, in the place of the oldest of its kind."""
        (self._prompts if prompt else self._text).append(checkpoint)

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(checkpoint.state.nbytes for checkpoint in (*self._prompts, *self._text))

    def longest(self, most: int) -> int:
        """The length of the longest of at most `most` tokens; 0 if there is none."""
        return max((length for length in self.lengths if length <= most), default=0)

    def copy(self) -> "Checkpoints":
        """Another set of the same checkpoints."""
        copied = Checkpoints()
        copied._prompts.extend(self._prompts)
        copied._text.extend(self._text)
        return copied

    def cut(self, length: int) -> None:
        """Drop those of more than `length` tokens."""
        for kind in (self._prompts, self._text):
            while kind and kind[-1].length > length:
                kind.pop()

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of tokens after which there is one, in growing order."""
        return tuple(sorted({checkpoint.length for checkpoint in (*self._prompts, *self._text)}))

    @staticmethod
    def stops(length: int) -> tuple[int, ...]:
        """After how many tokens of a prompt of `length`, evaluated by itself, there are to be some.

        They follow from the length alone, as they decide where batches end: one for another reply to the prompt, and
        one for a text by which the last tokens become others.
        """
        return tuple(stop for stop in (length - _SPACING, length) if stop > 0)

    def due_in_prompt(self, keep: int, final: int, length: int) -> int | None:
        """How many tokens of a prompt of `length` the next checkpoint covers, if one is missing.

        `keep` of them are evaluated, and the first `final` will stay as they are.
        """
        due = final if max(keep, 1) <= final < length else length
        return due if due > self._newest_length() else None

    def due_in_text(self, keep: int, common: int, final: int, length: int) -> int | None:
        """How many of `length` tokens the next checkpoint covers, if one is due.

        `keep` of them are evaluated, the first `common` were so before, too, and the first `final` will stay as they
        are. Where none are said to be final for a while, what has been the same twice is the best guess; when all of
        them are, nothing is going to be changed.
        """
        newest = self._newest_length()
        if keep <= final < length and final > newest:
            return final
        return common if common >= newest + _SPACING else None

    def _newest_length(self) -> int:
        return self.newest.length if self.newest else 0
