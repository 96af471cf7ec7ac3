"""Words, for `unit = "word"`: what one is in a text, and which pieces begin one. Knows nothing of members.

By words, the ensemble's distribution is P(word | text) = Σ_i λ_i(text) · P_i(word | text): a member is drawn where a
word starts, and writes all of it. A **word** is a run of white space (ASCII: space, tab, line ends) with the characters
up to the next white space, or up to END. So a piece that begins with white space, or END, begins a word wherever the
text does not end with white space itself. Nobody knows that a word is over before the next piece is there: the writer i
samples a piece t, and where t begins a word, its own word is over. Then the next writer j is drawn by λ(text). If
j = i, t stands. Otherwise t is dropped, and j samples its first piece from B_j, where, with A_j its distribution,

    B_j(text) = A_j(text) given that the piece begins a word; where A_j has no such piece (top-k may have left none),
                the alignment of j's logits for such pieces alone

Some borders are known from the text alone, or from that and the writer. There no condition holds: the next member is
drawn at once, and samples from A_j. They are

- the start of the reply, also where a raw prompt ends inside a word, whose rest is then a word;
- behind a character of a script without spaces (Han, kana, Thai, …), so that there each piece is a word;
- in a word of `LONGEST` bytes or more, until it ends: there too each piece is a word, so that no member is locked in;
- where the writer has no token for a byte that is not, or not yet, part of a whole character, and cannot go on.

The second and the third wait while a character is incomplete. A piece stays whole: one with white space inside it
belongs to the word in which it begins. A member that cannot write the text's cut characters has weight 0 when one is
drawn; otherwise it keeps its word.

Why replies have the probabilities of the definition: what happens next depends on the text and on the writer i alone.
Inside a word the next piece is y with A_i(y), if y begins no word. With A_i(W), W being the pieces that begin a word,
the word is over, which is the last factor of P_i(word | text). Then j follows with λ_j(text), and nothing else is known
of the past: t is dropped, or j = i, and then t, which is from A_i given W, is from B_i, since A_i(W) > 0. So
the first piece is from B_j whichever member wrote before, and P_j(word | text) = B_j(y_1) Π A_j(y_k) · A_j(W). Sum over
j: the mixture over words. In an ensemble of one member B has no effect, and words are written as by tokens.
"""

import re

import numpy as np
import numpy.typing as npt

from me_local.mixture.alignment import Distribution
from me_local.text.unified import END, UnifiedVocabulary

LONGEST = 64
"""Bytes of a word, white space in front included, from which on each piece is drawn for itself."""

WHITE_SPACE = b" \t\n\r\x0b\x0c"
_SPACE = WHITE_SPACE.decode()
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan; Burmese; Khmer
    "\u3000-\u312f\u31f0-\ua4cf\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"  # kana, Han, their punctuation; Yi
)
AFTER_UNSPACED = re.compile(f"[{_UNSPACED}]\\Z")
"""The end of a text whose last character is of a script without spaces."""
BORDER = re.compile(f"[^{_SPACE}][{_SPACE}]|[{_UNSPACED}]")
"""Two characters between which a word ends, or one behind which it does."""


def is_free(text: bytes) -> bool:
    """Whether a member is drawn for the next piece whatever that is; `text` ends with a whole character."""
    tail = text[-LONGEST:].decode(errors="replace")
    return AFTER_UNSPACED.search(tail) is not None or (len(text) >= LONGEST and BORDER.search(tail) is None)


def may_end(text: bytes) -> bool:
    """Whether a piece that begins with white space begins a word here: not behind white space."""
    return not text[-1:].isspace()


class Openings:
    """The pieces of a unified vocabulary that begin a word: those that begin with white space, and END.

    `begins` is bool (pieces,); `numbers[member]` are those of the vocabulary, int32 (tokens,), -1 for all other ids.
    """

    def __init__(self, unified: UnifiedVocabulary) -> None:
        self.begins: npt.NDArray[np.bool_] = np.array([piece[:1].isspace() for piece in unified.pieces])
        self.begins[END] = True
        self.numbers = tuple(
            np.where((numbers >= 0) & self.begins[numbers], numbers, -1).astype(np.int32) for numbers in unified.numbers
        )

    def condition(self, distribution: Distribution) -> Distribution | None:
        """The distribution given that the piece begins a word; None where that has no probability."""
        kept = self.begins[distribution.numbers] & (distribution.probabilities > 0)
        if not kept.any():
            return None
        probabilities = distribution.probabilities[kept]
        return Distribution(distribution.numbers[kept], probabilities / probabilities.sum())
