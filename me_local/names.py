"""Many names, such as those of a vocabulary's control tokens, to be found in texts.

A vocabulary may have thousands of them; a regular expression of all takes longer to compile than a small model to load.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator


class Names:
    """Names of one character at least; where several begin at a place, the longest is the one that stands there."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._sorted = sorted(self._names)
        self._sorted_reversed = sorted(name[::-1] for name in self._names)
        self._longest = max(map(len, self._names), default=0)
        self._lengths: dict[str, list[int]] = {}  # of the names, the longest first, by their first characters
        for first in {name[0] for name in self._names}:
            self._lengths[first] = sorted({len(name) for name in self._names if name[0] == first}, reverse=True)
        firsts = "".join(map(re.escape, self._lengths))
        self._first = re.compile(f"[{firsts}]" if firsts else r"(?!)")

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Where names begin and end in the text, one after the other."""
        end = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start < end:
                continue
            for length in self._lengths[match[0]]:
                name = text[start : start + length]
                if name in self._names:
                    end = start + len(name)
                    yield start, end
                    break

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


def _is_prefix(names: list[str], texts: Iterable[str]) -> bool:
    """Whether one of the sorted names goes on behind one of the texts."""
    following = ((text, bisect_right(names, text)) for text in texts)
    return any(at < len(names) and names[at].startswith(text) for text, at in following)
