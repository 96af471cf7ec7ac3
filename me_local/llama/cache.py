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

from me_local.arrays import IntArray
from me_local.errors import RunError
from me_local.llama.checkpoints import Checkpoint, Checkpoints
from me_local.llama.origin import Origin
from me_local.llama.states import WORTH, State, States, common_length

_PARTIAL = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY  # of a state, only what cannot be cut back


class Cache:
    """The cells of one sequence.

    `name` is the member's, for errors; `window` the number of tokens that a layer with a sliding window looks back at,
    or 0; `evicts` says whether what a window has passed is lost; `recurrent` whether the memory is, or has beside its
    cells, a state that cannot be cut back.
    """

    def __init__(
        self,
        context: llama_cpp.llama_context_p,
        sequence: int,
        *,
        name: str,
        cells: int,
        window: int,
        evicts: bool,
        recurrent: bool,
    ) -> None:
        self.sequence = sequence
        self.length = 0
        self.checkpoints = Checkpoints() if evicts or recurrent else None
        self._recurrent = recurrent
        self._ends: tuple[int, ...] = ()  # see `Origin`; whether cells were lost is asked of llama.cpp
        self._certain = True  # that the memory holds the mirror's ids and no more
        self._sequences: int = llama_cpp.llama_n_seq_max(context)
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)
        self._name = name
        self._window = window
        self._mirror = np.empty(cells, dtype=np.int32)

    @property
    def ids(self) -> IntArray:
        """What it holds: int32 view (tokens,)."""
        return self._mirror[: self.length]

    @property
    def origin(self) -> Origin:
        """How what it holds came there."""
        return Origin(() if self._first() > 0 else self._ends, self.checkpoints.lengths if self.checkpoints else ())

    def expect(self) -> None:
        """Note that tokens are about to come behind the mirror; if that fails, anything may be there."""
        self._certain = False

    def add(self, ids: IntArray) -> None:
        """Note that these were evaluated behind the others."""
        end = self.length + len(ids)
        self._mirror[self.length : end] = ids
        self.length = end
        self._certain = True

    def note(self, start: int) -> None:
        """Note that what it holds from `start` on came by a batch of its own; see `Origin`."""
        if start == (self._ends[-1] if self._ends else 0):
            self._ends = (*self._ends, self.length)

    def common(self, ids: IntArray, most: int) -> int:
        """The length of the prefix that it has in common with `ids`, at most `most`."""
        return common_length(self.ids, ids[:most])

    def cut(self, length: int) -> int:
        """Shorten it to `length` tokens, or to fewer where that is not possible, and return how many it holds then."""
        if length == self.length and self._certain:
            return length
        if length == 0:
            self.forget()
            return 0
        # The mirror goes first: one that is short of the memory is mended here, one beyond it would go unnoticed.
        self._shorten(length)
        if not self._remove(length) or not self._has_window(length):
            self._restore()
        self._certain = True
        return self.length

    def forget(self) -> None:
        """Empty it."""
        if self.length == 0 and self._certain:
            return
        self._shorten(0)
        self._remove(-1)
        # Where no other has tokens either, the next cell to be taken is the first again.
        if all(llama_cpp.llama_memory_seq_pos_max(self._memory, other) < 0 for other in range(self._sequences)):
            llama_cpp.llama_memory_clear(self._memory, True)
        self._certain = True

    def usable(self, ids: IntArray, wanted: Origin | None = None) -> int:
        """How many of `ids` need not be evaluated again; `wanted` as in `State.usable`."""
        return State(self.ids, _NOTHING, self.origin, self._reach(self._first()), self.checkpoints).usable(ids, wanted)

    def lendable(self, ids: IntArray) -> int:
        """How many of `ids` need not be evaluated in a cache that borrows what is here."""
        return self.usable(ids) if self.checkpoints is None else self._state(_NOTHING).usable(ids)

    def borrow(self, other: "Cache", length: int) -> None:
        """Hold the first `length` tokens of another sequence, which are lendable, instead of what is there."""
        if self.checkpoints is not None:
            # llama.cpp copies cells at the next evaluation, and a checkpoint that is taken or put back before is wrong.
            self.restore(other.save())
        else:
            other.cut(other.length)  # an interrupted evaluation may have left cells beyond the mirror
            self.forget()
            self.expect()
            llama_cpp.llama_memory_seq_cp(self._memory, other.sequence, self.sequence, 0, -1)
            self.add(other.ids)
        self._ends = ()  # nobody asks how what is borrowed came there, so it is not followed
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
        return self._state(data)

    def restore(self, state: State) -> None:
        """Hold what was there when `state` was saved; where llama.cpp refuses, it is empty then."""
        self.forget()
        self.expect()
        size = state.data.size
        if llama_cpp.llama_state_seq_set_data(self._context, _bytes(state.data), size, self.sequence) != size:
            self.forget()
            return
        self.add(state.ids)
        self._ends = state.origin.ends
        if state.checkpoints:
            self.checkpoints = state.checkpoints.copy()

    def exchange(self, states: States, ids: IntArray, wanted: Origin | None) -> None:
        """Before a new prompt: keep what would be lost by it, and put back what saves most of it.

        `wanted` as in `State.usable`.
        """
        kept = states.best(self._name, ids, wanted)
        usable = self.usable(ids, wanted)
        if self.length - usable >= WORTH and self._state_size() <= states.budget:
            self._make_room_to_go_back()
            states.add(self._name, self.save())
        if kept and kept.usable(ids, wanted) >= usable + WORTH:
            self.restore(kept)

    def _state(self, data: npt.NDArray[np.uint8]) -> State:
        """What it holds, with the contents that llama.cpp wrote: without the cells that its last token's window passed.

        These are then the first ones, of one token more than the next one looks at.
        """
        first = max(self._first(), self.length - self._window) if self._window else 0
        checkpoints = self.checkpoints.copy() if self.checkpoints else None
        origin = Origin(self._ends if first == 0 else (), checkpoints.lengths if checkpoints else ())
        return State(self.ids.copy(), data, origin, self._reach(first), checkpoints)

    def _reach(self, first: int) -> int:
        """The least number of tokens that it can be cut back to, where the first cell of a window is of this token."""
        if self._recurrent:
            return self.length
        return min(first + self._window - 1, self.length) if first > 0 else 0

    def _first(self) -> int:
        """The position of the first token of which the layers with a window have the cell; -1 where it is empty."""
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, self.sequence)) if self._window else 0

    def _state_size(self) -> int:
        return int(llama_cpp.llama_state_seq_get_size(self._context, self.sequence))

    def _remove(self, start: int) -> bool:
        """Drop cells from a position on, or all of them (-1); whether that was possible."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, self.sequence, start, -1))

    def _make_room_to_go_back(self) -> None:
        """Drop the end of what is to be saved: a state leaves out what is older than the window of its last token.

        Where a conversation goes on, the last tokens of what was said are often cut otherwise.
        """
        target = max((*self._ends[-1:], self.length - WORTH))
        if self._window and self.checkpoints is None and self._has_window(target):
            self.cut(target)

    def _has_window(self, length: int) -> bool:
        """Whether it has all cells that a token behind the first `length` looks at."""
        return not self._window or length == 0 or 0 <= self._first() <= max(0, length + 1 - self._window)

    def _shorten(self, length: int) -> None:
        self._certain = False
        self.length = length
        self._ends = tuple(end for end in self._ends if end <= length)
        if self.checkpoints:
            self.checkpoints.cut(length)

    def _restore(self) -> None:
        """Go back to the newest checkpoint, like llama.cpp's server (tools/server/server-context.cpp), or to zero."""
        newest = self.checkpoints.newest if self.checkpoints else None
        if newest:
            self._shorten(newest.length)
            if not self._recurrent:  # it is cells that come back, to wherever there are free ones
                self._ends = ()
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
