"""One sequence in the memory of a member's context, and the mirror of what is there: the list of ids.

The contract: `ids` are those that the memory holds for this sequence, or fewer, never more; `cut` mends the rest. A
memory that cannot be cut back (recurrent and hybrid models, a window of cells) goes back to a checkpoint, or to zero.
Knows nothing of batches, of logits or of other members.
"""

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from me_local.checkpoints import Checkpoint, Checkpoints
from me_local.errors import RunError
from me_local.states import WORTH, State, States, common_length
from me_local.vocabulary import IntArray

_PARTIAL = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY  # of a state, only what cannot be cut back


class Cache:
    """The cells of one sequence.

    `name` is the member's, for errors; `window` the number of tokens that a layer with a sliding window looks back at,
    or 0; `cuttable` says whether any part of the memory can be dropped.
    """

    def __init__(
        self,
        context: llama_cpp.llama_context_p,
        sequence: int,
        *,
        name: str,
        cells: int,
        window: int,
        cuttable: bool,
    ) -> None:
        self.sequence = sequence
        self.length = 0
        self.alone = 0  # as many tokens, from the first, were evaluated in one go
        self.checkpoints = None if cuttable else Checkpoints()
        self._certain = True  # that the memory holds the mirror's ids and no more
        self._only = llama_cpp.llama_n_seq_max(context) == 1
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)
        self._name = name
        self._window = window
        self._mirror = np.empty(cells, dtype=np.int32)

    @property
    def ids(self) -> IntArray:
        """What it holds: int32 view (tokens,)."""
        return self._mirror[: self.length]

    def expect(self) -> None:
        """Note that tokens are about to come behind the mirror; if that fails, anything may be there."""
        self._certain = False

    def add(self, ids: IntArray) -> None:
        """Note that these were evaluated behind the others."""
        end = self.length + len(ids)
        self._mirror[self.length : end] = ids
        self.length = end
        self._certain = True

    def common(self, ids: IntArray, most: int) -> int:
        """The length of the prefix that it has in common with `ids`, at most `most`."""
        return common_length(self.ids, ids[:most])

    def cut(self, length: int) -> int:
        """Shorten it to `length` tokens, or to fewer where that is not possible, and return how many it holds then."""
        if length == self.length and self._certain:
            return length
        # The mirror goes first: one that is short of the memory is mended here, one beyond it would go unnoticed.
        self._shorten(length)
        if not self._remove(length) or not self._has_window(length):
            self._restore()
        self._certain = True
        return self.length

    def forget(self) -> None:
        """Empty it."""
        self._shorten(0)
        if self._only:
            llama_cpp.llama_memory_clear(self._memory, True)
        else:
            self._remove(-1)
        self._certain = True

    def usable(self, ids: IntArray, *, alone: bool) -> int:
        """How many of `ids` need not be evaluated again; `alone` as in `Member.prepare`."""
        return State(self.ids, _NOTHING, self.alone, self.checkpoints).usable(ids, alone=alone)

    def borrow(self, other: "Cache", length: int) -> None:
        """Hold the first `length` tokens of another sequence, of which these are usable, instead of what is there."""
        if self.checkpoints is not None:
            # llama.cpp copies cells at the next evaluation, and a checkpoint that is taken or put back before is wrong.
            self.restore(other.save())
        else:
            other.cut(other.length)
            self.forget()
            self.expect()
            llama_cpp.llama_memory_seq_cp(self._memory, other.sequence, self.sequence, 0, -1)
            self.add(other.ids)
        self.cut(min(length, self.length))

    def checkpoint(self, *, prompt: bool) -> None:
        """Keep the state of a memory that cannot be cut back, as it is now."""
        assert self.checkpoints is not None
        size = llama_cpp.llama_state_seq_get_size_ext(self._context, self.sequence, _PARTIAL)
        state = np.empty(size, dtype=np.uint8)
        got = llama_cpp.llama_state_seq_get_data_ext(self._context, _bytes(state), size, self.sequence, _PARTIAL)
        if got == size:
            self.checkpoints.add(Checkpoint(self.length, state), prompt=prompt)

    def save(self) -> State:
        """What it holds, to be put back by `restore`. Raises RunError when llama.cpp refuses."""
        self.cut(self.length)  # an interrupted evaluation may have left cells beyond the mirror
        data = np.empty(self._state_size(), dtype=np.uint8)
        written = llama_cpp.llama_state_seq_get_data(self._context, _bytes(data), data.size, self.sequence)
        if written != data.size:
            raise RunError(f'member "{self._name}": llama.cpp does not give its state after {self.length} tokens')
        return State(self.ids.copy(), data, self.alone, self.checkpoints.copy() if self.checkpoints else None)

    def restore(self, state: State) -> None:
        """Hold what was there when `state` was saved; where llama.cpp refuses, it is empty then."""
        self.forget()
        self.expect()
        size = state.data.size
        if llama_cpp.llama_state_seq_set_data(self._context, _bytes(state.data), size, self.sequence) != size:
            self.forget()
            return
        self.add(state.ids)
        self.alone = state.alone
        if state.checkpoints:
            self.checkpoints = state.checkpoints.copy()

    def exchange(self, states: States, ids: IntArray, *, alone: bool) -> None:
        """Before a new prompt: keep what would be lost by it, and put back what saves most of it."""
        kept = states.best(self._name, ids, alone=alone)
        usable = self.usable(ids, alone=alone)
        if self.length - usable >= WORTH and self._state_size() <= states.budget:
            self._make_room_to_go_back()
            states.add(self._name, self.save())
        if kept and kept.usable(ids, alone=alone) >= usable + WORTH:
            self.restore(kept)

    def _state_size(self) -> int:
        return int(llama_cpp.llama_state_seq_get_size(self._context, self.sequence))

    def _remove(self, start: int) -> bool:
        """Drop cells from a position on, or all of them (-1); whether that was possible."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, self.sequence, start, -1))

    def _make_room_to_go_back(self) -> None:
        """Drop the end of what is to be saved: a state leaves out what is older than the window of its last token.

        Where a conversation goes on, the last tokens of what was said are often cut otherwise.
        """
        target = max(self.alone, self.length - WORTH)
        if self._window and self.checkpoints is None and self._has_window(target):
            self.cut(target)

    def _has_window(self, length: int) -> bool:
        """Whether it has all cells that a token behind the first `length` looks at."""
        if not self._window or length == 0:
            return True
        first: int = llama_cpp.llama_memory_seq_pos_min(self._memory, self.sequence)
        return 0 <= first <= max(0, length + 1 - self._window)

    def _shorten(self, length: int) -> None:
        self._certain = False
        self.length = length
        self.alone = self.alone if self.alone <= length else 0
        if self.checkpoints:
            self.checkpoints.cut(length)

    def _restore(self) -> None:
        """Go back to the newest checkpoint, like llama.cpp's server (tools/server/server-context.cpp), or to zero."""
        newest = self.checkpoints.newest if self.checkpoints else None
        if newest:
            self._shorten(newest.length)
            data, size = _bytes(newest.state), newest.state.size
            read = llama_cpp.llama_state_seq_set_data_ext(self._context, data, size, self.sequence, _PARTIAL)
            # The recurrent part no longer stands behind this position, so a hybrid drops its attention's cells there.
            rest = read == size and llama_cpp.llama_memory_seq_rm(self._memory, self.sequence, newest.length, -1)
            if rest and self._has_window(newest.length):
                return
        self.forget()


def _bytes(state: npt.NDArray[np.uint8]) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


_NOTHING = np.empty(0, dtype=np.uint8)
