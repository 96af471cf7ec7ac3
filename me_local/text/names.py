"""Finding names in texts, such as those of a vocabulary's control tokens, of which there may be thousands.

A regular expression of all takes longer to compile than a small model to load.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator

_BEGINNING = 3  # characters by which names are told apart at first


class Names:
    """Names of one character at least; where several begin at a place, the longest is the one that stands there."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._sorted = sorted(self._names)
        self._sorted_reversed = sorted(name[::-1] for name in self._names)
        self._longest = max(map(len, self._names), default=0)
        self._lengths: dict[str, list[int]] = {}  # of the names, the longest first, by what they begin with
        for name in sorted(self._names, key=len, reverse=True):
            lengths = self._lengths.setdefault(name[:_BEGINNING], [])
            if len(name) not in lengths[-1:]:
                lengths.append(len(name))
        seconds: dict[str, set[str]] = {}
        for name in self._names:
            seconds.setdefault(name[0], set()).add(name[1:2])
        self._first = re.compile("|".join(_begins(first, some) for first, some in seconds.items()) or r"(?!)")

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Where names begin and end in the text, one after the other."""
        end = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start < end:
                continue
            end = self._end(text, start) or end
            if end > start:
                yield start, end

    def _end(self, text: str, start: int) -> int:
        """Where the longest name ends that stands there; 0 without one."""
        for size in range(_BEGINNING, 0, -1):
            for length in self._lengths.get(text[start : start + size], ()):
                if text[start : start + length] in self._names:
                    return min(start + length, len(text))
        return 0

    def replace(self, text: str, change: Callable[[str], str]) -> str:
        """The text with each name changed, again until there is none; a change must leave no name as it is."""
        while found := list(self.find(text)):
            ends = [0, *[end for _, end in found]]
            parts = [
                text[end:start] + change(text[start:stop]) for end, (start, stop) in zip(ends, found, strict=False)
            ]
            text = "".join(parts) + text[ends[-1] :]
        return text

    def may_begin(self, text: str) -> bool:
        """Whether some end of the text is the beginning of a name, but no whole one."""
        return _is_prefix(self._sorted, (text[-n:] for n in range(1, min(len(text) + 1, self._longest))))

    def may_end(self, text: str) -> bool:
        """Whether some beginning of the text is the end of a name, but no whole one."""
        head = text[: self._longest][::-1]
        return _is_prefix(self._sorted_reversed, (head[-n:] for n in range(1, min(len(head) + 1, self._longest))))


def _begins(first: str, seconds: set[str]) -> str:
    """A regular expression of a character in front of one of these."""
    start = re.escape(first)
    return start if "" in seconds else f"{start}(?=[{''.join(map(re.escape, seconds))}])"


def _is_prefix(names: list[str], texts: Iterable[str]) -> bool:
    """Whether one of the sorted names goes on behind one of the texts."""
    following = ((text, bisect_right(names, text)) for text in texts)
    return any(at < len(names) and names[at].startswith(text) for text, at in following)
