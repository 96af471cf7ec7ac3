"""What all replies of an ensemble share (members, router, alignment), and what a reply asks for and gives.

Knows nothing of files, of chat, or of how a piece is drawn; see `strategies` and `generation`.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from me_local.arrays import FloatArray, IntArray
from me_local.config import Constraint, Strategy, Unit
from me_local.decoding.losses import Loss, measure
from me_local.decoding.schedule import Schedule
from me_local.decoding.shaping import Shaper, breaking
from me_local.mixture.alignment import Alignment, sufficient, top_k
from me_local.mixture.permitting import Beginnings, BoolArray
from me_local.mixture.routing import Router
from me_local.mixture.union import Union
from me_local.mixture.words import Openings
from me_local.model import Model, Row, Shortlist
from me_local.sampling import Sampling
from me_local.system.inflight import InFlight
from me_local.text.unified import UnifiedVocabulary

Result = TypeVar("Result")
Course: TypeAlias = Generator[tuple[int, ...], Mapping[int, Row], Result]
"""Yields the members, by their indices, whose logits after their contexts it needs next, and is sent these logits."""

_MOST_BREAKING = 32
"""Texts that end repetitions are those of a request: what was found of the last ones is kept."""


@dataclass(frozen=True, slots=True)
class Request:
    """What one reply is made from.

    `prompts` has each member's ids before the text, int32 (tokens,); `weights` float64 (members,) sum to 1. `head` is
    the beginning of the text, where that is given: the prompt of a raw completion, whole UTF-8 characters, with which a
    document starts. With `alone`, prompts are evaluated in one go or found whole in the cache: the reply then does not
    depend on what else was evaluated before. `parallel` says whether CE evaluates its members at the same time, each on
    its share of the cores; None: whichever is found to be faster. The numbers do not depend on it. `unit` "word" goes
    with the strategy "me" alone. `top` is how many of the likeliest pieces each draw is to name. A `constraint` says
    what the reply has to be; the head does not count, nor does a thought that it opens, which ends with `closing`. The
    end of generation comes behind `min_tokens` pieces or more; where a constraint leaves nothing else, it ends the
    reply at once. With `prefill` the head is the beginning of a reply, behind its prompt, and not that of a document;
    `given` more bytes of the text are in the prompts.
    """

    prompts: tuple[IntArray, ...]
    weights: FloatArray
    sampling: tuple[Sampling, ...]
    strategy: Strategy
    argmax: bool
    seed: int
    head: bytes = b""
    alone: bool = False
    parallel: bool | None = None
    unit: Unit = "token"
    top: int = 0
    constraint: Constraint | None = None
    prefill: bool = False
    given: int = 0
    closing: bytes = b""
    min_tokens: int = 0


FORCED = -1
"""Stands for the number of bytes that a constraint forces, which may be no piece of any member, and for the writer."""


class Draw(NamedTuple):
    """One sampled piece, or bytes that a constraint forces.

    The `number` of these is FORCED, their probability 1 and their `member` -1; no member has a share in them.

    `probability` is the piece's in the distribution that it was sampled from: the drawn member's for ME (by words,
    where another member takes over, given that the piece begins a word), the mixture's for CE. `shares` are each
    member's part in it, sum 1; `member` is the index of the largest. `top` has the likeliest
    pieces of that distribution with their probabilities, as many as the request asks for, the likeliest first; the
    empty piece is END.
    """

    number: int
    piece: bytes
    member: int
    probability: float
    shares: tuple[float, ...]
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(slots=True)
class Work:
    """What a member did for one reply: evaluations, tokens evaluated, and seconds inside llama.cpp.

    `guessed` predictions came without one, out of guesses.
    By words there are more predictions than pieces: one that only shows that a word is over is dropped.
    """

    calls: int = 0
    guessed: int = 0
    prompt_tokens: int = 0
    text_tokens: int = 0
    prompt_seconds: float = 0.0
    text_seconds: float = 0.0


def needed_logits(
    alignment: Alignment,
    strategy: Strategy,
    unit: Unit,
    sampling: Sampling,
    constraint: Constraint | None,
    lowered: int | None,
) -> int:
    """How many of a member's largest logits are enough for its distribution; 0: none but all of them.

    `lowered` is that of its `Shaper`: where so many lose at most, the largest of what is left are among so many more.
    """
    truncates = alignment is top_k and strategy != "union" and unit == "token" and constraint is None
    count = sufficient(sampling) if truncates else 0
    return count + lowered if count and lowered is not None else 0


class Engine:
    """Members, their unified vocabulary, a router and an alignment: what all replies have in common.

    `unified` is their vocabulary, where it has been made already; `whole_shares[member]` are the shares of a piece that
    this member wrote; `losses[member]` is what was lost of its first prediction, once there was one. `turns` is held
    by whoever writes a whole reply or a step of one, `steps` within that by whoever uses the members, until the logits
    have been read: so they can be closed between two steps.
    """

    def __init__(
        self,
        models: Sequence[Model],
        router: Router,
        alignment: Alignment,
        unified: UnifiedVocabulary | None = None,
    ) -> None:
        self.models = tuple(models)
        self.router = router
        self.alignment = alignment
        self.unified = unified or UnifiedVocabulary([model.vocabulary for model in models])
        identities: list[tuple[object, ...]] = []
        for model in models:
            if model.vocabulary.identity not in identities:
                identities.append(model.vocabulary.identity)
        self.groups = tuple(identities.index(model.vocabulary.identity) for model in models)
        self.schedule = Schedule(self.models)
        self.losses: dict[int, Loss] = {}
        vocabularies = [self.models[self.groups.index(group)].vocabulary for group in range(len(identities))]
        self._breaking = lru_cache(_MOST_BREAKING)(lambda group, texts: breaking(vocabularies[group], texts))
        self.turns, self.steps = InFlight(), InFlight()
        self.whole_shares = tuple(tuple(row) for row in np.eye(len(self.models)).tolist())

    def shaper(self, member: int, sampling: Sampling, min_tokens: int) -> Shaper:
        """What shapes a member's logits in a reply."""
        model = self.models[member]

        def breaks() -> BoolArray:
            return self._breaking(self.groups[member], sampling.dry_sequence_breakers)

        return Shaper(model.name, model.vocabulary, sampling, n_ctx=model.n_ctx, min_tokens=min_tokens, breaks=breaks)

    def can_write(self, member: int, strays: frozenset[int]) -> bool:
        """Whether a member has tokens for a text with these bytes that are no whole characters."""
        return self.unified.same or self.models[member].vocabulary.can_write(strays)

    def note_loss(self, member: int, row: Row) -> None:
        """Measure what is lost of a member's first prediction, if all its logits are there."""
        if member not in self.losses and not isinstance(row, Shortlist):
            self.losses[member] = measure(row, self.models[member].vocabulary)

    @cached_property
    def beginnings(self) -> Beginnings:
        """How the pieces begin."""
        return Beginnings(self.unified.pieces)

    @cached_property
    def single_bytes(self) -> tuple[BoolArray, ...]:
        """The bytes that are a piece of their own, by member: bool (256,)."""
        return tuple(self.beginnings.single(numbers) for numbers in self.unified.numbers)

    @cached_property
    def openings(self) -> Openings:
        """The pieces that begin a word."""
        return Openings(self.unified)

    @cached_property
    def union(self) -> Union:
        """What the strategy "union" mixes by."""
        return Union(self.unified, [model.vocabulary for model in self.models])
