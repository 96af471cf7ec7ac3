"""What penalties, biases and the least length of a reply make of one member's logits, before anything else.

All of it follows from the member's logits, its own context and the position alone, so that ME and CE go on sampling the
same distribution. A row that is to change is copied: the next evaluation needs it as it was.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from me_local.arrays import IntArray, LogitArray
from me_local.mixture.penalties import BoolArray, penalised, repeated, repetitions, window
from me_local.model import Row, Shortlist
from me_local.sampling import Bias, Sampling
from me_local.text.vocabulary import Vocabulary


class Shaper:
    """Shapes the logits of a member with this name and vocabulary in one reply.

    `lowered` is the largest number of ids that become less likely, of a context of at most `n_ctx` tokens; None where
    others may become likelier, so that all logits are needed. `banned` are the ids that never come, int32 (ids,). The
    end of generation does not come before `min_tokens` pieces; its ids are spared by penalties, since prompts are full
    of them. `breaks` are the ids that end what DRY calls a repetition, bool (vocabulary,); see `breaking`.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        sampling: Sampling,
        *,
        n_ctx: int,
        min_tokens: int,
        breaks: Callable[[], BoolArray],
    ) -> None:
        self._sampling = sampling
        self._min_tokens = min_tokens
        self._ends = np.array(vocabulary.end_ids, dtype=np.int32)
        self._penalises = sampling.repeat_last_n != 0 and (
            (sampling.repeat_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)
        )
        self._dry = sampling.dry_multiplier > 0 and sampling.dry_penalty_last_n != 0
        self._breaks = breaks() if self._dry else np.zeros(0, dtype=bool)
        self._biased, self._biases = biases_of(name, vocabulary, sampling.logit_bias)
        self.banned = self._biased[self._biases == -math.inf]
        self.lowered = self._most_lowered(n_ctx)

    @property
    def changes(self) -> bool:
        """Whether it ever changes anything."""
        return self._penalises or self._dry or self._min_tokens > 0 or len(self._biased) > 0

    def _most_lowered(self, n_ctx: int) -> int | None:
        sampling = self._sampling
        raises = sampling.repeat_penalty < 1 or min(sampling.presence_penalty, sampling.frequency_penalty) < 0
        if (self._penalises and raises) or (self._biases > 0).any():
            return None
        windows = [
            window(n_ctx, sampling.repeat_last_n) if self._penalises else 0,
            window(n_ctx, sampling.dry_penalty_last_n) if self._dry else 0,
        ]
        return max(windows) + len(self._biased) + (len(self._ends) if self._min_tokens else 0)

    def shape(self, row: Row, context: Callable[[], IntArray], written: int) -> Row:
        """The row after a context, where so many pieces of the reply are written."""
        ended = written >= self._min_tokens
        if ended and not (self._penalises or self._dry or len(self._biased)):
            return row
        changed = _Copy(row)
        if self._penalises or self._dry:
            self._penalise(changed, context())
        changed.add(self._biased, self._biases)
        if not ended:
            changed.add(self._ends, np.full(len(self._ends), -np.inf, dtype=np.float32))
        return changed.row

    def _penalise(self, changed: "_Copy", context: IntArray) -> None:
        if self._penalises:
            ids, counts = repeated(context, self._ends, self._sampling)
            at, known = changed.find(ids)
            changed.logits[at] = penalised(changed.logits[at], counts[known], self._sampling)
        if self._dry:
            ids, losses = repetitions(context, self._breaks, self._sampling)
            kept = ~np.isin(ids, self._ends)
            changed.add(ids[kept], -losses[kept])


class _Copy:
    """A row that may be changed; ids that a shortlist lacks are left out."""

    def __init__(self, row: Row) -> None:
        self._ids = row.ids if isinstance(row, Shortlist) else None
        self.logits = (row.logits if isinstance(row, Shortlist) else row).copy()

    @property
    def row(self) -> Row:
        """What has become of it."""
        return self.logits if self._ids is None else Shortlist(self._ids, self.logits)

    def find(self, ids: IntArray) -> tuple[IntArray, BoolArray]:
        """Where the ids are that are there, and which of them these are."""
        if self._ids is None:
            return ids, np.ones(len(ids), dtype=bool)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        known = self._ids[at] == ids
        return at[known].astype(np.int32), known

    def add(self, ids: IntArray, amounts: LogitArray) -> None:
        """Add to the logits of distinct ids."""
        at, known = self.find(ids)
        self.logits[at] += amounts[known]


def biases_of(name: str, vocabulary: Vocabulary, biases: Sequence[Bias]) -> tuple[IntArray, LogitArray]:
    """The ids that have a bias in the vocabulary of a member with this name, ascending, and these, float32 (ids,).

    Several of one id add up. An id that is not in the vocabulary is that of another member, who is asked alone.
    """
    found: dict[int, float] = {}
    for bias in biases:
        if bias.member not in (None, name):
            continue
        for id_ in vocabulary.ids_of.get(bias.of.encode(), []) if isinstance(bias.of, str) else [bias.of]:
            found[id_] = found.get(id_, 0.0) + bias.value
    ids = sorted(id_ for id_ in found if id_ < vocabulary.size)
    return np.array(ids, dtype=np.int32), np.array([found[id_] for id_ in ids], dtype=np.float32)


def breaking(vocabulary: Vocabulary, texts: Sequence[str]) -> BoolArray:
    """Which ids have one of the texts in their piece, bool (vocabulary,)."""
    ends = np.cumsum([len(piece) for piece in vocabulary.pieces])
    joined = np.frombuffer(b"".join(vocabulary.pieces), dtype=np.uint8)
    found = np.zeros(vocabulary.size, dtype=bool)
    for text in (text.encode() for text in texts):
        begins = np.flatnonzero(joined[: max(0, len(joined) - len(text) + 1)] == text[0])
        for offset, byte in enumerate(text[1:], start=1):
            begins = begins[joined[begins + offset] == byte]
        ids = np.searchsorted(ends, begins, side="right")
        found[ids[begins + len(text) <= ends[ids]]] = True
    return found
