"""One member's prompts: ids in which a template's control tokens are tokens, and the text of users stays text.

A template is rendered with the real contents, in which every look-alike of a control token is broken up by a mark
that occurs nowhere else. Control tokens found in the result are therefore the template's own, and the text between
two of them is tokenised whole, as llama.cpp does it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from me_local.arrays import IntArray
from me_local.errors import InputError
from me_local.text.messages import Message, Role
from me_local.text.names import Names
from me_local.text.templates import Arguments, Render
from me_local.text.thoughts import Kind, opened
from me_local.text.vocabulary import Vocabulary, Watch, added

# Code points that Unicode reserves for internal use: no text that is interchanged has them.
_NONCHARACTERS = [chr(0xFDD0 + i) for i in range(32)]


_SPACE = " \t\n\v\f\r"  # what C's isspace knows, which llama.cpp strips by


_LONGEST_NAME = 256  # characters; the search for longer ones would take time that grows with the square


@dataclass(frozen=True, slots=True)
class _Marks:
    """Characters that occur nowhere in a conversation, to be put into its messages and found again when rendered.

    `gap` breaks up the name of a control token and is taken out again; at a `cut` the two sides are tokenised apart,
    because tokenizers find user-defined tokens in any text; `nul` stands for NUL.
    """

    gap: str
    cut: str
    nul: str


class PromptWriter:
    """Writes one member's prompts, by its template and in its vocabulary; `kinds` are those of its thoughts."""

    def __init__(self, vocabulary: Vocabulary, render: Render, kinds: Sequence[Kind] = ()) -> None:
        self._vocabulary = vocabulary
        self._render = render
        self.kinds = tuple(kinds)
        # A mark cannot break up a single character, so such tokens are not recognised in templates either.
        self._control = Names(text for text in vocabulary.control if 1 < len(text) <= _LONGEST_NAME)
        self._markup = Names(text for text in vocabulary.markup if len(text) <= _LONGEST_NAME)

    def prompt(self, messages: Sequence[Message], watch: Watch = lambda _: None) -> IntArray:
        """The ids of the prompt up to where the reply starts, BOS exactly once: int32 (tokens,).

        `watch` hears how many there are at least so far; what it raises ends the work. Raises InputError when the
        template refuses the conversation.
        """
        marks = _free_marks(messages)
        return self._ids(self._rendered(messages, {}, marks), marks, watch)

    def parted_prompt(
        self, messages: Sequence[Message], arguments: Arguments, watch: Watch = lambda _: None
    ) -> tuple[IntArray, bytes]:
        """The same with these `arguments` of the template, in two parts: the ids, and the thought that it opens.

        A thought that is opened at the end of the prompt, for the model to go on with, belongs to the reply.
        """
        marks = _free_marks(messages)
        text = self._rendered(messages, arguments, marks)
        end = opened(text)
        return self._ids(text[:end], marks, watch), b"" if end is None else text[end:].encode()

    def _rendered(self, messages: Sequence[Message], arguments: Arguments, marks: "_Marks") -> str:
        marked = [
            Message(m.role, self._protected(m.content, m.role, marks), self._protected(m.thought, m.role, marks))
            for m in messages
        ]
        return self._render(marked, arguments)

    def _ids(self, text: str, marks: "_Marks", watch: Watch) -> IntArray:
        return np.array(self._with_bos(self._encode(text, marks, watch)), dtype=np.int32)

    def text(self, messages: Sequence[Message], arguments: Arguments) -> str:
        """The prompt as the template writes it with these arguments. Raises InputError when it refuses."""
        return self._render(messages, arguments)

    def raw_prompt(self) -> IntArray:
        """The ids in front of a raw completion: BOS where the vocabulary wants one."""
        return np.array(self._with_bos([]), dtype=np.int32)

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._vocabulary.bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _protected(self, content: str, role: Role, marks: "_Marks") -> str:
        """A content with marks inside each look-alike of a control token, and where one could be completed."""
        content = content.replace("\0", marks.nul)
        content = self._control.replace(content, marks.gap.join)
        if self._control.may_begin(content):
            content += marks.gap
        if self._control.may_end(content):
            content = marks.gap + content
        if role == "assistant":
            return content  # a reply may have the tokens of the markup: models write them
        return self._markup.replace(content, lambda name: name[0] + marks.cut + name[1:])

    def _encode(self, text: str, marks: "_Marks", watch: Watch) -> list[int]:
        """The ids of what was rendered: control tokens by name, what stands between them tokenised as text."""
        ids: list[int] = []
        at_start = True
        for fragment, token in self._fragments(text):
            plain = fragment.replace(marks.gap, "").replace(marks.nul, "\0").encode()
            for piece in plain.split(marks.cut.encode()):
                # llama.cpp treats what follows a control token as the start of a text.
                watch(len(ids))
                ids += self._vocabulary.encode(piece, at_start=at_start, watch=added(len(ids), watch))
                at_start = False
            if token is not None:
                ids.append(token)
                at_start = True
        return ids

    def _fragments(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Texts, each with the control token that follows it; None after the last."""
        position, strip_right = 0, False
        for start, end in self._control.find(text):
            token = self._vocabulary.control[text[start:end]]
            left, right = self._vocabulary.stripping.get(token, (False, False))
            fragment = text[position:start]
            fragment = fragment.lstrip(_SPACE) if strip_right else fragment
            yield fragment.rstrip(_SPACE) if left else fragment, token
            position, strip_right = end, right
        yield text[position:].lstrip(_SPACE) if strip_right else text[position:], None


def _free_marks(messages: Sequence[Message]) -> _Marks:
    used = set().union(*(text for m in messages for text in (m.content, m.thought)))
    free = [mark for mark in _NONCHARACTERS if mark not in used]
    if len(free) < 3:
        raise InputError("the conversation uses up the code points U+FDD0 to U+FDEF, which are not characters")
    return _Marks(*free[:3])
