"""The loop: route, sync, align, sample, append.

A `Generation` is one reply in the making. Its state is the text, as bytes; each member's context is its prompt
followed by the canonical ids of that text. ME draws one member by the weights and samples from its distribution; CE
runs all of them and samples from the mixture. Both use the same distributions, so that replies have the same
probability under both. By words (`words`), ME draws a member for each word instead of each piece. "union" is CE
with another mixture, for comparison. Knows nothing of files, of chat, or of when a reply should stop.

A step is a `Course`: it says which members' logits it needs, and goes on once it gets them. `Generation.step` gets them
from the members for this one reply; `batching` gets those of several replies at once.
"""

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from me_local.config import Sampling, Strategy, Unit
from me_local.decoding.losses import Loss, measure
from me_local.decoding.schedule import Schedule
from me_local.errors import RunError
from me_local.llama.member import Evaluated
from me_local.llama.shortlist import Row, Shortlist, split
from me_local.mixture.alignment import Alignment, Distribution, FloatArray, argmax, mix, pick, sample, sufficient, top_k
from me_local.mixture.routing import Router, route
from me_local.mixture.union import Union
from me_local.mixture.words import Openings, is_free, may_end
from me_local.system.inflight import InFlight
from me_local.text.growing import Text
from me_local.text.vocabulary import END, IntArray, SampledText, TokenizedText, UnifiedVocabulary, Vocabulary

log = logging.getLogger(__name__)

_UNIFORMS = 64

Result = TypeVar("Result")
Course: TypeAlias = Generator[tuple[int, ...], Mapping[int, Row], Result]
"""Yields the members, by their indices, whose logits after their contexts it needs next, and is sent these logits."""


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

    def shorten(self, count: int, numbers: IntArray) -> None:
        """From now on so many of the largest logits are enough, of ids whose number is not negative; 0: all of them."""

    def logits(self) -> Row:
        """The logits after the last `sync`, once they are there; more of them than are enough may come."""

    @property
    def divisible(self) -> bool:
        """Whether numbers do not depend on the number of threads; see `schedule`."""

    def share_cores(self, parts: int) -> None:
        """Evaluate with a part of the cores, one of so many, from now on, where it is divisible."""


@dataclass(frozen=True, slots=True)
class Request:
    """What one reply is made from.

    `prompts` has each member's ids before the text, int32 (tokens,); `weights` float64 (members,) sum to 1. `head` is
    the beginning of the text, where that is given: the prompt of a raw completion, whole UTF-8 characters, with which a
    document starts. With `alone`, prompts are evaluated in one go or found whole in the cache: the reply then does not
    depend on what else was evaluated before. `parallel` says whether CE evaluates its members at the same time, each on
    its share of the cores; None: whichever is found to be faster. The numbers do not depend on it. `unit` "word" goes
    with the strategy "me" alone. `top` is how many of the likeliest pieces each draw is to name.
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


class Draw(NamedTuple):
    """One sampled piece.

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
    """What a member did for one reply: predictions made, tokens evaluated, and seconds inside llama.cpp.

    By words there are more predictions than pieces: one that only shows that a word is over is dropped.
    """

    calls: int = 0
    prompt_tokens: int = 0
    text_tokens: int = 0
    prompt_seconds: float = 0.0
    text_seconds: float = 0.0


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
        self.turns, self.steps = InFlight(), InFlight()
        self.whole_shares = tuple(tuple(row) for row in np.eye(len(self.models)).tolist())

    def note_loss(self, member: int, row: Row) -> None:
        """Measure what is lost of a member's first prediction, if all its logits are there."""
        if member not in self.losses and not isinstance(row, Shortlist):
            self.losses[member] = measure(row, self.models[member].vocabulary)

    @cached_property
    def openings(self) -> Openings:
        """The pieces that begin a word."""
        return Openings(self.unified)

    @cached_property
    def union(self) -> Union:
        """What the strategy "union" mixes by."""
        return Union(self.unified, [model.vocabulary for model in self.models])


class Generation:
    """One reply in the making; each `step` samples one piece and appends it.

    `text` starts with the request's head; `given[member]` is the number of tokens in prompt and head, `work[member]`
    counts what the member did; `sufficient[member]` of its largest logits are enough for its distribution (0: none but
    all of them). `route` gives the random numbers by which members are drawn, in [0, 1); where there is
    none they follow from the seed.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        interrupted: Callable[[], bool] = lambda: False,
        *,
        route: Callable[[], float] | None = None,
    ) -> None:
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
        self._rooms = tuple(
            model.n_ctx - len(prompt) for model, prompt in zip(engine.models, request.prompts, strict=True)
        )
        # A token has a byte at least, but for a space that the tokenizer may put in front. Where characters are changed
        # before, there may be more tokens than bytes.
        self._expands = any(model.vocabulary.expands for model in engine.models)
        self._fits_below = 0 if self._expands else min(self._rooms)  # bytes
        truncates = engine.alignment is top_k and request.strategy != "union" and request.unit == "token"
        self.sufficient = tuple(sufficient(sampling) if truncates else 0 for sampling in request.sampling)
        self.work = tuple(Work() for _ in engine.models)
        self._ready = [False] * len(engine.models)
        route_seed, piece_seed = np.random.SeedSequence(request.seed).spawn(2)
        self._route_uniform = route or _uniforms(route_seed)
        self._piece_uniform = _uniforms(piece_seed)
        self._writer: int | None = None  # by words: the member that wrote the last piece

    @property
    def text(self) -> bytes:
        """Head and reply so far."""
        return self._text.whole

    def ids(self, member: int) -> IntArray:
        """A member's context: its prompt and the canonical ids of the text, int32 (tokens,)."""
        return np.concatenate([self._request.prompts[member], self._contexts[member].ids(self.text)])

    @property
    def engine(self) -> Engine:
        """What it is made by."""
        return self._engine

    def writers(self) -> list[int]:
        """The members that have a weight now. Raises RunError when the router fails."""
        return [int(member) for member in np.flatnonzero(self._weights())]

    def can_write(self, member: int) -> bool:
        """Whether a member has tokens for the text."""
        same = self._engine.unified.same
        return same or self._engine.models[member].vocabulary.can_write(self._text.strays)

    def prepare(self) -> None:
        """Evaluate the prompts of all members that have a weight now; otherwise each waits until it is needed."""
        for member in self.writers():
            self._prepare(member)

    def mixture(self) -> Distribution:
        """The ensemble's distribution over the next piece, from which CE samples. Raises what `step` raises."""
        return self._run(self._mixture(self._weights()))[0]

    def step(self) -> Draw | None:
        """Sample the next piece and append it to the text; None when a member's context has no room for the text.

        Raises RunError when a member fails, `member.EvaluationInterruptedError` when the user stops it; the text is
        then as before.
        """
        return self._run(self.course())

    def course(self) -> Course[Draw | None]:
        """The same for whoever brings the members up to date: see `Course`. Raises RunError."""
        weights = self._weights()
        if len(self.text) >= self._fits_below and not self._fits(weights):
            return None
        draw = yield from self._draw(weights)
        if draw.number != END:
            self._append(draw)
        if self._request.unit == "word":
            self._writer = draw.member
        return draw

    def _fits(self, weights: FloatArray) -> bool:
        """Whether the text fits into the contexts of all members that may write the next piece.

        Those that are not drawn count too: where a reply ends must not depend on the route.
        """
        possible = set(np.flatnonzero(weights).tolist())
        if self._writer is not None and self.can_write(self._writer):
            possible.add(self._writer)
        fits = all(len(self._contexts[i].ids(self.text)) <= self._rooms[i] for i in possible)
        if not self._expands:
            # To tokenise the text for all members takes long: not again before it has grown by what is surely left.
            saved = [context.saved for context in self._contexts]
            self._fits_below = min(room + bytes_ for room, bytes_ in zip(self._rooms, saved, strict=True))
        return fits

    def _run(self, course: Course[Result]) -> Result:
        """Take a course to its end with what this reply alone needs of the members."""
        try:
            members = next(course)
            while True:
                members = course.send(self._bring(members))
        except StopIteration as end:
            result: Result = end.value
            return result

    def _draw(self, weights: FloatArray) -> Course[Draw]:
        if self._request.strategy != "me":
            return (yield from self._step_ce(weights))
        if self._writer is None or self._is_free(self._writer):
            return (yield from self._write(self._route(weights)))
        return (yield from self._step_in_word(self._writer, weights))

    def _route(self, weights: FloatArray) -> int:
        return pick(weights, self._route_uniform())

    def _write(self, member: int) -> Course[Draw]:
        """A piece that the member samples from its distribution."""
        return self._sample(member, (yield from self._predict(member)))

    def _sample(self, member: int, distribution: Distribution) -> Draw:
        number, probability = sample(distribution, self._piece_uniform())
        piece = self._engine.unified.pieces[number]
        return Draw(number, piece, member, probability, self._engine.whole_shares[member], self._top(distribution))

    def _is_free(self, writer: int) -> bool:
        """By words: whether a member is drawn here without asking the one that wrote the last piece."""
        able = self.can_write(writer)
        return not able or (not self._text.in_character and is_free(self.text))

    def _step_in_word(self, writer: int, weights: FloatArray) -> Course[Draw]:
        """A piece by the writer of the word; where that shows the word to be over, by the next word's writer."""
        draw = yield from self._write(writer)
        if not (may_end(self.text) and self._engine.openings.begins[draw.number]):
            return draw
        following = self._route(weights)
        return draw if following == writer else self._sample(following, (yield from self._open_word(following)))

    def _open_word(self, member: int) -> Course[Distribution]:
        """The member's distribution over the first piece of a word."""
        logits = (yield (member,))[member]
        openings = self._engine.openings
        given = openings.condition(self._align(member, logits, self._engine.unified.numbers[member]))
        return self._align(member, logits, openings.numbers[member]) if given is None else given

    def _step_ce(self, weights: FloatArray) -> Course[Draw]:
        mixture, distributions = yield from self._mixture(weights)
        uniform = self._piece_uniform()
        number, probability = argmax(mixture) if self._request.argmax else sample(mixture, uniform)
        parts = np.zeros(len(weights))
        for member, distribution in distributions.items():
            parts[member] = weights[member] * distribution.of(number)
        parts /= parts.sum()
        piece = self._engine.unified.pieces[number]
        return Draw(number, piece, int(parts.argmax()), probability, tuple(parts.tolist()), self._top(mixture))

    def _top(self, distribution: Distribution) -> tuple[tuple[bytes, float], ...]:
        """The likeliest pieces, as many as the request asks for, and their probabilities."""
        if not self._request.top:
            return ()
        likeliest = np.argsort(-distribution.probabilities, kind="stable")[: self._request.top]
        numbers, probabilities = distribution.numbers[likeliest], distribution.probabilities[likeliest]
        return tuple((self._engine.unified.pieces[n], float(p)) for n, p in zip(numbers, probabilities, strict=True))

    def _mixture(self, weights: FloatArray) -> Course[tuple[Distribution, dict[int, Distribution]]]:
        """The mixture, and the distribution of each member with a weight above 0."""
        members = [int(i) for i in np.flatnonzero(weights)]
        logits = yield tuple(members)
        distributions = {i: self._align(i, logits[i], self._engine.unified.numbers[i]) for i in members}
        if self._request.strategy == "union":
            temperatures = {i: self._request.sampling[i].temperature for i in members}
            whole = {i: split(row, self._engine.unified.numbers[i])[0] for i, row in logits.items()}
            distributions = self._engine.union.distributions(distributions, whole, temperatures)
        return mix(list(distributions.values()), [weights[i] for i in members]), distributions

    def _predict(self, member: int) -> Course[Distribution]:
        """The member's distribution over the next piece."""
        logits = (yield (member,))[member]
        return self._align(member, logits, self._engine.unified.numbers[member])

    def context(self, member: int) -> tuple[IntArray, int]:
        """A member's ids, and how many of them, from the first, stay as they are in this reply."""
        return self.ids(member), len(self._request.prompts[member]) + self._contexts[member].final

    def _align(self, member: int, row: Row, numbers: IntArray) -> Distribution:
        """The distribution over the pieces of these numbers that a member's logits stand for."""
        self._engine.note_loss(member, row)
        try:
            return self._engine.alignment(*split(row, numbers), self._request.sampling[member])
        except Exception as error:  # ValueError, and whatever the alignment of another package may raise
            log.debug("alignment failed", exc_info=True)
            name = self._engine.models[member].name
            raise RunError(f'member "{name}", after {len(self.text)} bytes of text: {error}') from None

    def _bring(self, members: Sequence[int]) -> dict[int, Row]:
        """Bring members up to date, and read their logits."""
        models, schedule = self._engine.models, self._engine.schedule
        contexts = {i: self.context(i) for i in members}
        for i in members:
            self._prepare(i)
            models[i].shorten(self.sufficient[i], self._engine.unified.numbers[i])
        evaluate = {
            i: partial(models[i].sync, ids, self._interrupted, final=final) for i, (ids, final) in contexts.items()
        }
        for i, evaluated in schedule.run(evaluate, self._request.parallel).items():
            self.count(i, evaluated, len(contexts[i][0]))
        return {i: self._read(i) for i in members}

    def _read(self, member: int) -> Row:
        started = time.perf_counter()
        logits = self._engine.models[member].logits()
        self.work[member].text_seconds += time.perf_counter() - started
        return logits

    def _prepare(self, member: int) -> None:
        """Before a member's first prediction, evaluate its prompt but for the last token.

        Also drops what an earlier reply left behind it. Logits differ a little with the size of a batch. This way a
        seed gives the same reply when the prompt is evaluated and when it is found in the cache.
        """
        if self._ready[member]:
            return
        ids, final = self.context(member)
        given, alone = ids[: self.given[member] - 1], self._request.alone
        self._engine.schedule.divide(1)
        evaluated = self._engine.models[member].prepare(given, self._interrupted, final=final, alone=alone)
        self.work[member].prompt_tokens += evaluated.tokens
        self.work[member].prompt_seconds += evaluated.seconds
        self._ready[member] = True

    def count(self, member: int, evaluated: Evaluated, length: int, *, predicted: bool = True) -> None:
        """Note what a member did to hold `length` tokens, and whether a prediction after them was read."""
        work = self.work[member]
        of_prompt = max(0, self.given[member] - (length - evaluated.tokens))
        work.calls += predicted
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
        strays = self._text.strays
        able = [not strays or self.can_write(member) for member in range(len(self._engine.models))]
        return route(self._engine.router, self.text, self._request.weights, able)

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


def _uniforms(seed: np.random.SeedSequence) -> Callable[[], float]:
    """Random numbers in [0, 1), one for each call; drawn by the block, which takes less time."""
    random = np.random.default_rng(seed)
    blocks = iter(lambda: random.random(_UNIFORMS).tolist(), None)
    return chain.from_iterable(blocks).__next__
