"""The text of a reply while it grows: bytes, and which of them are no whole characters."""

from dataclasses import dataclass, field

from me_local.text.vocabulary import utf8_runs


@dataclass(slots=True)
class Text:
    """The text so far, with the bytes in it that are not, or not yet, part of a whole UTF-8 character."""

    whole: bytes = b""
    strays: frozenset[int] = frozenset()
    _past_strays: frozenset[int] = field(default=frozenset(), repr=False)
    _open: bytes = field(default=b"", repr=False)

    def append(self, piece: bytes) -> None:
        """Add the bytes of a piece."""
        self.whole += piece
        if not self._open and piece.isascii():
            return
        runs = list(utf8_runs(self._open + piece))
        self._open = runs.pop()[0] if runs and _may_continue(runs[-1]) else b""
        stray = b"".join(run for run, valid in runs if not valid)
        self._past_strays |= frozenset(stray)
        self.strays = self._past_strays | frozenset(self._open)

    @property
    def in_character(self) -> bool:
        """Whether the text ends with the beginning of a character."""
        return bool(self._open)


def _may_continue(run: tuple[bytes, bool]) -> bool:
    """Whether a last run of bytes is the beginning of a character that is still to be completed."""
    text, valid = run
    if valid:
        return False
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
