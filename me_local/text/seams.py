"""Seams: where a text may be cut for tokenising, because the tokens on either side do not depend on each other.

There are three kinds: in front of a space that follows an ASCII letter or digit; in front of one that follows another
letter, digit or mark; and in front of Chinese or Japanese punctuation that follows an ideograph or kana. Tokenizers
part words there, and merges join nothing across where no token of the vocabulary has such a place inside it, so a kind
counts only for a vocabulary without such tokens. Behind tokens that are looked for in the text first, some tokenizers
change the space; what such a token may end in does not count then.
"""

import re
import unicodedata

_ASCII = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_ASCII_WITHIN = re.compile(rb" (?<=[A-Za-z0-9] )")
_OTHER_WITHIN = re.compile(rb" (?<=[\x80-\xbf] )")
# U+3400 to U+3FFF, U+4E00 to U+9FBF
_IDEOGRAPH = rb"\xe3[\x90-\xbf][\x80-\xbf]|(?:\xe4[\xb8-\xbf]|[\xe5-\xe8][\x80-\xbf]|\xe9[\x80-\xbe])[\x80-\xbf]"
_KANA = rb"\xe3(?:\x81[\x81-\xbf]|\x82[\x80-\x96\xa1-\xbf]|\x83[\x80-\xba\xbc])"
_STOP = rb"\xe3\x80[\x81\x82]|\xef\xbc[\x81\x8c\x9a\x9b\x9f]"  # 、 。 ！ ， ： ； ？
_WIDE = re.compile(rb"(?:%b|%b)(?=%b)" % (_IDEOGRAPH, _KANA, _STOP))
# A token may begin or end within a character.
_STOP_WITHIN = re.compile(rb"\xe3(?:\x80[\x81\x82\n]|\n)|\xef(?:\xbc[\x81\x8c\x9a\x9b\x9f\n]|\n)")
_BEFORE_STOP = re.compile(rb"(?:\n[\x80-\xbf]{1,2}|%b|%b)\Z" % (_IDEOGRAPH, _KANA))


class Seams:
    """The seams of texts in one vocabulary, whose pieces `lines` has, each with a line feed before and behind it.

    `ascii`, `other` and `wide` say which of the three kinds, in this order, there are. With `normalises`, the tokenizer
    may change characters: only what stays a letter then counts for the second kind, and there are none of the third.
    """

    def __init__(self, lines: bytes, *, normalises: bool) -> None:
        self._ends_word = _is_letter if normalises else _ends_word
        self.ascii = _ASCII_WITHIN.search(lines) is None
        within = {_last_char(lines, match.start()) for match in _OTHER_WITHIN.finditer(lines)}
        self.other = self.ascii and not any(char is None or _ends_word(char) for char in within)
        starts = (match.start() for match in _STOP_WITHIN.finditer(lines))
        self.wide = not normalises and not any(_BEFORE_STOP.search(lines[max(0, at - 3) : at]) for at in starts)

    def leave_out(self, piece: bytes) -> None:
        """Leave out the kinds of seams that may be behind this piece."""
        if piece[-1:].isalnum():
            self.ascii = self.other = False
        elif _BEFORE_STOP.search(piece):
            self.other = self.wide = False
        elif not piece.isascii():
            char = _last_char(piece, len(piece))
            self.other = self.other and char is not None and not _ends_word(char)

    def find(self, text: bytes, seen: int) -> list[int]:
        """The seams that came into a text, ascending, since it had only its first `seen` bytes."""
        seams = []
        if self.ascii:
            space = text.find(b" ", max(1, seen))
            while space >= 0:
                before = text[space - 1]
                if before in _ASCII or (before >= 0x80 and self.other and self._is_behind_a_word(text, space)):
                    seams.append(space)
                space = text.find(b" ", space + 1)
        if self.wide and not text[seen:].isascii():
            # Two of three bytes of a stop may have been there before.
            ends = (match.end() for match in _WIDE.finditer(text, max(0, seen - 5)))
            seams = sorted(seams + [end for end in ends if end > seen - 3])
        return seams

    def _is_behind_a_word(self, text: bytes, end: int) -> bool:
        char = _last_char(text, end)
        return char is not None and self._ends_word(char)


def _last_char(text: bytes, end: int) -> str | None:
    """The character that ends at this byte; None if it is not whole."""
    start = end - 1
    while start > 0 and text[start] & 0xC0 == 0x80:
        start -= 1
    try:
        return text[start:end].decode()
    except UnicodeDecodeError:
        return None


def _ends_word(char: str) -> bool:
    """Whether it is a letter, a number or a mark."""
    return unicodedata.category(char)[0] in "LNM"


def _is_letter(char: str) -> bool:
    """Whether it is a letter in every normal form."""
    return all(unicodedata.category(part)[0] == "L" for part in unicodedata.normalize("NFKD", char))
