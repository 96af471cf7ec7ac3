"""How the tokens that a memory holds came there: what the next numbers depend on, besides the tokens.

Sums round otherwise where a batch is cut otherwise, and where keys and values lie in other cells. So a request that
must not depend on what was made before (`alone`) may go on behind tokens in a cache only if a fresh evaluation would
have left the same numbers in the same cells. What is relied on, of llama.cpp's llama-kv-cache.cpp:

- `find_slot` searches from the head, which `clear` sets to 0, a batch to the cell behind its last, and `seq_rm` to the
  first cell that it frees, if that lies before. So each token is in the cell of its position, also after cuts, as long
  as the memory began empty and no cell was taken twice.
- A cell is taken twice only where a window has passed it (`is_masked_swa`) and no cell is left behind the head, which
  happens with `swa_full = false`. The first position that the memory holds is above 0 then, and stays so.
- `state_read` puts the cells of a state from the head on, in the order in which they were. `state_write` leaves out
  what the window has passed; then, too, the first position is above 0, and the others are in other cells than before.
- A checkpoint of a window (`PARTIAL_ONLY`) is put where the cells that it replaces began, which can be anywhere.
- A recurrent memory is one cell, of which the number is in no sum. Its state comes back as it was, and so do the
  attention's cells beside it, which are cut at the same position.
- Cells that hold no token, or one that is masked, add exactly 0 to a sum.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origin:
    """How the first tokens of a memory came there: into an empty one, each in its own cell, by batches of them alone.

    The batches ended after so many tokens each (`ends`), in growing order; what lies behind the last of them came
    otherwise, and where a cell was moved there is none. After some of them the state was kept (`checkpoints`): where
    a memory cannot be cut, these decide how a text that changes is evaluated again.
    """

    ends: tuple[int, ...] = ()
    checkpoints: tuple[int, ...] = ()

    def upto(self, length: int) -> "Origin":
        """That of the first `length` tokens, of a batch that is cut by this none."""
        return Origin(_upto(self.ends, length), _upto(self.checkpoints, length))

    def after(self, length: int) -> "Origin":
        """What is left of it behind the first `length` tokens."""
        ends, checkpoints = len(_upto(self.ends, length)), len(_upto(self.checkpoints, length))
        return Origin(self.ends[ends:], self.checkpoints[checkpoints:])

    def shared(self, other: "Origin", most: int) -> int:
        """How many tokens, at most `most`, came the same way in both."""
        same = (end for end in reversed(_upto(self.ends, most)) if self.upto(end) == other.upto(end))
        return next(same, 0)


def in_batches(start: int, stops: Iterable[int], end: int, size: int) -> Origin:
    """That of the tokens from `start` to `end`, in batches of at most `size`, with checkpoints after `stops` of all."""
    checkpoints, ends = tuple(stops), list[int]()
    for stop in (*checkpoints, end):
        ends += range(start + size, stop, size)
        if stop not in ends and stop:
            ends.append(stop)
        start = stop
    return Origin(tuple(ends), checkpoints)


def _upto(lengths: tuple[int, ...], most: int) -> tuple[int, ...]:
    return tuple(length for length in lengths if length <= most)
