"""The loop: route, sync, align, sample, append.

A `Generation` is one reply in the making. Its state is the text, as bytes; each member's context is its prompt
followed by the canonical ids of that text. ME draws one member by the weights and samples from its distribution; CE
runs all of them and samples from the mixture. Both use the same distributions, so that replies have the same
probability under both. "union" is CE with another mixture, for comparison. Knows nothing of files, of chat, or of when
a reply should stop.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from me_local.alignment import Alignment, Distribution, FloatArray, LogitArray, argmax, mix, pick, sample
from me_local.config import Sampling, Strategy
from me_local.errors import RunError
from me_local.member import Evaluated
from me_local.routing import Router, route
from me_local.union import Union
from me_local.vocabulary import END, IntArray, SampledText, TokenizedText, UnifiedVocabulary, Vocabulary, utf8_runs

log = logging.getLogger(__name__)


class Model(Protocol):
    """What the engine needs of a member."""

    name: str
    n_ctx: int
    vocabulary: Vocabulary

    def prepare(self, ids: IntArray, interrupted: Callable[[], bool], *, final: int, alone: bool) -> Evaluated:
        """Bring the member's cache to exactly `ids`; with `alone`, by an evaluation of nothing else.

        The first `final` ids stay as they are in this reply.
        """

    def sync(self, ids: IntArray, interrupted: Callable[[], bool], *, final: int) -> Evaluated:
        """Bring the member's cache to exactly `ids`; `final` as in `prepare`."""

    def logits(self) -> LogitArray:
        """The logits after the last `sync`, once they are there."""


@dataclass(frozen=True, slots=True)
class Request:
    """What one reply is made from.

    `prompts` has each member's ids before the text, int32 (tokens,); `weights` float64 (members,) sum to 1. `head` is
    the beginning of the text, where that is given: the prompt of a raw completion, whole UTF-8 characters, with which a
    document starts. With `alone`, prompts are evaluated in one go or found whole in the cache: the reply then does not
    depend on what else was evaluated before.
    """

    prompts: tuple[IntArray, ...]
    weights: FloatArray
    sampling: tuple[Sampling, ...]
    strategy: Strategy
    argmax: bool
    seed: int
    head: bytes = b""
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampled piece.

    `probability` is the piece's in the distribution that it was sampled from: the drawn member's for ME, the
    mixture's for CE. `shares` are each member's part in it, sum 1; `member` is the index of the largest.
    """

    number: int
    piece: bytes
    member: int
    probability: float
    shares: tuple[float, ...]


@dataclass(slots=True)
class Work:
    """What a member did for one reply: pieces predicted, tokens evaluated, and seconds inside llama.cpp."""

    calls: int = 0
    prompt_tokens: int = 0
    text_tokens: int = 0
    prompt_seconds: float = 0.0
    text_seconds: float = 0.0


class Engine:
    """Members, their unified vocabulary, a router and an alignment: what all replies have in common."""

    def __init__(self, models: Sequence[Model], router: Router, alignment: Alignment) -> None:
        self.models = tuple(models)
        self.router = router
        self.alignment = alignment
        self.unified = UnifiedVocabulary([model.vocabulary for model in models])
        identities: list[tuple[object, ...]] = []
        for model in models:
            if model.vocabulary.identity not in identities:
                identities.append(model.vocabulary.identity)
        self.groups = tuple(identities.index(model.vocabulary.identity) for model in models)

    @cached_property
    def union(self) -> Union:
        """What the strategy "union" mixes by."""
        return Union(self.unified, [model.vocabulary for model in self.models])


@dataclass(slots=True)
class Text:
    """The text so far, with the bytes in it that are not, or not yet, part of a whole UTF-8 character."""

    whole: bytes = b""
    strays: frozenset[int] = frozenset()
    _past_strays: frozenset[int] = field(default=frozenset(), repr=False)
    _open: bytes = field(default=b"", repr=False)

    def append(self, piece: bytes) -> None:
        """Add the bytes of a piece."""
        self.whole += piece
        runs = list(utf8_runs(self._open + piece))
        self._open = runs.pop()[0] if runs and _may_continue(runs[-1]) else b""
        stray = b"".join(run for run, valid in runs if not valid)
        self._past_strays |= frozenset(stray)
        self.strays = self._past_strays | frozenset(self._open)


def _may_continue(run: tuple[bytes, bool]) -> bool:
    """Whether a last run of bytes is the beginning of a character that is still to be completed."""
    text, valid = run
    if valid:
        return False
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


class Generation:
    """One reply in the making; each `step` samples one piece and appends it.

    `text` starts with the request's head; `given[member]` is the number of tokens in prompt and head, `work[member]`
    counts what the member did.
    """

    def __init__(self, engine: Engine, request: Request, interrupted: Callable[[], bool]) -> None:
        self._engine = engine
        self._request = request
        self._interrupted = interrupted
        self._text = Text()
        self._text.append(request.head)
        self._contexts = self._make_contexts()
        self.given = tuple(
            len(prompt) + len(context.ids(request.head))
            for prompt, context in zip(request.prompts, self._contexts, strict=True)
        )
        self.work = tuple(Work() for _ in engine.models)
        route_seed, piece_seed = np.random.SeedSequence(request.seed).spawn(2)
        self._route_random = np.random.default_rng(route_seed)
        self._piece_random = np.random.default_rng(piece_seed)

    @property
    def text(self) -> bytes:
        """Head and reply so far."""
        return self._text.whole

    def ids(self, member: int) -> IntArray:
        """A member's context: its prompt and the canonical ids of the text, int32 (tokens,)."""
        return np.concatenate([self._request.prompts[member], self._contexts[member].ids(self.text)])

    def mixture(self) -> Distribution:
        """The ensemble's distribution over the next piece, from which CE samples. Raises what `step` raises."""
        return self._mixture(self._weights())[0]

    def step(self) -> Draw | None:
        """Sample the next piece and append it to the text; None when a member's context has no room for the text.

        Raises RunError when a member fails, `member.EvaluationInterruptedError` when the user stops it; the text is
        then as before.
        """
        weights = self._weights()
        # Members that are not drawn count too: where a reply ends must not depend on the route.
        if not all(self._fits(int(i)) for i in np.flatnonzero(weights)):
            return None
        draw = self._step_me(weights) if self._request.strategy == "me" else self._step_ce(weights)
        if draw.number != END:
            self._append(draw)
        return draw

    def _step_me(self, weights: FloatArray) -> Draw:
        member = pick(weights, self._route_random.random())
        distribution = self._predict(member)
        number, probability = sample(distribution, self._piece_random.random())
        shares = tuple(float(i == member) for i in range(len(weights)))
        return Draw(number, self._engine.unified.pieces[number], member, probability, shares)

    def _step_ce(self, weights: FloatArray) -> Draw:
        mixture, distributions = self._mixture(weights)
        uniform = self._piece_random.random()
        number, probability = argmax(mixture) if self._request.argmax else sample(mixture, uniform)
        parts = np.zeros(len(weights))
        for member, distribution in distributions.items():
            parts[member] = weights[member] * distribution.of(number)
        parts /= parts.sum()
        piece = self._engine.unified.pieces[number]
        return Draw(number, piece, int(parts.argmax()), probability, tuple(parts.tolist()))

    def _mixture(self, weights: FloatArray) -> tuple[Distribution, dict[int, Distribution]]:
        """The mixture, and the distribution of each member with a weight above 0."""
        distributions = {int(i): self._predict(int(i)) for i in np.flatnonzero(weights)}
        if self._request.strategy == "union":
            logits = {i: self._engine.models[i].logits() for i in distributions}
            temperatures = {i: self._request.sampling[i].temperature for i in distributions}
            distributions = self._engine.union.distributions(distributions, logits, temperatures)
        return mix(list(distributions.values()), [weights[i] for i in distributions]), distributions

    def _predict(self, member: int) -> Distribution:
        """The member's distribution over the next piece, after bringing it up to date."""
        model = self._engine.models[member]
        ids = self.ids(member)
        final = len(self._request.prompts[member]) + self._contexts[member].final
        if self.work[member].calls == 0:
            self._prepare(member, ids, final)
        evaluated = model.sync(ids, self._interrupted, final=final)
        self._count(member, evaluated, len(ids))
        return self._align(member)

    def _align(self, member: int) -> Distribution:
        """The member's distribution over pieces, of the logits that it gave last."""
        model, work = self._engine.models[member], self.work[member]
        started = time.perf_counter()
        logits = model.logits()
        work.text_seconds += time.perf_counter() - started
        try:
            return self._engine.alignment(logits, self._engine.unified.numbers[member], self._request.sampling[member])
        except Exception as error:  # ValueError, and whatever the alignment of another package may raise
            log.debug("alignment failed", exc_info=True)
            raise RunError(f'member "{model.name}", after {len(self.text)} bytes of text: {error}') from None

    def _prepare(self, member: int, ids: IntArray, final: int) -> None:
        """Evaluate the prompt but for its last token, and drop what an earlier reply left behind it.

        Logits differ a little with the size of a batch. This way a seed gives the same reply when the prompt is
        evaluated and when it is found in the cache.
        """
        given, alone = ids[: self.given[member] - 1], self._request.alone
        evaluated = self._engine.models[member].prepare(given, self._interrupted, final=final, alone=alone)
        self.work[member].prompt_tokens += evaluated.tokens
        self.work[member].prompt_seconds += evaluated.seconds

    def _count(self, member: int, evaluated: Evaluated, length: int) -> None:
        work = self.work[member]
        of_prompt = max(0, self.given[member] - (length - evaluated.tokens))
        work.calls += 1
        work.prompt_tokens += of_prompt
        work.text_tokens += evaluated.tokens - of_prompt
        work.text_seconds += evaluated.seconds

    def _append(self, draw: Draw) -> None:
        self._text.append(draw.piece)
        if self._engine.unified.same:
            sampled = self._contexts[0]
            assert isinstance(sampled, SampledText)
            sampled.append(draw.number - 1)

    def _weights(self) -> FloatArray:
        able = [self._can_write(model.vocabulary) for model in self._engine.models]
        return route(self._engine.router, self.text, self._request.weights, able)

    def _can_write(self, vocabulary: Vocabulary) -> bool:
        return self._engine.unified.same or vocabulary.can_write(self._text.strays)

    def _fits(self, member: int) -> bool:
        room = self._engine.models[member].n_ctx - len(self._request.prompts[member])
        # A token has a byte at least, but for a space that the tokenizer may put in front.
        return len(self.text) + 1 <= room or len(self._contexts[member].ids(self.text)) <= room

    def _make_contexts(self) -> Sequence[TokenizedText | SampledText]:
        models, head = self._engine.models, self._request.head
        at_start = bool(head)
        if self._engine.unified.same:
            shared = SampledText(models[0].vocabulary.encode(head, at_start=at_start))
            return [shared] * len(models)
        texts: dict[int, TokenizedText] = {}
        for group, model in zip(self._engine.groups, models, strict=True):
            texts.setdefault(group, TokenizedText(model.vocabulary, at_start=at_start))
        return [texts[group] for group in self._engine.groups]
