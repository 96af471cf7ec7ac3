"""A long text for llama.cpp's tokenizers in parts of a few KB, with the ids of the whole.

Their time grows with the square of the number of user-defined tokens in a text, and of that of bytes without a token.
Three kinds of places to cut at, of which llama.cpp's source says that nothing is joined across them: in front of a
user-defined token, which every tokenizer looks for before all else (llama_vocab::impl::tokenizer_st_partition); at a
seam (`seams`); and, for SentencePiece, between two characters that stand side by side in no token.

Also how few tokens a text can have. Knows nothing of ids.
"""

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice

import llama_cpp
import numpy as np
import numpy.typing as npt

from me_local.text.seams import Seams

LONG = 4096
"""Texts of more bytes are cut, where that is possible."""

_MANY = 128  # user-defined tokens; their square is what llama.cpp takes time for
_BACK = 8  # bytes in front of a window in which a seam may begin
_TRIES = 64
_LONGEST_TOKEN = 64  # bytes; known vocabularies have 31
_MOST_WORK = 200_000_000  # comparisons with user-defined tokens; known vocabularies take at most 60 million
_DEEP = 16  # groups within groups
_HIDDEN = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_LEFT, _RIGHT = llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP, llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP
_SPACES = b" \t\n\v\f\r"
_ESCAPED_SPACE = "▁".encode()


class Parts:
    """Cuts the texts of one vocabulary, whose tokens have these `texts` and `attributes`.

    `merges` says that it is SentencePiece's: whatever it joins is a token by itself. `strips` says that white space
    beside some tokens is dropped.
    """

    def __init__(self, texts: Sequence[bytes], attributes: Sequence[int], seams: Seams, *, merges: bool) -> None:
        self._seams = seams
        user_defined = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        tokens = [(t, a) for t, a in zip(texts, attributes, strict=True) if t and a & user_defined and not a & _HIDDEN]
        self._user_defined = tuple({text for text, _ in tokens})
        self.strips = any(attribute & (_LEFT | _RIGHT) for _, attribute in tokens)
        self._find = _longest_first(self._user_defined) if self._may_cut(tokens) else None
        self._joined = b"\xef\xbf\xbf".join(texts) if merges else b""

    def of(self, text: bytes) -> Iterator[bytes]:
        """The parts of a text, which is UTF-8. All but the first begin where nothing is put in front of a text."""
        start = 0
        for end in chain(self._tokens(text), [len(text)]):
            while end - start > LONG and (cut := self._cut(text, start, end)):
                yield text[start:cut]
                start = cut
            yield text[start:end]
            start = end

    @cached_property
    def _together(self) -> npt.NDArray[np.uint64]:
        return np.unique(_pairs(self._joined))

    def _may_cut(self, tokens: list[tuple[bytes, int]]) -> bool:
        """Whether user-defined tokens are where a search from the left finds the longest, and nothing else changes.

        White space that a token drops beside it may be another one.
        """
        if any(attribute & _LEFT for _, attribute in tokens):
            return False
        spaced = self.strips and any(text.strip(_SPACES) != text for text, _ in tokens)
        return bool(tokens) and not spaced and not any(_rivals(self._user_defined))

    def _tokens(self, text: bytes) -> Iterator[int]:
        """Where to cut in front of user-defined tokens: before there are too many, or too many bytes."""
        if self._find is None:
            return
        last, count = 0, 0
        for match in self._find.finditer(text):
            count += 1
            if match.start() > last and (count > _MANY or match.end() - last > LONG):
                last, count = match.start(), 1
                yield last

    def _cut(self, text: bytes, start: int, end: int) -> int:
        """A place to cut in `text[start:end]`, the last one in the first window that has any; 0 where none has."""
        seen = start
        while seen < end:
            window = _start_of_character(text, seen + LONG) if seen + LONG < end else end
            back = max(start, seen - _BACK)
            seams = self._seams.find(text[back:window], seen - back)
            if seams and back + seams[-1] > start:
                return back + seams[-1]
            if self._joined and (cut := self._between(text, start, seen, window)):
                return cut
            seen = window
        return 0

    def _between(self, text: bytes, start: int, seen: int, end: int) -> int:
        """The last place from byte `seen` on between two characters that stand together in no token; 0 if none."""
        first = seen if seen == start else _start_of_character(text, seen - 1)
        chars, pairs = text[first:end].decode(), _pairs(text[first:end])
        near = np.searchsorted(self._together, pairs)
        known = self._together[np.minimum(near, len(self._together) - 1)] == pairs
        for at in islice(np.flatnonzero(~known)[::-1].tolist(), _TRIES):
            cut = first + len(chars[: at + 1].encode())
            stripped = self.strips and (text[cut - 1] in _SPACES or text[cut] in _SPACES)
            # Behind a user-defined token a space may be put.
            if not stripped and not text.endswith(self._user_defined, 0, cut):
                return cut
        return 0


class Fewest:
    """How many tokens a text has at least, in a vocabulary whose tokens stand for these `pieces`, and for no other."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        pieces = list(pieces)
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        values = np.frombuffer(b"".join(pieces), np.uint8)
        order = np.argsort(np.repeat(lengths, lengths), kind="stable")
        longest = np.zeros(256)
        longest[values[order]] = np.repeat(lengths, lengths)[order]  # of several values the last one stays
        # A token with n bytes has no byte whose share is more than 1/n.
        self._shares = np.divide(1, longest, where=longest > 0, out=np.zeros(256))

    def of(self, text: bytes) -> int:
        """A number of tokens that the text does not come below."""
        plain = np.frombuffer(text.replace(_ESCAPED_SPACE, b""), np.uint8)  # which may stand for a space
        return int(np.bincount(plain, minlength=256) @ self._shares)


def _pairs(text: bytes) -> npt.NDArray[np.uint64]:
    """Each two characters that stand side by side, as a number; a space is the one that SentencePiece writes."""
    plain = text.replace(b" ", _ESCAPED_SPACE).decode("utf-8", "replace")
    chars = np.frombuffer(plain.encode("utf-32-le"), np.uint32).astype(np.uint64)
    return (chars[:-1] << np.uint64(32)) | chars[1:]


def _longest_first(tokens: Iterable[bytes]) -> re.Pattern[bytes]:
    return re.compile(_either(list(tokens), 0))


def _either(ends: list[bytes], depth: int) -> bytes:
    """A regular expression of the longest of these texts; one after the other they would take long to try."""
    if depth == _DEEP or len(ends) == 1:
        return b"(?:%b)" % b"|".join(re.escape(end) for end in sorted(ends, key=len, reverse=True))
    start = _beginning(min(ends), max(ends))
    following: dict[int, list[bytes]] = defaultdict(list)
    for end in ends:
        if end != start:
            following[end[len(start)]].append(end[len(start) :])
    branches = b"|".join(_either(some, depth + 1) for some in following.values())
    return b"%b(?:%b)%b" % (re.escape(start), branches, b"?" if start in ends else b"")


def _beginning(one: bytes, other: bytes) -> bytes:
    """What both begin with."""
    same = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(same, min(len(one), len(other)))]


def _rivals(tokens: Sequence[bytes]) -> Iterator[bytes]:
    """Texts in which llama.cpp may find other tokens than a search from the left that takes the longest.

    It looks for all the longest tokens first. So a search from the left finds the same, unless a token that is not
    shorter begins within one that it finds, and goes on behind it. A vocabulary for which that takes too long to find
    out has one, whatever it is.
    """
    yield from (token for token in tokens if len(token) > _LONGEST_TOKEN)
    ordered, find = sorted(tokens), _longest_first(tokens) if tokens else None
    tries = 0
    for token in tokens:
        for at in range(1, len(token)):
            end = token[at:]
            first = bisect_left(ordered, end)
            tries += 1
            while first < len(ordered) and ordered[first].startswith(end):
                other, first = ordered[first], first + 1
                tries += 1
                if tries * len(tokens) > _MOST_WORK:
                    yield token
                    return
                if other == token or len(other) < len(token):
                    continue
                both = token[:at] + other
                match = find.match(both) if find else None
                if match and match.end() == len(token):
                    yield both


def _start_of_character(text: bytes, at: int) -> int:
    while at > 0 and text[at] & 0xC0 == 0x80:
        at -= 1
    return at
