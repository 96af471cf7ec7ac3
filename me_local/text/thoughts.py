"""Thoughts: what some models write in front of their answer, and the marks by which the two are told apart.

The marks are part of a reply's text. Some are control tokens of a vocabulary, which its model has to write. Knows
nothing of tokens, members or servers.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to write thoughts.

    One of `openings` and `closing` enclose a thought. Behind it the answer may begin with one of `beginnings`, and end
    with `ending`. `tokens` are control tokens that the marks are made of, where a vocabulary has such.
    """

    openings: tuple[str, ...]
    closing: str
    beginnings: tuple[str, ...] = ()
    ending: str = ""
    tokens: tuple[str, ...] = ()

    def stands_in(self, template: str, control: Container[str]) -> bool:
        """Whether a chat template, or a vocabulary by its control tokens, has these marks."""
        marks = (self.openings[0], self.closing)
        return any(mark in template for mark in marks) or any(mark in control for mark in marks)


def _tags(opening: str, closing: str, beginnings: tuple[str, ...] = (), ending: str = "") -> Kind:
    tokens = tuple(mark for mark in (opening, closing, *beginnings, ending) if mark)
    return Kind((opening,), closing, beginnings, ending, tokens)


_CHANNEL, _TURN = "<|channel|>{}<|message|>", "<|start|>assistant"
_ANALYSIS, _FINAL = _CHANNEL.format("analysis"), _CHANNEL.format("final")

KINDS = (
    _tags("<think>", "</think>", ("<response>",), "</response>"),  # Granite encloses the answer, too
    _tags("[THINK]", "[/THINK]"),
    _tags("<seed:think>", "</seed:think>"),
    _tags("<mm:think>", "</mm:think>"),
    _tags("<think:opensource>", "</think:opensource>"),
    _tags("<|START_THINKING|>", "<|END_THINKING|>", ("<|START_RESPONSE|>",), "<|END_RESPONSE|>"),
    _tags("<|inner_prefix|>", "<|inner_suffix|>"),
    Kind(("<|channel>thought",), "<channel|>", tokens=("<|channel>", "<channel|>")),
    Kind(("Here are my reasoning steps:",), "[BEGIN FINAL RESPONSE]", tokens=("[BEGIN FINAL RESPONSE]",)),
    Kind(
        (_ANALYSIS, _TURN + _ANALYSIS),
        "<|end|>",
        (_FINAL, _TURN + _FINAL),
        tokens=("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),
    ),
)

_TOKENS = frozenset(token for kind in KINDS for token in kind.tokens)
_OF_CHANNELS = ("<|start|>", "<|message|>", "<|end|>")  # which mean other things in vocabularies without channels


def is_written(name: str, pieces: Container[bytes]) -> bool:
    """Whether a model has to write the control token of this name in its thoughts.

    `pieces` are those of its vocabulary without the control tokens; llama.cpp counts "<|channel|>" among them.
    """
    return name in _TOKENS and (name not in _OF_CHANNELS or b"<|channel|>" in pieces)


def opened(prompt: str) -> int | None:
    """Where a thought begins that is opened at the end of a prompt, with nothing but white space behind; or None."""
    stripped = prompt.rstrip()
    starts = [len(stripped) - len(mark) for kind in KINDS for mark in kind.openings if stripped.endswith(mark)]
    return min(starts, default=None)


class Parts(NamedTuple):
    """What some more characters of a reply add to its thought, and to its answer."""

    thought: str = ""
    answer: str = ""


class Thoughts:
    """Parts a reply into its thought and its answer, while it grows; white space around a thought belongs to neither.

    A thought stands at the beginning alone: what looks like one further on is part of the answer. `kinds` are those to
    look for, and `head` is the beginning of the reply, of which nothing is given back.
    """

    def __init__(self, kinds: Sequence[Kind], head: str = "") -> None:
        self._kinds = tuple(kinds)
        self._place: Literal["start", "thought", "between", "answer"] = "start" if kinds else "answer"
        self._held = ""
        self._skips = False  # white space, behind a mark
        self.add(head)

    @property
    def closing(self) -> str:
        """The mark that ends the thought which is open now; "" where none is."""
        return self._kinds[0].closing if self._place == "thought" else ""

    def add(self, text: str) -> Parts:
        """What these characters add, as far as that is certain already."""
        added = {"thought": "", "answer": ""}
        self._held += text
        before = None
        while (self._held, self._place) != before:
            before = (self._held, self._place)
            if self._skips:
                self._held = self._held.lstrip()
                self._skips = not self._held
            if self._place == "answer":
                added["answer"] += self._answer()
            else:
                added["thought"] += self._think() if self._place == "thought" else self._begin()
        return Parts(**added)

    def end(self) -> Parts:
        """What is left, now that there is no more to come."""
        held, self._held = self._held, ""
        if self._place == "thought":
            return Parts(held.rstrip())
        return Parts(answer=held.lstrip() if self._place == "between" else held)

    def _begin(self) -> str:
        """In front of a thought, or of the answer: find out which it is, and give what parts two thoughts."""
        text = self._held.lstrip()
        marks = [(mark, kind) for kind in self._kinds for mark in (*kind.openings, *kind.beginnings)]
        found = [each for each in marks if text.startswith(each[0])]
        if found:
            mark, kind = max(found, key=lambda each: len(each[0]))
            parting = "\n\n" if mark in kind.openings and self._place == "between" else ""
            self._kinds, self._held, self._skips = (kind,), text[len(mark) :], True
            self._place = "thought" if mark in kind.openings else "answer"
            return parting
        if not any(mark.startswith(text) for mark, _ in marks):
            if self._place == "start":
                self._kinds = ()
            else:
                self._held = text
            self._place = "answer"
        return ""

    def _think(self) -> str:
        closing = self._kinds[0].closing
        thought, mark, rest = self._held.partition(closing)
        if mark:
            self._held, self._place = rest, "between"
            return thought.rstrip()
        thought = self._held[: len(self._held) - _beginning_of(closing, self._held)].rstrip()
        self._held = self._held[len(thought) :]
        return thought

    def _answer(self) -> str:
        ending = self._kinds[0].ending if self._kinds else ""
        text = self._held.replace(ending, "") if ending else self._held
        kept = _beginning_of(ending, text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _beginning_of(mark: str, text: str) -> int:
    """The length of the longest end of a text with which the mark begins, but not all of it."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def parted(text: str, kinds: Sequence[Kind], head: str = "") -> Parts:
    """The thought and the answer of a whole reply behind its head."""
    thoughts = Thoughts(kinds, head)
    first, last = thoughts.add(text), thoughts.end()
    return Parts(first.thought + last.thought, first.answer + last.answer)
