"""The units in which an ensemble weighs a text: tokens, or words where vocabularies differ.

Members of one vocabulary are mixed token by token. With different vocabularies only what begins and ends where all of
them cut the text can be mixed: words. A word reaches up to the next white space that follows something else, so it
opens with its white space (" word", "\n    return"), as in GPT-2's pre-tokenising. White space is ASCII's alone. Text
without spaces is cut too: a word also ends behind a character of a script without spaces (Han, kana, Thai, …), and
behind each character once it has `LONGEST` bytes. Where some member's token reaches across the end of a word, this word
and the next are one.

Knows texts and vocabularies, no probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from me_local.errors import InputError
from me_local.mixture.words import LONGEST, WHITE_SPACE, is_free
from me_local.text.vocabulary import Vocabulary

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where units begin, and where the last one ends: `positions` int64 (units + 1,), in bytes.

    `opens` bool (units + 1,) says where a word ended only because white space came next.
    """

    positions: Positions
    opens: npt.NDArray[np.bool_]


def token_starts(vocabulary: Vocabulary, ids: Sequence[int], text: bytes) -> Positions:
    """Where each of the canonical `ids` of `text` begins in it, and where the last one ends: int64 (tokens + 1,).

    A space that the tokenizer puts in front of the text has no width. Raises InputError where the ids do not stand
    for the text: some vocabularies leave out characters for whose bytes they have no token.
    """
    sizes = np.array([len(vocabulary.pieces[i]) for i in ids], dtype=np.int64)
    written = vocabulary.joined(ids)
    if written not in (text, b" " + text):
        raise InputError(f"no tokens for byte {_first_difference(written, text)} of {_excerpt(text)}")
    ends = np.cumsum(sizes) - (len(written) - len(text))
    return np.concatenate([np.zeros(1, dtype=np.int64), ends])


def token_cuts(starts: Positions, given: int) -> Cuts:
    """Every token is a unit, from that on which byte `given` belongs to."""
    positions = starts[max(0, int(np.searchsorted(starts[:-1], given, side="right")) - 1) :]
    return Cuts(positions, np.zeros(len(positions), dtype=np.bool_))


def word_cuts(text: bytes, starts: Sequence[Positions], given: int) -> Cuts:
    """Words are units, from that on which byte `given` belongs to, given where each vocabulary's tokens begin.

    The bytes in front of `given` end a word where all vocabularies cut there.
    """
    common = reduce(np.intersect1d, starts)
    first = int(common[np.searchsorted(common[:-1], given, side="right") - 1])
    positions, opens = [first], [False]
    for position in common[(common > first) & (common < len(text))].tolist():
        free = text[position] & 0xC0 != 0x80 and is_free(text[max(0, position - LONGEST) : position])
        space = text[position] in WHITE_SPACE and text[position - 1] not in WHITE_SPACE
        if free or space:
            positions.append(position)
            opens.append(space and not free)
    return Cuts(np.array([*positions, len(text)]), np.array([*opens, False]))


def _first_difference(written: bytes, text: bytes) -> int:
    written = written.removeprefix(b" ") if not text.startswith(b" ") else written
    same = (a == b for a, b in zip(written, text, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(len(written), len(text)))


def _excerpt(text: bytes) -> str:
    return repr(text[:30].decode("utf-8", "replace") + ("..." if len(text) > 30 else ""))
