"""Choosing from a list: by the arrow keys on a terminal, by numbers elsewhere. Knows nothing of what is chosen."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from me_local.cli.input import read_lines
from me_local.cli.streams import printable
from me_local.errors import InputError

_KEYS = "arrow keys move, space chooses, Enter takes these, Escape leaves"


@dataclass(slots=True)
class Menu:
    """A list with some rows chosen at first; `more` says more of a row, `sums` of those that are chosen."""

    rows: Sequence[str]
    chosen: list[int]
    more: Callable[[int], str]
    sums: Callable[[Sequence[int]], str]
    at: int = field(default=0)

    def choose(self) -> list[int] | None:
        """The numbers of the rows that the user chooses, the first is 0; None where the user leaves."""
        if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            return self._by_keys()
        return self._by_numbers()

    def _by_numbers(self) -> list[int]:
        for i, row in enumerate(self.rows):
            click.echo(f"{'*' if i in self.chosen else ' '}{i + 1:>3}  {row}", err=True)
        click.echo("Numbers, such as 1 3; an empty line takes those with a star: ", err=True, nl=False)
        line = next(read_lines(), None)
        click.echo(err=True)
        if line is None or not (line.strip() or self.chosen):
            raise InputError("nothing is chosen: --yes takes the proposal, and names take other models")
        wanted = list(dict.fromkeys(re.split(r"[\s,]+", line.strip()))) if line.strip() else []
        known = {str(i + 1): i for i in range(len(self.rows))}
        if unknown := [text for text in wanted if text not in known]:
            raise InputError(f'"{unknown[0]}" is no number of the list: 1 to {len(self.rows)}')
        return [known[text] for text in wanted] or list(self.chosen)

    def _by_keys(self) -> list[int] | None:
        # Imported here: who names models, or says --yes, does not pay for it.
        from prompt_toolkit.application import Application
        from prompt_toolkit.data_structures import Point
        from prompt_toolkit.layout import HSplit, Layout, Window
        from prompt_toolkit.layout.controls import FormattedTextControl
        from prompt_toolkit.layout.dimension import Dimension

        self.at = min(self.chosen, default=0)
        rows = FormattedTextControl(
            self._drawn, focusable=True, show_cursor=False, get_cursor_position=lambda: Point(0, self.at)
        )
        height = Dimension(min=1, preferred=len(self.rows), max=len(self.rows))
        body = HSplit([
            Window(rows, height=height),
            Window(FormattedTextControl(self._below), wrap_lines=True, dont_extend_height=True),
        ])  # fmt: skip
        application: Application[list[int] | None] = Application(
            Layout(body), key_bindings=self._bindings(), erase_when_done=True
        )
        application.ttimeoutlen = 0.1  # seconds after Escape in which the rest of an arrow key may come
        return application.run(handle_sigint=False)

    def _drawn(self) -> list[Any]:
        parts: list[Any] = []
        for i, row in enumerate(self.rows):
            style = "reverse" if i == self.at else "bold" if i in self.chosen else ""
            parts.append((style, f"[{'x' if i in self.chosen else ' '}] {printable(row)}\n"))
        return [*parts[:-1], (parts[-1][0], parts[-1][1].removesuffix("\n"))]

    def _below(self) -> list[Any]:
        text = f"\n{self.more(self.at)}\n{self.sums(self.chosen)}\n"
        return [("", printable(text)), ("italic", _KEYS)]

    def _bindings(self) -> Any:
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("up")
        def _(_: KeyPressEvent) -> None:
            self.at = (self.at - 1) % len(self.rows)

        @keys.add("down")
        def _(_: KeyPressEvent) -> None:
            self.at = (self.at + 1) % len(self.rows)

        @keys.add("space")
        def _(_: KeyPressEvent) -> None:
            self.chosen = [i for i in self.chosen if i != self.at] + [self.at] * (self.at not in self.chosen)

        @keys.add("enter")
        @keys.add("c-j")  # Enter, where it was typed before the list was there
        def _(event: KeyPressEvent) -> None:
            if self.chosen:
                event.app.exit(result=sorted(self.chosen))

        @keys.add("escape")
        @keys.add("c-c")
        @keys.add("c-d")
        def _(event: KeyPressEvent) -> None:
            event.app.exit(result=None)

        return keys
