"""Several sequences of one member: the caches of several replies, brought up to date by one evaluation.

The weights of a model are read once for all of them. Where an evaluation of several fails, it is tried again in halves,
so that a sequence fails only by itself. Knows nothing of replies or of sampling.

`Member.prepare` and `Member.sync` are not the case of one sequence. What one reply by itself evaluates must follow from
its ids alone, in batches that are always cut alike (`origin`); it can be interrupted between two of them, and takes up
kept states. Here a batch is filled with parts of all sequences, so that numbers depend on the others in their low bits.
What both need is in `cache` and `batch`.
"""

import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from me_local.arrays import IntArray
from me_local.errors import RunError
from me_local.llama.batch import Part, level
from me_local.llama.cache import Cache
from me_local.llama.member import Member
from me_local.llama.shortlist import Row
from me_local.llama.states import WORTH, common_length


class Target(NamedTuple):
    """What a cache is to hold: `ids`, int32 (tokens,), of which the first `final` stay as they are in this reply."""

    ids: IntArray
    final: int


class Outcome(NamedTuple):
    """What became of one sequence: `tokens` evaluated, and its share of the `seconds` that llama.cpp took.

    `logits`, after the last of the ids where they were asked for, are a view that the next evaluation overwrites; with
    an `error` there are none.
    """

    tokens: int
    seconds: float
    logits: Row | None = None
    error: RunError | None = None


class Sequences:
    """The sequences of a member, each by its number.

    They are empty at first: the numbers that come out depend a little on what is there, and so should not on what
    was made before.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self._caches = member.caches
        with member.use():
            member.require_open()
            for cache in self._caches:
                cache.forget()

    def holds(self, sequence: int, ids: IntArray) -> bool:
        """Whether the cache of a sequence has `ids` and no more."""
        cache = self._caches[sequence]
        return cache.length == len(ids) == cache.common(ids, len(ids))

    def prefill(self, prompts: Mapping[int, Target], most: int) -> dict[int, Outcome]:
        """Bring sequences closer to holding their prompts, by one evaluation of at most `most` tokens.

        What another sequence holds is taken over from there, and what one of these is about to hold is waited for.
        """
        with self._member.use():
            self._member.require_open()
            return self._by_halves(lambda some: self._prefill(some, most), prompts)

    def sync(self, wanted: Mapping[int, Target], others: Mapping[int, Target] | None = None) -> dict[int, Outcome]:
        """Make caches hold exactly these ids, one at least; the outcomes have the logits after them.

        Those of `others` may come closer to what they are to hold, where that does not take longer: the outcomes of
        these have no logits.
        """
        with self._member.use():
            self._member.require_open()
            if others:
                with suppress(RunError):  # which may have come from one of the others
                    return self._sync(wanted, others)
            return self._by_halves(lambda some: self._sync(some, {}), wanted)

    def _by_halves(
        self, bring: Callable[[Mapping[int, Target]], dict[int, Outcome]], targets: Mapping[int, Target]
    ) -> dict[int, Outcome]:
        """Bring all of them where they are wanted or, where that fails, one half after the other."""
        try:
            return bring(targets)
        except RunError as error:
            if len(targets) == 1:
                return dict.fromkeys(targets, Outcome(0, 0.0, error=error))
        entries, middle = list(targets.items()), len(targets) // 2
        first = self._by_halves(bring, dict(entries[:middle]))
        kept = {
            s: o._replace(logits=o.logits.copy()) if isinstance(o.logits, np.ndarray) else o for s, o in first.items()
        }
        return kept | self._by_halves(bring, dict(entries[middle:]))

    def _prefill(self, prompts: Mapping[int, Target], most: int) -> dict[int, Outcome]:
        room = min(most, self._member.n_batch)
        parts: list[Part] = []
        planned: list[IntArray] = []
        dues: dict[int, int] = {}
        for sequence, prompt in prompts.items():
            cache, ids = self._caches[sequence], prompt.ids
            keep = self._take_over(cache, ids)
            waits = any(common_length(ids, other) >= keep + WORTH for other in planned)
            if keep == len(ids) or room == 0 or waits:
                continue
            due = cache.checkpoints.due_in_prompt(keep, prompt.final, len(ids)) if cache.checkpoints else None
            if due == keep:
                cache.checkpoint(prompt=True)
            elif due:
                dues[sequence] = due
            end = min(keep + room, dues.get(sequence, len(ids)))
            parts.append(Part(cache, ids[keep:end], "none"))
            planned.append(ids)
            room -= end - keep
        outcomes = self._evaluate(parts)
        for sequence, due in dues.items():
            if self._caches[sequence].length == due:
                self._caches[sequence].checkpoint(prompt=True)
        return outcomes

    def _sync(self, wanted: Mapping[int, Target], others: Mapping[int, Target]) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        stops: dict[int, IntArray] = {}
        for sequence, target in wanted.items():
            cache, ids = self._caches[sequence], target.ids
            common = cache.common(ids, len(ids) - 1)
            keep = cache.cut(common)
            due = cache.checkpoints.due_in_text(keep, common, target.final, len(ids)) if cache.checkpoints else None
            if due:
                stops[sequence] = ids[:due]
        while parts := self._parts(stops):
            outcomes = _joined(outcomes, self._evaluate(parts))
        for sequence in stops:
            self._caches[sequence].checkpoint(prompt=False)
        while sum(len(target.ids) - self._caches[s].length for s, target in wanted.items()) > self._member.n_batch:
            parts = self._parts({sequence: target.ids[:-1] for sequence, target in wanted.items()})
            outcomes = _joined(outcomes, self._evaluate(parts))
        joining = self._level(wanted, others)
        parts = self._parts({s: target.ids for s, target in wanted.items()} | joining, wanted)
        return _joined(outcomes, self._evaluate(parts))

    def _level(self, wanted: Mapping[int, Target], others: Mapping[int, Target]) -> dict[int, IntArray]:
        """Prepare caches for parts of more equal lengths, where that takes less time; what others are to hold then."""
        lengths = {sequence: len(target.ids) - self._caches[sequence].length for sequence, target in wanted.items()}
        common: dict[int, int] = {}
        lags: dict[int, int] = {}
        for sequence, target in others.items():
            cache = self._caches[sequence]
            common[sequence] = cache.common(target.ids, len(target.ids))
            lag = len(target.ids) - common[sequence]
            # One that lags far behind may never be wanted.
            if cache.checkpoints is None and lag <= WORTH and len(target.ids) <= self._member.n_ctx:
                lags[sequence] = lag
        least = level(lengths, lags)
        if sum(max(least, length) for length in lengths.values()) + least * len(lags) > self._member.n_batch:
            return {}
        for sequence, target in wanted.items():
            cache = self._caches[sequence]
            if lengths[sequence] < least <= len(target.ids) and cache.checkpoints is None:
                cache.cut(len(target.ids) - least)
        joining = {s: others[s].ids[: common[s] + least] for s, lag in lags.items() if lag >= least}
        for sequence in joining:
            self._caches[sequence].cut(common[sequence])
        return joining

    def _parts(self, ids_of: Mapping[int, IntArray], wanted: Container[int] = ()) -> list[Part]:
        """What caches lack of these ids, as much as one batch can hold; logits after those of the `wanted`."""
        room, parts = self._member.n_batch, []
        for sequence, ids in sorted(ids_of.items()):
            cache = self._caches[sequence]
            now = ids[cache.length : cache.length + room]
            if len(now):
                parts.append(Part(cache, now, "last" if sequence in wanted else "none"))
                room -= len(now)
        return parts

    def _take_over(self, cache: Cache, ids: IntArray) -> int:
        """Cut a cache back to what it has of `ids`, or to what another has, where that is much more; its length."""
        own = cache.usable(ids)
        others = {other: other.lendable(ids) for other in self._caches if other is not cache}
        lender = max(others, key=others.__getitem__, default=None)
        if lender is not None and others[lender] >= own + WORTH:
            cache.borrow(lender, others[lender])
        return cache.cut(cache.common(ids, len(ids)))

    def _evaluate(self, parts: Sequence[Part]) -> dict[int, Outcome]:
        if not parts:
            return {}
        started = time.perf_counter()
        self._member.evaluate(parts)
        each = (time.perf_counter() - started) / sum(len(part.ids) for part in parts)
        outcomes: dict[int, Outcome] = {}
        end = 0
        for cache, ids, outputs in parts:
            end += len(ids)
            row = self._member.row(end - 1) if outputs == "last" else None
            outcomes[cache.sequence] = Outcome(len(ids), each * len(ids), row)
        return outcomes


def _joined(before: Mapping[int, Outcome], after: Mapping[int, Outcome]) -> dict[int, Outcome]:
    """The outcomes of two evaluations, one after the other."""
    if not before:
        return dict(after)
    joined = dict(before)
    for sequence, outcome in after.items():
        earlier = before.get(sequence, Outcome(0, 0.0))
        joined[sequence] = outcome._replace(
            tokens=earlier.tokens + outcome.tokens, seconds=earlier.seconds + outcome.seconds
        )
    return joined
