"""A reply as its reader sees it: a stream of steps that ends by a stop string, the end of generation or a limit."""

import codecs
import copy
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from me_local.decoding.engine import FORCED, Draw, Request, Work
from me_local.decoding.generation import Generation
from me_local.errors import RunError
from me_local.model import EvaluationInterruptedError
from me_local.text.thoughts import Kind, Parts, Thoughts
from me_local.text.unified import END

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Step(NamedTuple):
    """One piece of a reply.

    `text` has the characters that this piece completes (U+FFFD for bytes that are none); `member` the name of the
    member that wrote it, under CE of the one with the largest share; `probability` that of the piece in the
    distribution that it was sampled from, the drawn member's for ME and the mixture's for CE; `shares` each member's
    part in it, in the order of the ensemble, sum 1; `top` the likeliest pieces of that distribution with their
    probabilities, where they were asked for: the empty one is the end of the reply. What a constraint `forced` has no
    member (""), no shares (all 0), and the probability 1. `thought` and `answer` are what the piece adds to these parts
    of the reply: neither has the marks around a thought, and what may be the beginning of one comes with a later piece,
    or with the end of the reply.
    """

    piece: bytes
    text: str
    member: str
    probability: float
    shares: tuple[float, ...]
    top: tuple[tuple[bytes, float], ...] = ()
    forced: bool = False
    thought: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class MemberUsage:
    """What one member did for a reply. Counts are in tokens, times in seconds inside llama.cpp.

    `prompt_length` is its whole prompt, `prompt_evaluated` the part that its cache did not hold already;
    `text_evaluated` the tokens of the reply that went through it, those of wrong guesses too; `calls` counts its
    evaluations for predictions, `guessed` the predictions that a guess had brought before; `pieces` the pieces that it
    wrote: a share of each piece under CE, none of what was forced. `prompt_seconds` leaves
    out the prompt's last token, whose evaluation gives the first piece; `weight` is the configured one.
    """

    member: str
    pieces: float
    calls: int
    prompt_length: int
    prompt_evaluated: int
    text_evaluated: int
    prompt_seconds: float
    text_seconds: float
    weight: float = 1.0
    guessed: int = 0

    @property
    def prompt_cached(self) -> int:
        """Tokens of the prompt that were in the cache; 0 for a member that did not run.

        A memory that cannot be cut back may evaluate some of a prompt twice.
        """
        return max(0, self.prompt_length - self.prompt_evaluated) if self.calls else 0


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished reply.

    `text` leaves out a character that was not completed. `finish_reason`: "stop" (end of generation or a stop
    string), "length" (max_tokens, or a context is full), "cancelled" or "error". `seconds` is the time of the whole
    reply, prompt included; `stop` the stop string that ended it; `end` the probability of the end of generation, where
    that was drawn. `thought` and `answer` are parts of the text, where a model thinks; else the answer is all of it.
    """

    text: str
    finish_reason: FinishReason
    strategy: str
    unit: str
    seed: int
    steps: tuple[Step, ...]
    usage: tuple[MemberUsage, ...]
    seconds: float
    stop: str | None = None
    thought: str = ""
    answer: str = ""
    end: float | None = None

    @property
    def thought_pieces(self) -> int:
        """How many of the pieces, from the first on, are the thought and its marks."""
        return first_of_answer(self.steps, self.rest.answer) if self.thought else 0

    @property
    def rest(self) -> Parts:
        """What the end of the reply adds to the thought and to the answer, behind what the steps have of them."""
        thought = sum(len(step.thought) for step in self.steps)
        answer = sum(len(step.answer) for step in self.steps)
        return Parts(self.thought[thought:], self.answer[answer:])

    @property
    def prompt_seconds(self) -> float:
        """Time inside llama.cpp for the prompts."""
        return sum(usage.prompt_seconds for usage in self.usage)

    @property
    def decode_seconds(self) -> float:
        """All the time inside llama.cpp."""
        return sum(usage.prompt_seconds + usage.text_seconds for usage in self.usage)

    @property
    def pieces_per_second(self) -> float:
        """Speed of the generation, prompt time left out; 0 for a reply without pieces."""
        seconds = self.seconds - self.prompt_seconds
        return len(self.steps) / seconds if seconds > 0 else 0.0

    @property
    def calls_per_piece(self) -> float:
        """Evaluations that were made, of all members, for each piece; 0 for a reply without pieces."""
        return sum(usage.calls for usage in self.usage) / len(self.steps) if self.steps else 0.0

    @property
    def guessed(self) -> int:
        """Predictions, of all members, that came out of guesses."""
        return sum(usage.guessed for usage in self.usage)

    def as_dict(self) -> dict[str, Any]:
        """The reply as JSON can hold it; pieces appear as `text` and, in full, as `bytes`."""
        return {
            "text": self.text,
            "thought": self.thought,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "strategy": self.strategy,
            "unit": self.unit,
            "seed": self.seed,
            "pieces": [
                {
                    "text": step.text,
                    "bytes": list(step.piece),
                    "member": step.member,
                    "probability": step.probability,
                    "shares": list(step.shares),
                    "forced": step.forced,
                }
                for step in self.steps
            ],
            "usage": {
                "pieces": len(self.steps),
                "calls_per_piece": self.calls_per_piece,
                "members": [asdict(usage) for usage in self.usage],
            },
            "timings": {
                "seconds": self.seconds,
                "prompt_seconds": self.prompt_seconds,
                "decode_seconds": self.decode_seconds,
                "pieces_per_second": self.pieces_per_second,
            },
        }


def first_of_answer(steps: Sequence[Step], rest: str = "") -> int:
    """The index of the first piece of the answer, or their number; `rest` is what the end of the reply adds to it.

    A piece that might have begun a mark, and did not, is part of the answer that a later one adds.
    """
    first = next((i for i, step in enumerate(steps) if step.answer), len(steps))
    begun, last = (steps[first].answer, steps[first].text) if first < len(steps) else (rest, "")
    if not begun:
        return first
    held = len(begun) - len(last)
    while first > 0 and (held > 0 or not steps[first - 1].text):  # without a text: the beginning of a character
        first -= 1
        held -= len(steps[first].text)
    return first


class StopFilter:
    """Holds back pieces that may be the beginning of a stop string, and cuts the text where one is complete."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = [stop.encode() for stop in stops]
        self._held: list[Draw] = []
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether one is complete: `found`."""
        return self.found is not None

    def push(self, draw: Draw) -> list[Draw]:
        """Pieces that may be shown after this one; the last of them is cut when `stopped` becomes true."""
        if not self._stops:
            return [draw]
        self._held.append(draw)
        text = b"".join(held.piece for held in self._held)
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self.found = stop.decode()
            return self._release(at, cut=True)
        return self._release(len(text) - self._longest_start(text), cut=False)

    def flush(self) -> list[Draw]:
        """What is still held back, once the reply has ended for another reason."""
        return self._release(sum(len(held.piece) for held in self._held), cut=False)

    def _longest_start(self, text: bytes) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        starts = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(starts, default=0)

    def _release(self, end: int, *, cut: bool) -> list[Draw]:
        """Take pieces up to byte `end` of what is held; the one across it stays, or is cut there."""
        released: list[Draw] = []
        while self._held and len(self._held[0].piece) <= end:
            released.append(self._held.pop(0))
            end -= len(released[-1].piece)
        if cut:
            if end > 0:
                last = self._held[0]
                released.append(last._replace(piece=last.piece[:end]))
            self._held.clear()
        return released


class Draft:
    """A reply while it is written: takes what was drawn, and says when it is finished, and how.

    `steps` are those that were read from `take` and `end` so far; `finish_reason` is None as long as there is more to
    come. `seconds` is for whoever keeps the time.
    """

    def __init__(
        self,
        generation: Generation,
        request: Request,
        *,
        names: tuple[str, ...],
        max_tokens: int,
        stop: tuple[str, ...],
        kinds: Sequence[Kind] = (),
    ) -> None:
        self.generation = generation
        self.steps: list[Step] = []
        self.finish_reason: FinishReason | None = "length" if max_tokens == 0 else None
        self.seconds = 0.0
        self._request = request
        self._names = names
        self._left = max_tokens
        self._end: float | None = None
        self._thoughts = Thoughts(kinds, request.head.decode() if kinds else "")
        self._filter = StopFilter(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, draw: Draw | None) -> Iterator[Step]:
        """The steps that may be shown after one of the generation, to be read to the end."""
        if draw is None or draw.number == END:
            self._end = draw.probability if draw else None
            yield from self.end("length" if draw is None else "stop")
            return
        self._left -= 1
        yield from self._shown(self._filter.push(draw))
        if self._filter.stopped:
            self.finish_reason = "stop"
        elif self._left == 0:
            yield from self.end("length")

    def end(self, reason: FinishReason) -> Iterator[Step]:
        """The steps that were held back, now that there are no more; to be read to the end."""
        yield from self._shown(self._filter.flush())
        self.finish_reason = reason

    @property
    def reply(self) -> Reply:
        """The reply so far; its finish_reason is "error" until it is finished."""
        request = self._request
        rest = copy.copy(self._thoughts).end()
        return Reply(
            text="".join(step.text for step in self.steps),
            thought="".join(step.thought for step in self.steps) + rest.thought,
            answer="".join(step.answer for step in self.steps) + rest.answer,
            finish_reason=self.finish_reason or "error",
            strategy=request.strategy,
            unit=request.unit,
            seed=request.seed,
            steps=tuple(self.steps),
            usage=tuple(self._usage(i, work) for i, work in enumerate(self.generation.work)),
            seconds=self.seconds,
            stop=self._filter.found,
            end=self._end,
        )

    def _shown(self, draws: list[Draw]) -> Iterator[Step]:
        for draw in draws:
            text = self._decoder.decode(draw.piece)
            forced = draw.member == FORCED
            member = "" if forced else self._names[draw.member]
            parts = self._thoughts.add(text)
            step = Step(draw.piece, text, member, draw.probability, draw.shares, draw.top, forced, *parts)
            self.steps.append(step)
            yield step

    def _usage(self, member: int, work: Work) -> MemberUsage:
        return MemberUsage(
            member=self._names[member],
            pieces=sum(step.shares[member] for step in self.steps),
            calls=work.calls,
            prompt_length=self.generation.given[member],
            prompt_evaluated=work.prompt_tokens,
            text_evaluated=work.text_tokens,
            prompt_seconds=work.prompt_seconds,
            text_seconds=work.text_seconds,
            weight=float(self._request.weights[member]),
            guessed=work.guessed,
        )


class ReplyStream(Iterator[Step]):
    """Iterates over the steps of a reply while they are made; `reply` is what there is so far.

    It may be read from any thread. `cancel` may be called from another thread or a signal handler: the stream then ends
    before the next piece.
    """

    def __init__(self, draft: Draft, cancelled: threading.Event) -> None:
        self._draft = draft
        self._cancelled = cancelled
        self._source = self._run()

    def __next__(self) -> Step:
        engine = self._draft.generation.engine
        with engine.turns.use(), engine.steps.use():
            started = time.perf_counter()
            try:
                return next(self._source)
            finally:
                self._draft.seconds += time.perf_counter() - started

    def cancel(self) -> None:
        """End the reply before its next piece."""
        self._cancelled.set()

    def finish(self) -> Reply:
        """Run to the end, and return the reply."""
        for _ in self:
            pass
        return self.reply

    @property
    def reply(self) -> Reply:
        """The reply so far; its finish_reason is "error" until the stream has ended."""
        return self._draft.reply

    def _run(self) -> Iterator[Step]:
        draft = self._draft
        while draft.finish_reason is None:
            if self._cancelled.is_set():
                yield from draft.end("cancelled")
                return
            try:
                draft.generation.engine.steps.require_open()
                draw = draft.generation.step()
            except EvaluationInterruptedError:
                continue  # by `cancel`
            except RunError:
                yield from draft.end("error")
                raise
            yield from draft.take(draw)
