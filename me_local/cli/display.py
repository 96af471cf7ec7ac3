"""How replies look: a colour for each member, a legend, and the line of figures after a reply."""

import codecs
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from me_local.cli.streams import printable, raw
from me_local.decoding.reply import Reply
from me_local.ensemble import Ensemble
from me_local.jsonl import json_text

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red", "bright_cyan", "bright_yellow")


class _PrintableConsole(Console):
    """A console whose only escape sequences are its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def make_console(*, no_color: bool = False, stderr: bool = False) -> Console:
    """A console without any escape sequence where colours are off, unwanted (NO_COLOR) or not understood."""
    stream = sys.stderr if stderr else sys.stdout
    plain = no_color or bool(os.environ.get("NO_COLOR")) or not stream.isatty()
    colours: Literal["auto"] | None = None if plain else "auto"
    # Bound to the stream as it is now: while a model loads, sys.stderr is another one.
    return _PrintableConsole(file=raw(stream), highlight=False, markup=False, emoji=False, color_system=colours)


def print_table(table: Table) -> None:
    """Print a table on stdout, as wide as it is where that is no terminal."""
    console = make_console()
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def print_json(value: object) -> None:
    """Print a value as a line of JSON, which is UTF-8 in every locale."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    print_reply((json_text(value) if is_utf8 else json.dumps(value)) + "\n")


def print_reply(text: str) -> None:
    """Print a part of a reply at once and, off a terminal, byte for byte; click.echo would take escapes out there."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Notices:
    """Tells the user each of an ensemble's remarks once; `write` takes a line, without one it goes to stderr.

    Where prompts are `raw`, no member sees a conversation, and nothing is said of how.
    """

    def __init__(self, ensemble: Ensemble, write: Callable[[str], None] | None = None, *, raw: bool = False) -> None:
        self._ensemble = ensemble
        self._write = write or partial(click.echo, err=True)
        self._told = set(ensemble.template_notices if raw else ())

    def tell(self) -> None:
        """Write those that have come since the last time."""
        for notice in self._ensemble.notices:
            if notice not in self._told:
                self._told.add(notice)
                self._write(notice)


class Painter:
    """Writes text in the colours of its members."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}

    def write(self, text: str, member: str) -> None:
        """Show what a member wrote, or "" for none, at once and, off a terminal, byte for byte."""
        if self.console.is_terminal:
            text = printable(text)
        if text and self.console.color_system:
            text = click.style(text, fg=self.colours.get(member))
        self.console.file.write(text)
        self.console.file.flush()

    def end(self) -> None:
        """End the line of a reply."""
        self.console.print()

    def legend(self, weights: Sequence[float]) -> Text:
        """The members in their colours, with their weights."""
        legend = Text()
        for (name, colour), weight in zip(self.colours.items(), weights, strict=True):
            legend.append(f"■ {name} {weight:.2f}  ", style=colour)
        return legend


def stats_line(reply: Reply) -> str:
    """One line of figures on a reply: pieces, speed, shares, and the times for prompt and text.

    For each member the prompt's tokens appear as new + cached. By words, not every evaluation gives a piece, so their
    number for each piece is there too; where guesses held, how many of the predictions came out of them.
    """
    pieces = len(reply.steps)
    parts = [(u.member, u.pieces) for u in reply.usage]
    if forced := sum(step.forced for step in reply.steps):
        parts.append(("forced", forced))
    shares = ", ".join(f"{name} {part / max(pieces, 1):.0%}" for name, part in parts)
    prompts = ", ".join(f"{u.member} {u.prompt_evaluated}+{u.prompt_cached}" for u in reply.usage if u.calls)
    text_seconds = sum(u.text_seconds for u in reply.usage)
    by_words = reply.unit == "word"
    calls = f", {reply.calls_per_piece:.2f} calls/piece" if by_words else ""
    guessed = reply.guessed / max(1, reply.guessed + sum(u.calls for u in reply.usage))
    if guessed >= 0.01:
        calls += f", {guessed:.0%} guessed"
    return (
        f"{reply.strategy}{' by words' if by_words else ''}: {pieces} pieces, {reply.pieces_per_second:.1f} pieces/s"
        f"{calls} | {shares} | "
        f"prompt {reply.prompt_seconds:.2f} s, tokens new+cached: {prompts or 'none'} | "
        f"sync {text_seconds:.2f} s | {reply.finish_reason}, seed {reply.seed}"
    )
