"""One reply in the making: its text, and each member's context after it.

The state is the text, as bytes; a member's context is its prompt followed by the canonical ids of that text.
`strategies` says how the next piece is drawn. `Generation.step` gets the logits that this takes from the members, for
this one reply; `batching` gets those of several replies at once. Knows nothing of when a reply should stop.
"""

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from me_local.arrays import FloatArray, IntArray
from me_local.decoding.drafting import Drafting, price
from me_local.decoding.engine import FORCED, Course, Draw, Engine, Request, Result, Work, needed_logits
from me_local.decoding.guessing import Source
from me_local.decoding.planning import Beyond, Planner, Rows
from me_local.decoding.shaping import Shaper
from me_local.decoding.strategies import Sampler
from me_local.mixture.alignment import Distribution
from me_local.mixture.routing import route
from me_local.model import Evaluated, Row
from me_local.text.growing import SampledText, Text, TokenizedText
from me_local.text.unified import END


class Generation:
    """One reply in the making; each `step` samples one piece and appends it.

    `text` starts with the request's head; `given[member]` is the number of tokens in prompt and head, `work[member]`
    counts what the member did; `sufficient[member]` of its largest logits are enough for its distribution (0: none but
    all of them). `route` gives the random numbers by which members are drawn, in [0, 1); where there is
    none they follow from the seed. `source`, which may be a member, guesses what comes next, so that members evaluate
    several positions at once; it has no effect on what is drawn. `most` pieces are wanted.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        interrupted: Callable[[], bool] = lambda: False,
        *,
        route: Callable[[], float] | None = None,
        source: Source | int | None = None,
        most: int = sys.maxsize,
    ) -> None:
        self._most = most
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
        shapers = [engine.shaper(i, each, request.min_tokens) for i, each in enumerate(request.sampling)]
        self.work = tuple(Work() for _ in engine.models)
        self._ready = [False] * len(engine.models)
        self._sampler = Sampler(engine, request, self._text, route, shapers, self.ids)
        self._planner = Planner(engine, request, self._text, self._contexts, self._sampler)
        self._rows = Rows(len(engine.models))
        self._drafter = source if isinstance(source, int) else None
        self._source = self._drafting(source) if isinstance(source, int) else source
        self.sufficient = tuple(self._sufficient(i, shaper) for i, shaper in enumerate(shapers))
        if self._source:
            self._source.append(request.head)

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
        return self._engine.can_write(member, self._text.strays)

    def prepare(self) -> None:
        """Evaluate the prompts of all members that have a weight now; otherwise each waits until it is needed."""
        for member in self.writers():
            self._prepare(member)

    def mixture(self) -> Distribution:
        """The ensemble's distribution over the next piece, from which CE samples where the coin of XTC leaves it alone.

        Raises what `step` raises.
        """
        return self._run(self._sampler.mixture(self._weights()))[0]

    def step(self) -> Draw | None:
        """Sample the next piece and append it to the text; None when a member's context has no room for the text.

        Raises RunError when a member fails, `member.EvaluationInterruptedError` when the user stops it; the text is
        then as before.
        """
        return self._run(self.course())

    def course(self) -> Course[Draw | None]:
        """The same for whoever brings the members up to date: see `Course`. Raises RunError."""
        weights = self._weights()
        if len(self._text.whole) >= self._fits_below and not self._fits(weights):
            return None
        draw = yield from self._sampler.draw(weights)
        if draw.number != END:
            self._append(draw)
        return draw

    def _drafting(self, member: int) -> Drafting | None:
        """What lets a member write ahead; none where that never pays."""
        if price(self._engine, self._request, member) >= 1:
            return None
        return Drafting(self._planner, self._rows, member, partial(self._write_ahead, member))

    def _sufficient(self, member: int, shaper: Shaper) -> int:
        """How many of a member's largest logits are enough; one that evaluates guesses gives them all."""
        engine, request = self._engine, self._request
        if self._source and member != self._drafter and engine.models[member].foreseeing:
            return 0
        sampling = request.sampling[member]
        return needed_logits(
            engine.alignment, request.strategy, request.unit, sampling, request.constraint, shaper.lowered
        )

    def _fits(self, weights: FloatArray) -> bool:
        """Whether the text fits into the contexts of all members that may write the next piece.

        Those that are not drawn count too: where a reply ends must not depend on the route.
        """
        possible = set(np.flatnonzero(weights).tolist())
        writer = self._sampler.writer
        if writer is not None and self.can_write(writer):
            possible.add(writer)
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

    def context(self, member: int) -> tuple[IntArray, int]:
        """A member's ids, and how many of them, from the first, stay as they are in this reply."""
        return self.ids(member), len(self._request.prompts[member]) + self._contexts[member].final

    def _bring(self, members: Sequence[int]) -> dict[int, Row]:
        """The logits of members after their contexts: those that a guess has brought already, or else new ones."""
        contexts = {i: self.context(i) for i in members}
        known = self._find(contexts)
        for i in known:
            self.work[i].guessed += i != self._drafter  # which evaluates each by itself
        lacking = {i: context for i, context in contexts.items() if i not in known}
        if not lacking:
            return known
        most = self._most - self._sampler.written - 1
        guess = self._source.guess(list(lacking), most) if self._source and most > 0 else b""
        known |= self._find(lacking)  # of the member that has written ahead
        lacking = {i: context for i, context in contexts.items() if i not in known}
        return known | self._evaluate(lacking, guess)

    def _find(self, contexts: Mapping[int, tuple[IntArray, int]]) -> dict[int, Row]:
        """The logits after these contexts that are there already."""
        return {i: row for i, (ids, _) in contexts.items() if (row := self._rows.find(i, ids)) is not None}

    def _write_ahead(self, member: int, ids: IntArray) -> Row:
        """Bring a member to a text that is guessed; a copy of the logits after it."""
        models, unified = self._engine.models, self._engine.unified
        self._prepare(member)
        models[member].shorten(self.sufficient[member], unified.numbers[member])
        evaluate = {member: partial(self._evaluate_one, member, ids, self.context(member)[1], None)}
        [(evaluated, _)] = self._engine.schedule.run(evaluate, self._request.parallel).values()
        self.count(member, evaluated, len(ids))
        return copy.copy(self._read(member))

    def _evaluate(self, contexts: Mapping[int, tuple[IntArray, int]], guess: bytes) -> dict[int, Row]:
        """Bring members up to date, and beyond that as far as a guess reaches, and read their logits."""
        models, schedule = self._engine.models, self._engine.schedule
        for i in contexts:
            self._prepare(i)
            models[i].shorten(self.sufficient[i], self._engine.unified.numbers[i])
        planned = self._planner.plan(list(contexts), guess) if guess else {}
        evaluate = {
            i: partial(self._evaluate_one, i, ids, final, planned.get(i)) for i, (ids, final) in contexts.items()
        }
        rows: dict[int, Row] = {}
        for i, (evaluated, found) in schedule.run(evaluate, self._request.parallel).items():
            beyond, ids = planned.get(i), contexts[i][0]
            self.count(i, evaluated, len(ids) + (len(beyond.ids) if beyond else 0))
            if beyond:
                rows[i] = found[0]
                self._rows.keep(i, ids, beyond.ids, beyond.wanted, found[1:])
        return rows | {i: self._read(i) for i in contexts if i not in rows}

    def _evaluate_one(
        self, member: int, ids: IntArray, final: int, beyond: Beyond | None
    ) -> tuple[Evaluated, list[Row]]:
        """Evaluate a member, with the logits that a plan wants of it; without one, they are left where they are."""
        model = self._engine.models[member]
        if beyond and model.foreseeing:
            return model.foreseeing.foresee(ids, beyond.ids, beyond.wanted, self._interrupted)
        return model.sync(ids, self._interrupted, final=final), []

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
        if self._source:
            self._source.append(draw.piece)
        if self._engine.unified.same:
            sampled = self._contexts[0]
            assert isinstance(sampled, SampledText)
            vocabulary = self._engine.models[0].vocabulary
            for id_ in vocabulary.canonical(draw.piece) if draw.number == FORCED else (draw.number - 1,):
                sampled.append(id_)

    def _weights(self) -> FloatArray:
        strays = self._text.strays
        able = [
            (not strays or self.can_write(member)) and self._sampler.has_piece(member)
            for member in range(len(self._engine.models))
        ]
        return route(self._engine.router, self.text, self._request.weights, able)

    def _make_contexts(self) -> Sequence[TokenizedText | SampledText]:
        models, head = self._engine.models, self._request.head
        at_start = bool(head) and not self._request.prefill
        typed = len(head) if at_start else 0
        if self._engine.unified.same:
            shared = SampledText(models[0].vocabulary.canonical(head, typed=typed, at_start=at_start))
            return [shared] * len(models)
        texts: dict[int, TokenizedText] = {}
        for group, model in zip(self._engine.groups, models, strict=True):
            texts.setdefault(group, TokenizedText(model.vocabulary, at_start=at_start, typed=typed))
        return [texts[group] for group in self._engine.groups]
