"""How the next piece is drawn: by ME, by CE, by ME on whole words, or by "union".

ME draws one member by the weights and samples from its distribution; CE samples from the mixture of all. Both use the
same distributions, so that replies have the same probability under both. By words (`mixture.words`), ME draws a
member for each word instead of each piece. "union" is CE with another mixture, for comparison.

What is drawn is a `Course`: it says which members' logits it needs, and goes on once it gets them. Knows nothing of how
members come by them.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.decoding.engine import FORCED, Course, Draw, Engine, Request
from me_local.decoding.shaping import Shaper
from me_local.errors import RunError
from me_local.mixture.alignment import Distribution, argmax, mix, pick, sample, sufficient, top_k
from me_local.mixture.noise import Noise
from me_local.mixture.permitting import BoolArray, permitted
from me_local.mixture.words import is_free, may_end
from me_local.model import Row, split
from me_local.sampling import Sampling
from me_local.text import constraints
from me_local.text.constraints import Matcher
from me_local.text.growing import Text
from me_local.text.unified import END

log = logging.getLogger(__name__)

_UNIFORMS = 64


class Sampler:
    """Draws the pieces of one reply, as its request wants them; `text` is the reply so far.

    Random numbers follow from the seed. Those of members and of XTC are streams with one number a step each (by words,
    none of a member inside a word); `route` goes before the first. Those of pieces belong to a place in the text, in
    bytes, and to a piece (`mixture.noise`). `writer`, by words, is the member that wrote the last piece, else None;
    `written` counts the pieces.
    `shapers` are the members', whose contexts `context` gives.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        text: Text,
        route: Callable[[], float] | None,
        shapers: Sequence[Shaper],
        context: Callable[[int], IntArray],
    ) -> None:
        self._engine = engine
        self._request = request
        self._text = text
        self.writer: int | None = None
        route_seed, piece_seed = np.random.SeedSequence(request.seed).spawn(2)
        self._own_route = Uniforms(route_seed)
        self._route_uniform = route or self._own_route
        self._noise = Noise(piece_seed)
        # For a second draw at the same place, once the first has shown that a word is over.
        self._opening_noise = Noise(np.random.SeedSequence(request.seed, spawn_key=(4,)))
        self._throws = any(0 < each.xtc_probability < 1 for each in request.sampling)
        if self._throws:  # spawn_key=(2,) is that of shared routes: members must not be drawn by XTC's coins
            self._coin_uniform = Uniforms(np.random.SeedSequence(request.seed, spawn_key=(3,)))
        self._coin = 1.0  # of this position, the same for all members
        self._matcher = constraints.start(request.constraint, request.closing) if request.constraint else None
        self._shapers = [shaper if shaper.changes else None for shaper in shapers]
        self._context = context
        self.written = 0  # pieces
        self._may_write = [self._without(shaper.banned, i) for i, shaper in enumerate(shapers)] if self._matcher else []

    def _without(self, banned: IntArray, member: int) -> tuple[IntArray, BoolArray]:
        """The numbers of a member's pieces, -1 for those that are banned, and which bytes are pieces of their own."""
        if not len(banned):
            return self._engine.unified.numbers[member], self._engine.single_bytes[member]
        numbers = self._engine.unified.numbers[member].copy()
        numbers[banned] = -1
        return numbers, self._engine.beginnings.single(numbers)

    def draw(self, weights: FloatArray) -> Course[Draw]:
        """The next piece, under these weights, float64 (members,). Raises RunError."""
        if self._throws:
            self._coin = self._coin_uniform()
        draw = self._forced(weights) or (yield from self._draw(weights))
        self.written += 1
        if self._request.unit == "word":
            self.writer = None if draw.member == FORCED else draw.member
        if self._matcher and draw.piece:
            self._matcher.append(draw.piece)
        return draw

    def _forced(self, weights: FloatArray) -> Draw | None:
        """The whole characters, or the end, that the constraint forces here.

        No member is asked, and they take one number of the route: a step takes one, whatever it is.
        """
        if self._matcher is None or not self._is_forced(self._matcher):
            return None
        piece = self._matcher.forced()
        self._route_uniform()
        top = ((piece, 1.0),) if self._request.top else ()
        return Draw(FORCED if piece else END, piece, FORCED, 1.0, (0.0,) * len(weights), top)

    def _is_forced(self, matcher: Matcher) -> bool:
        """Whether members have no choice here. In the middle of a character they have: a token may go beyond it."""
        return not self._text.in_character and (bool(matcher.forced()) or matcher.is_over())

    def has_piece(self, member: int) -> bool:
        """Whether a member has a piece that the constraint allows here, or none is needed."""
        matcher = self._matcher
        if matcher is None:
            return True
        numbers, single = self._may_write[member]
        if single.all() or self._is_forced(matcher) or (matcher.following() & single).any():
            return True
        numbers = numbers[numbers >= 0]
        numbers = numbers[self._engine.beginnings.among(matcher.following, numbers, end=self._may_end(matcher))]
        return any(map(self._permits(matcher), numbers.tolist()))

    def mixture(self, weights: FloatArray) -> Course[tuple[Distribution, dict[int, Distribution]]]:
        """The mixture, and the distribution of each member with a weight above 0."""
        members = [int(i) for i in np.flatnonzero(weights)]
        rows = yield from self._rows(members)
        distributions = {i: self._align(i, rows[i], self._engine.unified.numbers[i], self._matcher) for i in members}
        if self._request.strategy == "union":
            temperatures = {i: self._request.sampling[i].temperature for i in members}
            whole = {i: split(row, self._engine.unified.numbers[i])[0] for i, row in rows.items()}
            distributions = self._engine.union.distributions(distributions, whole, temperatures)
        return mix(list(distributions.values()), [weights[i] for i in members]), distributions

    @property
    def _place(self) -> int:
        return self._request.given + len(self._text.whole)

    def would_draw(
        self, member: int, row: Row, ids: IntArray, guessed: int, pieces: int, matcher: Matcher | None
    ) -> int:
        """The number of the piece that a member would draw after its `ids`, so many guessed bytes and pieces later.

        `matcher` has followed these bytes, if there is a constraint.
        """
        shaper = self._shapers[member]
        shaped = row if shaper is None else shaper.shape(row, lambda: ids, self.written + pieces)
        distribution = self._align(member, shaped, self._engine.unified.numbers[member], matcher)
        return sample(distribution, self._noise.at(self._place + guessed, distribution.numbers))[0]

    def upcoming(self, index: int) -> float:
        """The number by which a member is drawn after so many other draws."""
        return self._own_route.ahead(index)

    def is_opening(self, member: int) -> bool:
        """By words: whether a member that is asked now was drawn for what comes next, whatever that is."""
        return self.writer is None or member != self.writer or self._is_free(self.writer)

    def _draw(self, weights: FloatArray) -> Course[Draw]:
        if self._request.strategy != "me":
            return (yield from self._step_ce(weights))
        if self.writer is None or self._is_free(self.writer):
            return (yield from self._write(self._route(weights)))
        return (yield from self._step_in_word(self.writer, weights))

    def _route(self, weights: FloatArray) -> int:
        return pick(weights, self._route_uniform())

    def _write(self, member: int) -> Course[Draw]:
        """A piece that the member samples from its distribution."""
        return self._sample(member, (yield from self._predict(member)), self._noise)

    def _sample(self, member: int, distribution: Distribution, noise: Noise) -> Draw:
        number, probability = sample(distribution, noise.at(self._place, distribution.numbers))
        piece = self._engine.unified.pieces[number]
        return Draw(number, piece, member, probability, self._engine.whole_shares[member], self._top(distribution))

    def _is_free(self, writer: int) -> bool:
        """By words: whether a member is drawn here without asking the one that wrote the last piece."""
        able = self._engine.can_write(writer, self._text.strays) and self.has_piece(writer)
        return not able or (not self._text.in_character and is_free(self._text.whole))

    def _step_in_word(self, writer: int, weights: FloatArray) -> Course[Draw]:
        """A piece by the writer of the word; where that shows the word to be over, by the next word's writer."""
        draw = yield from self._write(writer)
        if not (may_end(self._text.whole) and self._engine.openings.begins[draw.number]):
            return draw
        following = self._route(weights)
        if following == writer:
            return draw
        return self._sample(following, (yield from self._open_word(following)), self._opening_noise)

    def _open_word(self, member: int) -> Course[Distribution]:
        """The member's distribution over the first piece of a word; over any piece, where it may write no such one."""
        row = (yield from self._rows([member]))[member]
        openings = self._engine.openings
        whole = self._align(member, row, self._engine.unified.numbers[member], self._matcher)
        given = openings.condition(whole)
        if given is not None:
            return given
        return self._align(member, row, openings.numbers[member], self._matcher, whole)

    def _step_ce(self, weights: FloatArray) -> Course[Draw]:
        mixture, distributions = yield from self.mixture(weights)
        noise = None if self._request.argmax else self._noise.at(self._place, mixture.numbers)
        number, probability = argmax(mixture) if noise is None else sample(mixture, noise)
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

    def _predict(self, member: int) -> Course[Distribution]:
        """The member's distribution over the next piece."""
        row = (yield from self._rows([member]))[member]
        return self._align(member, row, self._engine.unified.numbers[member], self._matcher)

    def _rows(self, members: Sequence[int]) -> Course[dict[int, Row]]:
        """The logits of members, after their penalties and biases."""
        rows = yield tuple(members)
        for member in members:
            self._engine.note_loss(member, rows[member])
        return {member: self._shaped(member, rows[member]) for member in members}

    def _permitted(self, logits: LogitArray, numbers: IntArray, matcher: Matcher, sampling: Sampling) -> IntArray:
        """The numbers of the pieces that the constraint allows; no more of them than the alignment looks at."""
        wanted = sufficient(sampling) if self._engine.alignment is top_k else 0
        candidates = partial(self._engine.beginnings.among, matcher.following, end=self._may_end(matcher))
        return permitted(logits, numbers, self._permits(matcher), wanted, candidates)

    def _permits(self, matcher: Matcher) -> Callable[[int], bool]:
        """Whether the piece of a number may come next."""
        pieces, may_end = self._engine.unified.pieces, self._may_end(matcher)
        return lambda number: may_end if number == END else number > END and matcher.allows(pieces[number])

    def _may_end(self, matcher: Matcher) -> bool:
        return self.written >= self._request.min_tokens and matcher.may_end()

    def _shaped(self, member: int, row: Row) -> Row:
        """A member's logits after its penalties and biases."""
        shaper = self._shapers[member]
        return row if shaper is None else shaper.shape(row, partial(self._context, member), self.written)

    def _sampling(self, member: int) -> Sampling:
        """A member's settings, once XTC's coin is thrown."""
        sampling = self._request.sampling[member]
        if not self._throws:
            return sampling
        return replace(sampling, xtc_probability=float(self._coin < sampling.xtc_probability))

    def _align(
        self,
        member: int,
        row: Row,
        numbers: IntArray,
        matcher: Matcher | None,
        otherwise: Distribution | None = None,
    ) -> Distribution:
        """The distribution over the pieces of these numbers that a member's logits, shaped already, stand for.

        Where none of them may come, `otherwise`, if there is one.
        """
        try:
            logits, numbers = split(row, numbers)
            sampling = self._sampling(member)
            if matcher:
                numbers = self._permitted(logits, numbers, matcher, sampling)
            if otherwise and not ((numbers >= 0) & (logits > -np.inf)).any():
                return otherwise
            return self._engine.alignment(logits, numbers, sampling)
        except Exception as error:  # ValueError, and whatever the alignment of another package may raise
            log.debug("alignment failed", exc_info=True)
            name = self._engine.models[member].name
            raise RunError(f'member "{name}", after {len(self._text.whole)} bytes of text: {error}') from None


class Uniforms:
    """Random numbers in [0, 1), one for each call; drawn by the block, which takes less time."""

    def __init__(self, seed: np.random.SeedSequence) -> None:
        self._random = np.random.default_rng(seed)
        self._drawn = deque[float]()

    def __call__(self) -> float:
        """The next number."""
        self.ahead(0)
        return self._drawn.popleft()

    def ahead(self, index: int) -> float:
        """The number that is next after so many others, which stays where it is."""
        while len(self._drawn) <= index:
            self._drawn.extend(self._random.random(_UNIFORMS).tolist())
        return self._drawn[index]
