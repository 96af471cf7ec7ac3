"""Several replies at once: each has a place, which is a sequence of every member, and they are evaluated together.

One evaluation of N tokens of as many replies costs about a + N·b, a being the reading of the weights. If each reply
drew its own member, nearly all members would be evaluated in each step, for Σ (a_i + N·b_i), as in CE. With a *shared
route* all replies draw with the same random number, and so the same member: Σ (λ_i·a_i + N·b_i). With *own routes*, the
member goes first that most replies wait for, and longest.

Steps of a shared route are counted by `clock`. A reply begins at a step that is known when it gets its place, so that
the same prompts in the same order give the same replies again, also when some of them are finished already (`occupy`).
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from me_local.decoding.engine import Course, Draw, Engine, Request
from me_local.decoding.generation import Generation
from me_local.decoding.reply import Draft, Step
from me_local.decoding.schedule import Schedule
from me_local.errors import RunError
from me_local.mixture.routing import SharedRoute, Stretch
from me_local.model import Evaluated, LoadedModel, Outcome, Row, Target

_TOKEN = 4  # bytes, about

CHUNK = 256
"""Tokens of prompts that are evaluated between two steps, so that running replies do not stall."""


@dataclass(slots=True, eq=False)
class Running:
    """A reply in its place. `starts` is its first step of the shared route; `error` what ended it, if something did."""

    draft: Draft
    request: Request
    place: int
    starts: int
    began: float
    error: RunError | None = None
    _prompts: dict[int, Target] = field(default_factory=dict)  # by member, as long as they are not evaluated
    _course: Course[Draw | None] | None = None
    _wants: tuple[int, ...] = ()
    _waited: int = 0  # steps


Written = tuple[Running, list[Step]]


class Batching:
    """Replies of an ensemble of `members`, at most as many at once as these have sequences."""

    def __init__(self, engine: Engine, members: Sequence[LoadedModel], route: SharedRoute | None) -> None:
        self.clock = 0
        self._engine = engine
        self._route = route
        self._members = members
        self._sequences = [member.several() for member in members]
        self._schedule = Schedule(members)
        self._running: list[Running] = []
        self._most = members[0].places
        self._places = list(range(self._most))
        self._occupied: list[int] = []

    @property
    def free(self) -> bool:
        """Whether there is a place for a reply."""
        return len(self._places) > len(self._occupied)

    def begin(self, request: Request, make: Callable[[Generation], Draft]) -> Running:
        """Give a reply a place; `make` makes its draft. Raises RunError when the router fails."""
        longest = max(len(prompt) for prompt in request.prompts) + len(request.head) // _TOKEN
        starts = self.clock + longest // CHUNK
        numbers = self._route.begin(starts) if self._route and request.unit == "token" else None
        generation = Generation(self._engine, request, route=numbers)
        draft = make(generation)
        running = Running(draft, request, self._places.pop(0), starts, time.perf_counter())
        self._running.append(running)
        try:
            for member in generation.writers():
                ids, final = generation.context(member)
                running._prompts[member] = Target(ids[: generation.given[member] - 1].copy(), final)
        except RunError:
            self._release(running)
            raise
        return running

    def occupy(self, stretch: Stretch | None) -> None:
        """Leave a place free for as long as a reply had it in an earlier run."""
        if stretch and stretch.end > self.clock:
            self._occupied.append(stretch.end)

    def stretch(self, running: Running) -> Stretch | None:
        """The steps of the shared route that a finished reply took; None where it had its own."""
        if self._route is None or not self._shares(running):
            return None
        return Stretch(self._route.seed, running.starts, self.clock, self._most)

    def cancel(self, running: Running) -> None:
        """End a reply."""
        if running in self._running:
            list(running.draft.end("cancelled"))
            self._release(running)

    def step(self) -> list[Written]:
        """Go on with all replies by one evaluation; those that got further, with their new steps.

        A reply whose `draft` has a finish_reason is over and has lost its place.
        """
        with self._engine.turns.use(), self._engine.steps.use():
            return self._step()

    def _step(self) -> list[Written]:
        try:
            self._engine.steps.require_open()
        except RunError as error:
            return [self._fail(running, error) for running in list(self._running)]
        written = self._without_pieces() + self._prefill()
        due = self._due()
        written += self._advance(due)
        shared = [running for running in self._running if self._shares(running)]
        if any(self._shares(running) for running in due):
            self.clock += 1
        elif not any(running._prompts for running in shared):
            self.clock = min([running.starts for running in shared] + self._occupied, default=self.clock)
        self._occupied = [until for until in self._occupied if until > self.clock]
        return written

    def _without_pieces(self) -> list[Written]:
        """End the replies that have no room for a piece: they are finished before they begin."""
        over = [running for running in self._running if running.draft.finish_reason]
        for running in over:
            self._release(running)
        return [(running, []) for running in over]

    def _shares(self, running: Running) -> bool:
        return self._route is not None and running.request.unit == "token" and running.request.strategy == "me"

    def _due(self) -> list[Running]:
        """The replies that take part in this step: those of the shared route all, or none."""
        shared = [r for r in self._running if self._shares(r) and r.starts <= self.clock]
        stalled = any(r._prompts for r in shared)
        return [r for r in self._running if not r._prompts and ((r in shared and not stalled) or not self._shares(r))]

    def _prefill(self) -> list[Written]:
        """Evaluate a part of the prompts that are not there yet."""
        written: list[Written] = []
        for member, sequences in enumerate(self._sequences):
            waiting = {r.place: r for r in self._running if member in r._prompts}
            if not waiting:
                continue
            self._schedule.divide(1)
            outcomes = sequences.prefill({place: r._prompts[member] for place, r in waiting.items()}, CHUNK)
            for place, running in waiting.items():
                outcome = outcomes.get(place)
                if outcome and outcome.error:
                    written.append(self._fail(running, outcome.error))
                    continue
                if outcome:
                    work = running.draft.generation.work[member]
                    work.prompt_tokens += outcome.tokens
                    work.prompt_seconds += outcome.seconds
                if sequences.holds(place, running._prompts[member].ids):
                    del running._prompts[member]
        return written

    def _advance(self, due: Sequence[Running]) -> list[Written]:
        written: list[Written] = []
        for running in due:
            if running._course is None:
                running._course = running.draft.generation.course()
                written += self._resume(running, None)
        # A step that a constraint forced is over without any logits; the next begins with that of all others.
        waiting = [running for running in due if running._course and running.draft.finish_reason is None]
        rows, failed = self._evaluate(waiting, self._chosen(waiting))
        for running in waiting:
            if error := failed.get(running.place):
                written.append(self._fail(running, error))
            elif all(member in rows[running.place] for member in running._wants):
                running._waited = 0
                written += self._resume(running, rows[running.place])
            else:
                running._waited += 1
        return written

    def _chosen(self, waiting: Sequence[Running]) -> list[int]:
        """The members to evaluate now: for those that cannot wait, and one for the others.

        That is the one that most of them wait for, each counted once for every step that it has waited, so that none
        waits for ever.
        """
        chosen = {m for r in waiting if self._shares(r) or len(r._wants) > 1 for m in r._wants}
        counts: Counter[int] = Counter()
        for running in waiting:
            if running._wants[0] not in chosen:
                counts[running._wants[0]] += 1 + running._waited
        if counts:
            chosen.add(max(sorted(counts), key=lambda member: counts[member]))
        return sorted(chosen)

    def _evaluate(
        self, waiting: Sequence[Running], members: Sequence[int]
    ) -> tuple[Mapping[int, Mapping[int, Row]], dict[int, RunError]]:
        """The logits by place and member, and what went wrong by place."""
        by_place = {running.place: running for running in waiting}
        targets = {
            member: {
                r.place: Target(*g.context(member)) for r in waiting if (g := r.draft.generation).can_write(member)
            }
            for member in members
        }
        for member in members:
            counts = [running.draft.generation.sufficient[member] for running in waiting]
            self._members[member].shorten(max(counts) if all(counts) else 0, self._engine.unified.numbers[member])
        wanting = {member: {r.place for r in waiting if member in r._wants} for member in members}
        evaluate = {
            member: partial(
                self._sequences[member].sync,
                {place: targets[member][place] for place in places},
                {place: target for place, target in targets[member].items() if place not in places},
            )
            for member, places in wanting.items()
        }
        rows: dict[int, dict[int, Row]] = {place: {} for place in by_place}
        failed: dict[int, RunError] = {}
        parallel = waiting[0].request.parallel if waiting else None
        for member, outcomes in self._schedule.run(evaluate, parallel).items():
            for place, outcome in outcomes.items():
                self._count(by_place[place], member, outcome, len(targets[member][place].ids))
                if outcome.error:
                    failed[place] = outcome.error
                elif outcome.logits is not None:
                    rows[place][member] = outcome.logits
        return rows, failed

    def _count(self, running: Running, member: int, outcome: Outcome, length: int) -> None:
        evaluated, predicted = Evaluated(outcome.tokens, outcome.seconds), outcome.logits is not None
        running.draft.generation.count(member, evaluated, length, predicted=predicted)

    def _resume(self, running: Running, rows: Mapping[int, Row] | None) -> list[Written]:
        """Take a reply on to where it needs logits again, or to the end of its step."""
        assert running._course is not None
        try:
            running._wants = next(running._course) if rows is None else running._course.send(rows)
        except StopIteration as end:
            running._course = None
            steps = list(running.draft.take(end.value))
            if running.draft.finish_reason:
                self._release(running)
            return [(running, steps)]
        except RunError as error:
            return [self._fail(running, error)]
        return []

    def _fail(self, running: Running, error: RunError) -> Written:
        running.error = error
        steps = list(running.draft.end("error"))
        self._release(running)
        return running, steps

    def _release(self, running: Running) -> None:
        running.draft.seconds = time.perf_counter() - running.began
        self._running.remove(running)
        self._places.append(running.place)  # taken again as late as possible: its caches may serve another prompt
