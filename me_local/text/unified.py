"""The vocabulary that members share: all their pieces, numbered once, so that mixing is arithmetic on arrays."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from me_local.arrays import IntArray
from me_local.text.vocabulary import Vocabulary

END = 0
"""The number of the end of generation in every unified vocabulary."""


class UnifiedVocabulary:
    """All pieces of all members, numbered once.

    `pieces[number]` are bytes, with `pieces[END]` empty; `numbers[member][id]` is int32, -1 for ids that are never
    sampled. Ids with the same bytes have the same number, and every end-of-generation id is END; but where
    `same` is true, all members share one vocabulary and each id keeps a number of its own, id + 1.
    """

    def __init__(self, vocabularies: Sequence[Vocabulary]) -> None:
        self.same = all(v.identity == vocabularies[0].identity for v in vocabularies)
        self._number_of: dict[bytes, int] = {b"": END}
        self.numbers = tuple(self._numbers(vocabulary) for vocabulary in vocabularies)
        self.pieces: list[bytes] = [b"", *vocabularies[0].pieces] if self.same else list(self._number_of)

    def _numbers(self, vocabulary: Vocabulary) -> IntArray:
        numbers = np.arange(1, vocabulary.size + 1) if self.same else self._shared_numbers(vocabulary.pieces)
        numbers[vocabulary.empty] = -1
        numbers[vocabulary.removed] = -1
        numbers[vocabulary.end_ids] = END
        return numbers.astype(np.int32)

    def _shared_numbers(self, pieces: list[bytes]) -> npt.NDArray[np.int64]:
        known = self._number_of
        # A piece that is not known gets the number of those that are: known.setdefault(piece, len(known))
        numbers = map(known.setdefault, pieces, map(len, itertools.repeat(known)))
        return np.fromiter(numbers, np.int64, len(pieces))
