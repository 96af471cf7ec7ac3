"""/compare: what the ensemble and each member alone reply to the last message, beside each other or one by one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from me_local.chat import Turn
from me_local.cli.session import Session
from me_local.cli.turns import pick
from me_local.decoding.reply import Reply

_NARROWEST = 32  # columns of the terminal, for one reply
_ENSEMBLE = "ensemble"


@dataclass(slots=True)
class _Answer:
    """What one column shows: the text so far, its colour, and figures once it is whole."""

    name: str
    colour: str
    text: str = ""
    figures: str = ""


def compare(session: Session, _: str) -> None:
    """/compare: each member is asked alone; the ensemble only where it has not replied yet."""
    if not any(not turn.by for turn in session.chat.replies()):
        session.note(f"{_ENSEMBLE}:")
        session.show(session.chat.again())
        if not session.chat.replies():  # cut off before anything was written
            return
    console = session.painter.console
    wide = console.is_terminal and console.width >= _NARROWEST * (1 + len(session.chat.ensemble.names))
    (_beside if wide else _below)(session)
    session.note("/pick N goes on with one of them:")
    pick(session, "")


def _below(session: Session) -> None:
    session.note(f"{_ENSEMBLE}:")
    session.painter.write(_of_ensemble(session), "")
    session.painter.end()
    for name, turn in _turns(session):
        session.note(f"{name}:")
        session.show(turn)


def _beside(session: Session) -> None:
    colours = session.painter.colours
    answers = [_Answer(_ENSEMBLE, "none", _of_ensemble(session))]
    answers += [_Answer(name, colours[name]) for name in session.chat.ensemble.names]
    with _shown(session.painter.console, answers) as live:
        for answer, (_, turn) in zip(answers[1:], _turns(session), strict=False):
            for step in session.steps(turn):
                answer.text += step.answer
                if live:
                    live.update(_table(answers, session.painter.console))
            session.last = turn.reply
            answer.text, answer.figures = turn.reply.answer, _figures(turn.reply)


@contextmanager
def _shown(console: Console, answers: Sequence[_Answer]) -> Iterator[Live | None]:
    """Show them while they grow, where the cursor may be moved, and in full in the end, whatever happens."""
    try:
        if console.color_system is None:
            yield None
        else:
            table = _table(answers, console)
            with Live(table, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
                yield live
    finally:
        console.print(_table(answers, console))


def _table(answers: Sequence[_Answer], console: Console) -> Table:
    width = console.width // len(answers) - 2
    columns = [Column(Text(a.name, a.colour), Text(a.figures, "dim"), width=width, overflow="fold") for a in answers]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), show_footer=True)
    table.add_row(*(Text(answer.text, answer.colour) for answer in answers))
    return table


def _turns(session: Session) -> Iterator[tuple[str, Turn]]:
    """The members' replies, each to be read before the next begins; none behind one that the user ends."""
    for i, name in enumerate(session.chat.ensemble.names):
        turn = session.chat.alone(i)
        yield name, turn
        if turn.reply.finish_reason == "cancelled":
            return


def _of_ensemble(session: Session) -> str:
    own = [turn.messages[1] for turn in session.chat.replies() if not turn.by]
    return (own or session.chat.messages)[-1].content  # a member alone may have written the same before


def _figures(reply: Reply) -> str:
    return f"{len(reply.steps)} pieces, {reply.pieces_per_second:.1f} pieces/s, {reply.finish_reason}"
