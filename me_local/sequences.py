"""Several sequences of one member: the caches of several replies, brought up to date by one evaluation.

The weights of a model are read once for all of them. Where an evaluation of several fails, it is tried again in halves,
so that a sequence fails only by itself. Knows nothing of replies or of sampling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from me_local.batches import Outputs, Part
from me_local.cache import Cache
from me_local.errors import RunError
from me_local.member import LogitArray, Member
from me_local.states import WORTH, common_length
from me_local.vocabulary import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """What a cache is to hold: `ids`, int32 (tokens,), of which the first `final` stay as they are in this reply."""

    ids: IntArray
    final: int


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of one sequence: `tokens` evaluated, its share of the `seconds` inside `llama_decode`.

    `logits`, after the last of the ids where they were asked for, are a view that the next evaluation overwrites; with
    an `error` there are none.
    """

    tokens: int
    seconds: float
    logits: LogitArray | None = None
    error: RunError | None = None


class Sequences:
    """The sequences of a member, each by its number."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._caches = member.caches

    def holds(self, sequence: int, ids: IntArray) -> bool:
        """Whether the cache of a sequence has `ids` and no more."""
        cache = self._caches[sequence]
        return cache.length == len(ids) == cache.common(ids, len(ids))

    def prefill(self, prompts: Mapping[int, Target], most: int) -> dict[int, Outcome]:
        """Bring sequences closer to holding their prompts, by one evaluation of at most `most` tokens.

        What another sequence holds is taken over from there, and what one of these is about to hold is waited for.
        """
        self._member.require_open()
        room = min(most, self._member.n_batch)
        parts: list[Part] = []
        planned: list[IntArray] = []
        for sequence, prompt in prompts.items():
            cache, ids = self._caches[sequence], prompt.ids
            keep = self._take_over(cache, ids)
            waits = any(common_length(ids, other) >= keep + WORTH for other in planned)
            if keep == len(ids) or room == 0 or waits:
                continue
            due = cache.checkpoints.due_in_prompt(keep, prompt.final, len(ids)) if cache.checkpoints else None
            end = min(keep + room, due or len(ids))
            parts.append((cache, ids[keep:end]))
            planned.append(ids)
            room -= end - keep
        outcomes = self._evaluate(parts, "none")
        for cache, _ in parts:
            if cache.checkpoints is not None and outcomes[cache.sequence].error is None:
                cache.checkpoint(prompt=True)
        return outcomes

    def sync(self, wanted: Mapping[int, Target]) -> dict[int, Outcome]:
        """Make caches hold exactly these ids, one at least; the outcomes have the logits after them."""
        self._member.require_open()
        stops: list[Part] = []
        for sequence, target in wanted.items():
            cache, ids = self._caches[sequence], target.ids
            common = cache.common(ids, len(ids) - 1)
            keep = cache.cut(common)
            due = cache.checkpoints.due_in_text(keep, common, target.final, len(ids)) if cache.checkpoints else None
            if due:
                stops.append((cache, ids[keep:due]))
        ids_of = {sequence: target.ids for sequence, target in wanted.items()}
        before = self._evaluate(stops, "none")
        for cache, _ in stops:
            if before[cache.sequence].error is None:
                cache.checkpoint(prompt=False)
        while parts := self._beyond_a_batch(ids_of, before):
            before = _joined(before, self._evaluate(parts, "none"))
        rest = self._parts(ids_of, before)
        return _joined(before, self._evaluate(rest, "last"))

    def _parts(self, ids_of: Mapping[int, IntArray], outcomes: Mapping[int, Outcome]) -> list[Part]:
        """What is left to be evaluated of those that have not failed."""
        going = [s for s in ids_of if s not in outcomes or outcomes[s].error is None]
        return [(self._caches[s], ids_of[s][self._caches[s].length :]) for s in going]

    def _beyond_a_batch(self, ids_of: Mapping[int, IntArray], outcomes: Mapping[int, Outcome]) -> list[Part]:
        """Of more than one batch can hold, as much as it can without the last token of each; else nothing."""
        parts = self._parts(ids_of, outcomes)
        room = self._member.n_batch
        if sum(len(ids) for _, ids in parts) <= room:
            return []
        taken: list[Part] = []
        for cache, ids in parts:
            now = ids[: min(room, len(ids) - 1)]
            if len(now):
                taken.append((cache, now))
                room -= len(now)
        return taken

    def _take_over(self, cache: Cache, ids: IntArray) -> int:
        """Cut a cache back to what it has of `ids`, or to what another has, where that is much more; its length."""
        own = cache.usable(ids, alone=False)
        lender = max((other for other in self._caches if other is not cache), key=lambda c: c.lends(ids), default=None)
        if lender is not None and lender.lends(ids) >= own + WORTH:
            cache.borrow(lender, lender.lends(ids))
        return cache.cut(cache.common(ids, len(ids)))

    def _evaluate(self, parts: Sequence[Part], outputs: Outputs) -> dict[int, Outcome]:
        if not parts:
            return {}
        member = self._member
        before = member.seconds
        try:
            member.evaluate(parts, outputs)
        except RunError as error:
            return self._evaluate_halves(parts, outputs, error)
        seconds, tokens = member.seconds - before, sum(len(ids) for _, ids in parts)
        outcomes, end = {}, 0
        for cache, ids in parts:
            end += len(ids)
            logits = member.row(end - 1) if outputs == "last" else None
            outcomes[cache.sequence] = Outcome(len(ids), seconds * len(ids) / tokens, logits)
        return outcomes

    def _evaluate_halves(self, parts: Sequence[Part], outputs: Outputs, error: RunError) -> dict[int, Outcome]:
        if len(parts) == 1:
            return {parts[0][0].sequence: Outcome(0, 0.0, error=error)}
        # What was evaluated before the failure is still there, behind the mirrors.
        for cache, _ in parts:
            cache.cut(cache.length)
        middle = len(parts) // 2
        first = self._evaluate(parts[:middle], outputs)
        kept = {
            sequence: Outcome(o.tokens, o.seconds, None if o.logits is None else o.logits.copy(), o.error)
            for sequence, o in first.items()
        }
        return kept | self._evaluate(parts[middle:], outputs)


def _joined(before: Mapping[int, Outcome], after: Mapping[int, Outcome]) -> dict[int, Outcome]:
    """The outcomes of two evaluations, the second with those of the first that did not fail."""
    joined = dict(before)
    for sequence, outcome in after.items():
        earlier = before.get(sequence, Outcome(0, 0.0))
        joined[sequence] = Outcome(
            earlier.tokens + outcome.tokens, earlier.seconds + outcome.seconds, outcome.logits, outcome.error
        )
    return joined
