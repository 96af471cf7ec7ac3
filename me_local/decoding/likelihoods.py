"""How probable a text is to the members and to their ensemble.

The probabilities are those of sampling at temperature 1 without truncation: a softmax over all tokens that a member
may sample. Members of one vocabulary are mixed token by token, P(token) = Σ_i λ_i p_i(token). Otherwise words are
mixed (`units` says what a word is), as an ensemble writes them that draws a member at the start of each word:

    P(text) = Π_words Σ_i λ_i P_i(word)      P_i(word) = Π p_i(token) · p_i(open | word) / p_i(open | text before)

"Open" are all pieces that begin with white space, and the end of generation: a word ends when one of them comes next,
and at the beginning of the next word it is known that one came. The first word of a continuation may begin with
anything, so there the divisor is left out, and behind the last word the text may go on in any way, so there the factor
is. P_i(text) is therefore the usual product over its tokens for each member, and for the ensemble the P(word) of all
words that are possible add up to 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.decoding.units import Cuts, Positions, token_cuts, token_starts, word_cuts
from me_local.errors import InputError, RunError
from me_local.llama.member import Member
from me_local.mixture.routing import Router, route
from me_local.mixture.words import WHITE_SPACE
from me_local.model import EvaluationInterruptedError, LoadedModel
from me_local.text.vocabulary import Vocabulary

OUTPUTS = 64
"""Tokens whose logits one evaluation gives: 67 MB of them for Gemma's 262,144 tokens."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A text to score: `text` after each member's `prompts`, int32 (tokens,), without its first `given` bytes.

    A user wrote the first `typed` bytes of it, as it is a document; None: it is a reply.
    """

    prompts: tuple[IntArray, ...]
    text: bytes
    given: int
    typed: int | None


@dataclass(frozen=True, slots=True)
class UnitScores:
    """What the members find of each unit of a passage.

    `starts` int64 (units,): where they begin in its text; `log_probabilities` float64 (members, units), in nats;
    `size` is the number of bytes that were not given.
    """

    starts: Positions
    log_probabilities: FloatArray
    size: int


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihoods of a continuation of `size` bytes, in nats: the ensemble's and each member's, in their order."""

    log_likelihood: float
    members: tuple[float, ...]
    size: int

    @property
    def bits_per_byte(self) -> float:
        """What the ensemble needs to encode the continuation."""
        return bits(self.log_likelihood) / self.size


def bits(log_likelihood: float) -> float:
    """The code length of what has this log-likelihood, in nats."""
    return -log_likelihood / math.log(2)


class Scorers:
    """Scores texts with some of the members or all; `same`: they share a vocabulary.

    Each that is needed gets a second context, which `enter` keeps.
    """

    def __init__(self, members: Sequence[LoadedModel], enter: Callable[[Member], Member], *, same: bool) -> None:
        self._members = members
        self._enter = enter
        self._same = same
        self._readers: dict[int, Reader] = {}

    def of(self, which: Sequence[int]) -> "Scorer":
        """The members with these indices. Raises InputError for one that has no likelihoods."""
        for index in which:
            member = self._members[index]
            if not isinstance(member, Member) or not member.abilities.likelihoods:
                raise InputError(
                    f'member "{member.name}": its engine ({member.abilities.engine}) does not score texts: '
                    "only members that run here have likelihoods"
                )
        return Scorer([self._reader(index) for index in which], same=self._same or len(which) == 1)

    def _reader(self, index: int) -> "Reader":
        if index not in self._readers:
            member = self._members[index]
            assert isinstance(member, Member)
            self._readers[index] = Reader(self._enter(Member(member.config, member.weights, outputs=OUTPUTS)))
        return self._readers[index]


class Scorer:
    """Members that score texts, by their `readers`. `same`: they share a vocabulary."""

    def __init__(self, readers: Sequence["Reader"], *, same: bool) -> None:
        self.readers = tuple(readers)
        self.same = same

    def units(self, passage: Passage, interrupted: Callable[[], bool] = lambda: False) -> UnitScores:
        """Score a passage under each member, unit by unit.

        Raises InputError when a member cannot write it, has no room for it, or has nothing in front of it; RunError
        when llama.cpp fails; EvaluationInterruptedError.
        """
        tokens, cuts = self._cut(passage.text, passage.given, passage.typed)
        rows = [
            reader.score(prompt, ids, starts, cuts, interrupted)
            for reader, prompt, (ids, starts) in zip(self.readers, passage.prompts, tokens, strict=True)
        ]
        return UnitScores(cuts.positions[:-1], np.array(rows), len(passage.text) - passage.given)

    def first_end(self, text: bytes) -> int:
        """Where the first unit of a document ends, in bytes. Raises InputError when a member cannot write it."""
        return int(self._cut(text, 0, len(text))[1].positions[1])

    def _cut(self, text: bytes, given: int, typed: int | None) -> tuple[list[tuple[list[int], Positions]], Cuts]:
        tokens = [reader.tokens(text, typed) for reader in self.readers]
        starts = [starts for _, starts in tokens]
        return tokens, token_cuts(starts[0], given) if self.same else word_cuts(text, starts, given)


class Reader:
    """One member, and which of its tokens are never sampled or open a word."""

    def __init__(self, member: Member) -> None:
        self._member = member
        vocabulary = member.vocabulary
        ends = set(vocabulary.end_ids)
        never = {i for i, piece in enumerate(vocabulary.pieces) if not piece} | set(vocabulary.removed)
        self._never = np.array(sorted(never - ends), dtype=np.intp)
        self._openings = np.array(sorted(ends | _openings(vocabulary) - never), dtype=np.intp)

    @property
    def vocabulary(self) -> Vocabulary:
        """Its vocabulary."""
        return self._member.vocabulary

    def tokens(self, text: bytes, typed: int | None) -> tuple[list[int], Positions]:
        """The canonical ids of a text, and where they begin in it; `typed` as in `Passage`."""
        vocabulary = self._member.vocabulary
        ids = vocabulary.canonical(text, typed=typed or 0, at_start=typed is not None)
        try:
            return ids, token_starts(vocabulary, ids, text)
        except InputError as error:
            raise InputError(f'member "{self._member.name}" cannot write this text: {error}') from None

    def rows(self, context: IntArray, start: int, interrupted: Callable[[], bool]) -> Iterator[FloatArray]:
        """The log-probabilities of all tokens after each id of a context from `start` on, float64 (vocabulary,)."""
        for logits in self._each(context, start, interrupted):
            yield logits.astype(np.float64) - self._total(logits)

    def score(
        self, prompt: IntArray, ids: list[int], starts: Positions, cuts: Cuts, interrupted: Callable[[], bool]
    ) -> FloatArray:
        """The log-probability of each unit, float64 (units,)."""
        context = np.concatenate([prompt, np.array(ids, dtype=np.int32)])
        borders = np.searchsorted(starts, cuts.positions)  # the tokens with which units begin
        first = len(prompt) + int(borders[0])
        self._require_room(first, len(context))
        opens = np.zeros(len(ids) + 1, dtype=np.bool_)
        opens[borders] = cuts.opens
        rows = self._each(context[:-1], first - 1, interrupted)
        wanted = zip(rows, context[first:], opens[borders[0] : -1], strict=True)
        scored = [self._read(row, token, at_border) for row, token, at_border in wanted]
        tokens, opening = np.array(scored).T
        at = borders - borders[0]
        units = np.add.reduceat(tokens, at[:-1])
        units -= opening[at[:-1]]
        units[:-1] += opening[at[1:-1]]
        return units

    def _require_room(self, first: int, length: int) -> None:
        member = self._member
        if first == 0:
            raise InputError(
                f'member "{member.name}" has nothing in front of the text to score: give a longer prompt, '
                "which ends at the end of a word"
            )
        if length > member.n_ctx:
            raise InputError(
                f'prompt and continuation have {length} tokens for member "{member.name}", which exceeds the available '
                f"context size of {member.n_ctx}: shorten them, or raise n_ctx"
            )

    def _each(self, context: IntArray, start: int, interrupted: Callable[[], bool]) -> Iterator[LogitArray]:
        """The logits of what may be sampled, and minus infinity for the rest."""
        for logits in self._member.each_logits(context, start):
            if interrupted():
                raise EvaluationInterruptedError("stopped while the text was scored")
            logits[self._never] = -np.inf
            yield logits

    def _read(self, logits: LogitArray, token: np.int32, opens: np.bool_) -> tuple[float, float]:
        """The log-probability of a token and, where it opens a word, of all that do; else 0."""
        total = self._total(logits)
        return float(logits[token]) - total, _log_sum(logits[self._openings]) - total if opens else 0.0

    def _total(self, logits: LogitArray) -> float:
        total = _log_sum(logits)
        if not math.isfinite(total):
            raise RunError(f'member "{self._member.name}": NaN or infinite logits')
        return total


def _log_sum(logits: LogitArray) -> float:
    """The logarithm of Σ exp(logits)."""
    top = logits.max()
    return float(top) + math.log(np.exp(logits - top).sum(dtype=np.float64))


def _openings(vocabulary: Vocabulary) -> set[int]:
    return {i for i, piece in enumerate(vocabulary.pieces) if piece[:1] and piece[0] in WHITE_SPACE}


def unit_weights(router: Router, passage: Passage, scores: UnitScores, weights: FloatArray) -> FloatArray:
    """The router's weights at the start of each unit, float64 (members, units). Raises RunError."""
    able = [True] * len(weights)
    return np.array([route(router, passage.text[:start], weights, able) for start in scores.starts.tolist()]).T


def mixed(log_probabilities: FloatArray, weights: FloatArray) -> FloatArray:
    """The log-probability of each unit in the mixture, float64 (units,): log Σ_i weights_i · P_i.

    `log_probabilities` (members, units); `weights` (members, units), or (members, 1) where they are constant.
    """
    top = log_probabilities.max(axis=0)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total: FloatArray = top + np.log((weights * np.exp(log_probabilities - top)).sum(axis=0))
    return total
