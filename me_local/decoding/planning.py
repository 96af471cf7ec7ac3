"""Which positions of a guess members evaluate at once, and the logits that they gave there.

A plan follows the guess from the end of the text on, piece by piece, as if it held: each is the next token of the
member that the route is going to draw there, or bytes that a constraint forces, for which no member is asked. A member
can use a position where the ids of the text up to there are the first of those of text and guess. What is planned
decides what is evaluated, and nothing else: logits are found again by all the ids that they came after (`Rows`), so a
plan that is wrong costs time alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from me_local.arrays import IntArray
from me_local.decoding.engine import Engine, Request
from me_local.decoding.strategies import Sampler
from me_local.errors import RunError
from me_local.mixture.alignment import pick
from me_local.mixture.routing import route
from me_local.mixture.words import is_free, may_end
from me_local.model import Row
from me_local.text import constraints
from me_local.text.constraints import Matcher
from me_local.text.growing import SampledText, Text, TokenizedText
from me_local.text.utf8 import utf8_runs


class Rows:
    """Logits that members gave after ids that their contexts did not have yet.

    They are those of exactly these ids, so it does not matter what they were evaluated for.
    """

    def __init__(self, members: int) -> None:
        self._rows: list[dict[bytes, Row]] = [{} for _ in range(members)]

    def find(self, member: int, ids: IntArray) -> Row | None:
        """The logits after these ids, if they are there."""
        rows = self._rows[member]
        return rows.get(ids.tobytes()) if rows else None

    def replace(self, member: int, rows: Mapping[bytes, Row]) -> None:
        """Keep these logits, by the bytes of the ids that they came after, in the place of the member's others."""
        self._rows[member] = dict(rows)

    def keep(self, member: int, ids: IntArray, guess: IntArray, counts: Sequence[int], rows: Sequence[Row]) -> None:
        """Keep the logits after `ids` and so many tokens of the guess each, in the place of the member's others."""
        self._rows[member] = {
            np.concatenate([ids, guess[:count]]).tobytes(): row for count, row in zip(counts, rows, strict=True)
        }


class Beyond(NamedTuple):
    """What a member evaluates behind its context: int32 (tokens,), and after how many of these logits are `wanted`."""

    ids: IntArray
    wanted: tuple[int, ...]


class _Cut:
    """Text and guess as a member's tokens: `ids` from the text's last seam on, of which `own` are the text's (or -1).

    `ends` has the end of each token in the guess, in bytes; of those in the text, 0 or less.
    """

    def __init__(self, ids: list[int], own: int, pieces: Sequence[bytes], length: int) -> None:
        sizes = np.array([len(pieces[id_]) for id_ in ids], dtype=np.int64)
        self.ids, self.own = ids, own
        self.ends: list[int] = (length - sizes[::-1].cumsum()[::-1] + sizes).tolist()

    def next_end(self, offset: int) -> int | None:
        """The end of the token behind `offset` bytes of the guess."""
        return next((end for end in self.ends if end > offset), None)


class Trail:
    """A guess, along which a `matcher` goes that stands at its beginning, if there is a constraint."""

    def __init__(self, guess: bytes, matcher: Matcher | None) -> None:
        self._guess = guess
        self._matcher = matcher
        self._at = 0  # bytes of the guess that the matcher has followed

    def asked(self, end: int) -> tuple[int, int] | None:
        """Where members are asked next once so much of the guess stands, and how many forced pieces lie between.

        None where the guess breaks the constraint, or the reply is over. Each `end` is behind what came out before.
        """
        matcher, forced = self._matcher, 0
        if matcher is None:
            return end, 0
        try:
            matcher.append(self._guess[self._at : end])
            while _is_border(self._guess, end) and (piece := matcher.forced()):
                if not self._guess.startswith(piece, end):
                    return None
                matcher.append(piece)
                end, forced = end + len(piece), forced + 1
            self._at = end
            return None if matcher.is_over() else (end, forced)
        except RunError:
            return None


class Trails:
    """The trails of guesses behind a text that grows, with a matcher of their own.

    Copies of a matcher share a limit on the number of their states: those of the reply's own would let guesses end it.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._matcher: Matcher | None = None
        self._followed = len(request.head)

    def of(self, text: bytes, guess: bytes) -> Trail:
        """That of a guess behind a text, which starts with the one before."""
        return Trail(guess, self.matcher(text))

    def matcher(self, text: bytes) -> Matcher | None:
        """One at the end of a text, which starts with the one before, to go on by itself; none without a constraint."""
        constraint = self._request.constraint
        if constraint is None:
            return None
        if self._matcher is None:
            self._matcher = constraints.start(constraint, self._request.closing)
        with suppress(RunError):  # at the limit, where copies cannot go on either
            self._matcher.append(text[self._followed :])
        self._followed = len(text)
        return self._matcher.copy()


def _is_border(text: bytes, at: int) -> bool:
    """Whether no character of a valid text goes on there."""
    return not b"\x80" <= text[at : at + 1] < b"\xc0"


class Planner:
    """Plans for one reply, whose text and contexts grow elsewhere; `trails` are those of its guesses."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        text: Text,
        contexts: Sequence[TokenizedText | SampledText],
        sampler: Sampler,
    ) -> None:
        self.engine = engine
        self.request = request
        self.text = text
        self.contexts = contexts
        self.sampler = sampler
        self.trails = Trails(request)
        self._cuts: dict[int, _Cut] = {}
        self._guess = b""

    def plan(self, members: Sequence[int], guess: bytes) -> dict[int, Beyond]:
        """What members that are asked now evaluate beside their contexts; those that are left out nothing."""
        able = [member for member in members if self.engine.models[member].foreseeing]
        run, valid = next(utf8_runs(guess), (b"", False))
        if not able or not valid or self.text.in_character:
            return {}
        self._guess, self._cuts = run, {}
        needed: dict[int, list[int]] = {member: [] for member in able}
        trail = self.trails.of(self.text.whole, run)
        walk = self._route(members[0], trail) if self.request.strategy == "me" else self._together(members, trail)
        for member, offset in walk:
            if member in needed:
                needed[member].append(offset)
        found = {member: self._beyond(member, offsets) for member, offsets in needed.items()}
        return {member: beyond for member, beyond in found.items() if beyond}

    def _beyond(self, member: int, offsets: Sequence[int]) -> Beyond | None:
        """What a member evaluates to have logits after so many bytes of the guess, as far as it can use them."""
        cut, model = self._cut(member), self.engine.models[member]
        assert model.foreseeing
        held = len(self.request.prompts[member]) + len(self.contexts[member].ids(self.text.whole))
        room = min(model.foreseeing.ahead, model.n_ctx - held)
        counts = [cut.ends.index(offset) + 1 - cut.own for offset in offsets if offset in cut.ends]
        if cut.own < 0:
            return None
        usable = [count for count in counts if 0 < count <= room and self._stands(member, cut, count)]
        if not usable:
            return None
        return Beyond(np.array(cut.ids[cut.own : cut.own + usable[-1]], dtype=np.int32), tuple(usable))

    def _stands(self, member: int, cut: _Cut, count: int) -> bool:
        """Whether the ids of text and guess up to the end of a token are the first of all of them."""
        context, end = self.contexts[member], cut.ends[cut.own + count - 1]
        if isinstance(context, SampledText):
            return True
        ids = cut.ids[: cut.own + count]
        return _is_border(self._guess, end) and context.are(self.text.whole, self._guess[:end], ids)

    def _cut(self, member: int) -> _Cut:
        key = self.engine.groups[member]
        if key not in self._cuts:
            context, vocabulary = self.contexts[member], self.engine.models[member].vocabulary
            if isinstance(context, SampledText):
                ids, own = vocabulary.canonical(self._guess), 0
            else:
                ids, own = context.beyond(self.text.whole, self._guess)
            self._cuts[key] = _Cut(ids, own, vocabulary.pieces, len(self._guess))
        return self._cuts[key]

    def _together(self, members: Sequence[int], trail: Trail) -> Iterator[tuple[int, int]]:
        """CE: every member, wherever the one with the largest weight has a border."""
        leading, offset = max(members, key=lambda member: self.request.weights[member]), 0
        while (end := self._cut(leading).next_end(offset)) is not None and (asked := trail.asked(end)):
            offset, _ = asked
            yield from ((member, offset) for member in members)

    def _route(self, member: int, trail: Trail) -> Iterator[tuple[int, int]]:
        """ME: the members that are going to be asked, and after how many bytes of the guess."""
        words, opening = self.request.unit == "word", self.sampler.is_opening(member)
        offset, drawn = 0, 0
        while (end := self._cut(member).next_end(offset)) is not None:
            text = self.text.whole + self._guess[:offset]
            if words and not opening and may_end(text) and self._guess[offset : offset + 1].isspace():
                following, opening, drawn = self._drawn(offset, drawn), True, drawn + 1
                if following is not None and following != member:
                    member = following
                    yield member, offset
                    continue
            if (asked := trail.asked(end)) is None:
                return
            offset, forced = asked
            drawn += forced
            opening = not words or forced > 0 or is_free(self.text.whole + self._guess[:offset])
            if opening:
                following, drawn = self._drawn(offset, drawn), drawn + 1
                if following is None:
                    return
                member = following
            yield member, offset

    def drawn(self, text: Text, drawn: int) -> int | None:
        """The member that is drawn after a text that is guessed and so many draws; None where the router fails."""
        engine = self.engine
        able = [not text.strays or engine.can_write(member, text.strays) for member in range(len(engine.models))]
        try:
            return pick(route(engine.router, text.whole, self.request.weights, able), self.sampler.upcoming(drawn))
        except RunError:
            return None

    def _drawn(self, offset: int, drawn: int) -> int | None:
        """The same after so many bytes of the guess."""
        return self.drawn(Text(self.text.whole + self._guess[:offset], self.text.strays), drawn)
