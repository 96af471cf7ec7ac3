"""How a thought looks while it is written, and how it is folded behind that."""

import click
from rich.cells import cell_len
from rich.console import Console

from me_local.cli.streams import printable
from me_local.decoding.reply import Reply

_TAB = 8  # columns


def ended_in_thought(reply: Reply) -> bool:
    """Whether a reply has no answer because it reached the largest number of pieces before."""
    return bool(reply.thought) and not reply.answer and reply.finish_reason == "length"


class ThoughtView:
    """Shows the thought of one reply.

    It is dim where there are colours, and becomes one line as soon as the answer begins. Elsewhere it stays, between
    two lines that say what is what.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._folds = console.is_terminal and console.color_system is not None
        self._open = False
        self._rows = self._column = 0  # of the cursor, from where the thought begins

    def write(self, text: str) -> None:
        """Show more of it."""
        if not text:
            return
        if not self._open and not self._folds:
            self._put("[thought]\n")
        self._open = True
        shown = printable(text) if self._console.is_terminal else text
        self._follow(shown)
        self._put(click.style(shown, dim=True) if self._folds else shown)

    def fold(self, pieces: int) -> None:
        """End it, if there is one: what can still be seen becomes a line that says of how many pieces it was."""
        if not self._open:
            return
        self._open = False
        if not self._folds:
            self._put("\n[answer]\n")
            return
        rows = min(self._rows, self._console.height - 1)
        up = f"\x1b[{rows}A" if rows else ""
        self._put(f"\r{up}\x1b[J" + click.style(f"thought, {pieces} pieces; /thought shows it", dim=True) + "\n")

    def _follow(self, text: str) -> None:
        """Where the cursor is behind this text."""
        width = self._console.width
        for character in text:
            if character == "\n":
                self._rows, self._column = self._rows + 1, 0
                continue
            cells = _TAB - self._column % _TAB if character == "\t" else cell_len(character)
            if character != "\t" and self._column + cells > width:
                self._rows, self._column = self._rows + 1, 0
            self._column = min(self._column + cells, width)

    def _put(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()
