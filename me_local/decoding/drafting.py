"""Guesses by a member that writes ahead: what it would write if it were drawn, with the noise of the reply's own draws.

Where it is drawn indeed, its guess is the piece (but for XTC's coin and, by words, where a word begins). Where another
member is, the two agree the more often the more alike their distributions are (`mixture.noise`). How far it writes
follows from how often they agreed, and from the models' sizes, not from any time that was measured: see `guessing`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from me_local.arrays import IntArray
from me_local.decoding.engine import Engine, Request
from me_local.decoding.planning import Planner, Rows
from me_local.errors import RunError
from me_local.model import Row
from me_local.text.constraints import Matcher
from me_local.text.growing import SampledText, Text
from me_local.text.unified import END

MOST = 16
"""Pieces of a guess."""
_AGREED, _TRIED = 2, 3
"""What is taken for granted of how often the others agree, before anything is known."""
_RECENT = 16
"""Of about so many of their pieces it is known how often they agreed: a reply may turn to something else."""
_SAVED = 0.6
"""The share of an evaluation that a right guess saves on a processor: its tokens are computed all the same."""
_PROBE = 64
"""Where guesses do not pay, every so many evaluations one is made all the same, to see whether they do by now."""


class Drafting:
    """Lets a member write ahead in the reply that a planner plans for, and keeps its rows.

    `evaluate` brings the member to these ids, and gives a copy of its logits after them.
    """

    def __init__(self, planner: Planner, rows: Rows, member: int, evaluate: Callable[[IntArray], Row]) -> None:
        self._planner = planner
        self._engine, self._request, self._text = planner.engine, planner.request, planner.text
        self._context = planner.contexts[member]
        self._rows = rows
        self._member = member
        self._evaluate = evaluate
        self._price = price(self._engine, self._request, member)
        self._agreed, self._tried = float(_AGREED), float(_TRIED)
        self._declined = 0
        self._left = b""  # of a guess
        self._others: set[int] = set()  # places of its pieces, in bytes of the text, that others were to draw

    def append(self, piece: bytes) -> None:
        """Note that the text goes on with these bytes."""
        place = len(self._text.whole) - len(piece)
        holds = bool(piece) and self._left.startswith(piece)
        if place in self._others:
            older = 1 - 1 / _RECENT
            self._tried, self._agreed = older * self._tried + 1, older * self._agreed + holds
        self._left = self._left[len(piece) :]
        if not holds:
            self._left, self._others = b"", set()

    def guess(self, asked: Sequence[int], most: int) -> bytes:
        """What the member writes ahead, where one of the others is asked now; none where it does not pay.

        So many pieces at most are of use.
        """
        if all(member == self._member for member in asked) or not self._pays():
            return b""
        self._others, self._left = set(), b""
        rows: dict[bytes, Row] = {}
        ahead = _Ahead(copy.copy(self._text), self._planner.trails.matcher(self._text.whole))
        self._write(ahead, asked, min(most, MOST), rows)
        self._rows.replace(self._member, rows)
        self._left = ahead.text.whole[len(self._text.whole) :]
        return self._left

    def _write(self, ahead: "_Ahead", asked: Sequence[int], most: int, rows: dict[bytes, Row]) -> None:
        """Write ahead as far as it pays, and keep the rows that this took."""
        model, holds = self._engine.models[self._member], 1.0
        while ahead.pieces < most and self._engine.can_write(self._member, ahead.text.strays):
            if piece := ahead.forced():
                ahead.append(piece, model.vocabulary.canonical(piece))
                continue
            asked = self._asked(asked, ahead)
            if asked != [self._member]:
                holds *= self._agreed / self._tried
            if ahead.pieces and holds < self._price:
                return
            ids = self._ids(ahead)
            if ahead.is_over() or not 0 < len(ids) <= model.n_ctx:
                return
            row = self._rows.find(self._member, ids)
            rows[ids.tobytes()] = row = self._evaluate(ids) if row is None else row
            if asked != [self._member]:
                self._others.add(len(ahead.text.whole))
            number = self._draw(ahead, row, ids)
            if number == END:
                return
            ahead.append(self._engine.unified.pieces[number], [number - 1])

    def _draw(self, ahead: "_Ahead", row: Row, ids: IntArray) -> int:
        """The number of the member's next piece; END also where it has none."""
        guessed = len(ahead.text.whole) - len(self._text.whole)
        try:
            return self._planner.sampler.would_draw(self._member, row, ids, guessed, ahead.pieces, ahead.matcher)
        except RunError:
            return END

    def _pays(self) -> bool:
        """Whether a guess of one piece pays, or its turn to be tried has come."""
        if self._agreed / self._tried >= self._price:
            return True
        self._declined = (self._declined + 1) % _PROBE
        return self._declined == 0

    def _ids(self, ahead: "_Ahead") -> IntArray:
        """The member's ids after what is written."""
        prompt, context, whole = self._request.prompts[self._member], self._context, self._text.whole
        if isinstance(context, SampledText):
            return np.concatenate([prompt, context.ids(whole), np.array(ahead.sampled, dtype=np.int32)])
        ids, _ = context.beyond(whole, ahead.text.whole[len(whole) :])
        return np.concatenate([prompt, context.ids(whole)[: context.final], np.array(ids, dtype=np.int32)])

    def _asked(self, asked: Sequence[int], ahead: "_Ahead") -> list[int]:
        """The members that are asked behind what is written. By words it is the writer."""
        if self._request.strategy != "me" or self._request.unit == "word" or not ahead.pieces:
            return list(asked)
        member = self._planner.drawn(ahead.text, ahead.pieces - 1)
        return list(asked) if member is None else [member]


@dataclass(slots=True)
class _Ahead:
    """What is written ahead: the `text` with it, its `pieces`, and their ids, where vocabularies are one."""

    text: Text
    matcher: Matcher | None
    pieces: int = 0
    lost: bool = False
    sampled: list[int] = field(default_factory=list)

    def append(self, piece: bytes, ids: Sequence[int]) -> None:
        """Go on with a piece."""
        self.text.append(piece)
        self.sampled += ids
        self.pieces += 1
        with self._at_its_limit():
            if self.matcher:
                self.matcher.append(piece)

    def forced(self) -> bytes:
        """The bytes that a constraint forces next."""
        with self._at_its_limit():
            if self.matcher and not (self.text.in_character or self.is_over()):
                return self.matcher.forced()
        return b""

    def is_over(self) -> bool:
        """Whether a constraint lets nothing follow, as far as it can be followed."""
        with self._at_its_limit():
            return self.lost or (self.matcher is not None and self.matcher.is_over())
        return True

    @contextmanager
    def _at_its_limit(self) -> Iterator[None]:
        """The matcher says no to everything then, which must not end the reply."""
        try:
            yield
        except RunError:
            self.lost = True


def price(engine: Engine, request: Request, member: int) -> float:
    """What a piece that a member writes ahead costs, where an evaluation of the others that it may save costs 1.

    That is the ratio of their sizes, since each evaluation reads all weights of a model. On a processor tokens cost
    something, too, in whatever evaluation they come. Infinite where nobody else evaluates guesses.
    """
    able = {i: model.foreseeing for i, model in enumerate(engine.models) if model.foreseeing}
    others = [i for i in able if request.weights[i] > 0 and i != member]
    if not others:
        return math.inf
    sizes = np.array([able[i].size * (1 if able[i].picks else _SAVED) for i in others])
    if request.strategy == "me":
        return able[member].size / float(np.average(sizes, weights=request.weights[others]))
    return able[member].size / float(sizes.sum())
