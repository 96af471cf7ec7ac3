"""Kept states of members: what their caches held for prompts that may come again.

The contract: a state is put back as a whole, so `best` answers with the one that leaves the least of a prompt to be
evaluated, and `add` drops those used least recently until all of them take at most `budget` bytes. All members of an
ensemble share one `States`. Knows nothing of llama.cpp or of what a state consists of.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from me_local.arrays import IntArray
from me_local.llama.checkpoints import Checkpoints
from me_local.llama.origin import Origin

WORTH = 32
"""Tokens that a state must save: to evaluate fewer costs about as little as to move a state."""


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A member's cache: the `ids` in it, int32 (tokens,), and its contents as llama.cpp wrote them, uint8 (bytes,).

    `origin` says how they came there. `reach` is the least number of tokens that it can be cut back to; below that are
    only the `checkpoints` of a memory that cannot be cut back, or that loses what a window has passed.
    """

    ids: IntArray
    data: npt.NDArray[np.uint8]
    origin: Origin
    reach: int
    checkpoints: Checkpoints | None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.data.nbytes + self.ids.nbytes + (self.checkpoints.size if self.checkpoints else 0)

    def usable(self, ids: IntArray, wanted: Origin | None = None) -> int:
        """How many of `ids` need not be evaluated once this state is back.

        Where an origin is wanted, those count alone that came this way.
        """
        common = common_length(self.ids, ids)
        if wanted is not None:
            common = self.origin.shared(wanted, common)
        if common >= self.reach:
            return common
        return self.checkpoints.longest(common) if self.checkpoints else 0


class States:
    """The states of all members, `budget` bytes of them at most."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.size = 0
        self._states: list[tuple[str, State]] = []  # the one used last stands last

    def __len__(self) -> int:
        return len(self._states)

    def best(self, member: str, ids: IntArray, wanted: Origin | None = None) -> State | None:
        """The state of this member with which the least of `ids` is to be evaluated; None if there is none.

        `wanted` as in `State.usable`.
        """
        entries = [entry for entry in self._states if entry[0] == member]
        best = max(entries, key=lambda entry: entry[1].usable(ids, wanted), default=None)
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
    ends = old.origin.ends
    return new.origin.ends[: len(ends)] == ends and common_length(new.ids, old.ids) == len(old.ids)
