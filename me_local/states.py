"""Kept states of members: what their caches held for prompts that may come again.

The contract: a state is put back as a whole, so `best` answers with the one that leaves the least of a prompt to be
evaluated, and `add` drops those used least recently until all of them take at most `budget` bytes. All members of an
ensemble share one `States`. Knows nothing of llama.cpp or of what a state consists of.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from me_local.checkpoints import Checkpoints
from me_local.vocabulary import IntArray

WORTH = 32
"""Tokens that a state must save: to evaluate fewer costs about as little as to move a state."""


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A member's cache: the `ids` in it, int32 (tokens,), and its contents as llama.cpp wrote them, uint8 (bytes,).

    The first `alone` tokens were evaluated in one go. `checkpoints` are those of a memory that cannot be cut back.
    """

    ids: IntArray
    data: npt.NDArray[np.uint8]
    alone: int
    checkpoints: Checkpoints | None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.data.nbytes + self.ids.nbytes + (self.checkpoints.size if self.checkpoints else 0)

    def usable(self, ids: IntArray, *, alone: bool) -> int:
        """How many of `ids` need not be evaluated once this state is back; `alone` as in `Member.prepare`."""
        common = common_length(self.ids, ids)
        if alone:
            return common if common == len(ids) == self.alone else 0
        if self.checkpoints and common < len(self.ids):
            return self.checkpoints.longest(common)
        return common


class States:
    """The states of all members, `budget` bytes of them at most."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.size = 0
        self._states: list[tuple[str, State]] = []  # the one used last stands last

    def __len__(self) -> int:
        return len(self._states)

    def best(self, member: str, ids: IntArray, *, alone: bool) -> State | None:
        """The state of this member with which the least of `ids` is to be evaluated; None if there is none."""
        entries = [entry for entry in self._states if entry[0] == member]
        best = max(entries, key=lambda entry: entry[1].usable(ids, alone=alone), default=None)
        if best is None:
            return None
        self._states.remove(best)
        self._states.append(best)
        return best[1]

    def add(self, member: str, state: State) -> None:
        """Keep a state in the place of those of which it is a continuation."""
        for entry in [e for e in self._states if e[0] == member and _continues(state, e[1])]:
            self._drop(entry)
        self._states.append((member, state))
        self.size += state.size
        while self.size > self.budget:
            self._drop(self._states[0])

    def _drop(self, entry: tuple[str, State]) -> None:
        self._states.remove(entry)
        self.size -= entry[1].size


def common_length(a: IntArray, b: IntArray) -> int:
    """The length of the longest common prefix."""
    limit = min(len(a), len(b))
    different = a[:limit] != b[:limit]
    first = int(different.argmax()) if limit else 0
    return first if limit and different[first] else limit


def _continues(new: State, old: State) -> bool:
    return new.alone == old.alone and common_length(new.ids, old.ids) == len(old.ids)
