"""CE over the union of the members' candidates, as UniTE mixes: for comparison.

Yao et al. 2024, "Determine-Then-Ensemble: Necessity of Top-k Union for Large Language Model Ensembling". Each member's
candidates are what its alignment keeps (its top-k). Then each member gives a probability to every candidate of all
members: the softmax, over these alone, of the logits of the token that is the piece, or else of the first token of the
piece's own tokenising. The mixture is the weighted mean of these.

What a member gives to a piece depends on the candidates of the others, so no strategy that runs one member at a time
can have this distribution, and ME does not.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.mixture.alignment import Distribution
from me_local.text.unified import END, UnifiedVocabulary
from me_local.text.vocabulary import Vocabulary

_UNKNOWN, _NONE = -1, -2


class Union:
    """The tokens by which each member scores the pieces of all of them."""

    def __init__(self, unified: UnifiedVocabulary, vocabularies: Sequence[Vocabulary]) -> None:
        self._pieces = unified.pieces
        self._vocabularies = tuple(vocabularies)
        self._ids = tuple(_own_ids(numbers, len(unified.pieces)) for numbers in unified.numbers)

    def distributions(
        self, kept: Mapping[int, Distribution], logits: Mapping[int, LogitArray], temperatures: Mapping[int, float]
    ) -> dict[int, Distribution]:
        """Each member's distribution over all that is `kept` by any, by the member's index.

        `logits` float32 (vocabulary,) and `temperatures` are each member's; at 0 its best candidate has probability 1.
        """
        numbers = np.unique(np.concatenate([distribution.numbers for distribution in kept.values()]))
        return {
            member: Distribution(numbers, _softmax(self._scores(member, numbers, logits[member]), temperatures[member]))
            for member in kept
        }

    def _scores(self, member: int, numbers: IntArray, logits: LogitArray) -> FloatArray:
        scores = np.full(len(numbers), -np.inf)
        for at, number in enumerate(numbers.tolist()):
            if number == END:
                scores[at] = logits[self._vocabularies[member].end_ids].max(initial=-np.inf)
            elif (token := self._token(member, number)) != _NONE:
                scores[at] = logits[token]
        return scores

    def _token(self, member: int, number: int) -> int:
        known = int(self._ids[member][number])
        if known == _UNKNOWN:
            known = self._ids[member][number] = _first_token(self._vocabularies[member], self._pieces[number])
        return known


def _own_ids(numbers: IntArray, count: int) -> IntArray:
    """The member's own id of each piece, the smallest of several, int32 (pieces,)."""
    ids = np.full(count, _UNKNOWN, dtype=np.int32)
    kept = np.flatnonzero(numbers >= 0)[::-1]
    ids[numbers[kept]] = kept
    return ids


def _first_token(vocabulary: Vocabulary, piece: bytes) -> int:
    try:
        ids = vocabulary.canonical(piece)
    except KeyError:  # part of a character, and no token for it
        return _NONE
    return ids[0] if ids else _NONE


def _softmax(scores: FloatArray, temperature: float) -> FloatArray:
    if temperature == 0:
        return np.asarray(np.arange(len(scores)) == scores.argmax(), dtype=np.float64)
    weights = np.exp((scores - scores.max()) / temperature)
    normalised: FloatArray = weights / weights.sum()
    return normalised
