"""The session that a chat's commands work on: the conversation, where it is shown, and the file that keeps it."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console

from me_local.chat import Chat, Turn
from me_local.cli.attachments import as_typed, with_files
from me_local.cli.display import Notices, Painter, stats_line
from me_local.cli.interrupt import cancels
from me_local.cli.sessions import SessionFile
from me_local.cli.thoughts import ThoughtView, ended_in_thought
from me_local.decoding.reply import Reply, Step
from me_local.errors import MeLocalError

_KEPT_EVERY = 2.0  # seconds of a reply

_STRATEGIES = {
    ("me", "token"): "ME draws one member for each piece",
    ("me", "word"): "ME draws one member for each word",
    ("ce", "token"): "CE averages all members for each piece",
    ("union", "token"): "CE averages all members over the union of their candidates for each piece, as UniTE does",
}


@dataclass(slots=True)
class Session:
    """A chat on a terminal: replies go to the painter's console, everything else to `notes`.

    `interrupted` is set by a Ctrl-C outside a reply, since the last line was typed. `draft` is what the next line to be
    typed begins with; it then takes the place of the last message. `file` keeps the conversation, where there is one.
    """

    chat: Chat
    painter: Painter
    notes: Console
    file: SessionFile | None = None
    last: Reply | None = None
    draft: str = ""
    interrupted: threading.Event = field(default_factory=threading.Event)
    _notices: Notices = field(init=False)
    _typed: tuple[str, str] = ("", "")  # the last message, and the line that it was made of

    def __post_init__(self) -> None:
        """Begin with nothing told."""
        self._notices = Notices(self.chat.ensemble, lambda text: self.note(f"Note: {text}"))

    def greet(self) -> None:
        """Show the members and what their user should know about them."""
        self.notes.print(self.painter.legend(self._weights()))
        config = self.chat.config
        self.note(f"{_STRATEGIES[config.strategy, config.unit]}. /help lists the commands.")
        self._notices.tell()
        if self.file is not None and self.file.saved is not None:
            self.chat.restore(self.file.saved)
            self.note(f"Session {self.file.name}: goes on behind {len(self.chat.messages)} messages.")

    def part(self) -> None:
        """Say where the conversation is kept."""
        if self.file is not None and self.file.path.exists():
            self.note(f"Kept as session {self.file.name}: me-local chat --continue goes on with it.")

    def note(self, text: str) -> None:
        """Write a line that is not part of a reply."""
        self.notes.print(text, style="dim", soft_wrap=not self.notes.is_terminal)

    def message(self, line: str) -> str:
        """The message that a line stands for: a slash less, and the files that it names. Raises InputError."""
        message = with_files(line[1:] if line.startswith("//") else line)
        self._typed = message, line
        return message

    def line(self, message: str) -> str:
        """The line that stands for a message."""
        if message == self._typed[0]:
            return self._typed[1]
        line = as_typed(message)
        return f"/{line}" if line.startswith("/") else line

    def keep(self, turn: Turn | None = None) -> None:
        """Write to the file what is new, also of a turn that is not over. Raises InputError."""
        if self.file is not None:
            self.file.write(self.chat.all_as_dict(turn))

    def steps(self, turn: Turn) -> Iterator[Step]:
        """The steps of a reply, of which the file gets its part every few seconds; Ctrl-C ends it early."""
        with cancels(turn.cancel):
            if self.interrupted.is_set():  # while the prompt was being made
                turn.cancel()
            kept = time.monotonic()
            for step in turn:
                yield step
                if time.monotonic() - kept > _KEPT_EVERY:
                    with suppress(MeLocalError):  # the end of the turn tells of it
                        self.keep(turn)
                    kept = time.monotonic()

    def show(self, turn: Turn) -> None:
        """Stream a reply, then its line of figures; Ctrl-C ends it early."""
        if self.chat.dropped:
            self.note(f"Note: the context is full: this reply does not see the oldest {self.chat.dropped} messages")
        try:
            self._stream(turn)
        finally:
            self.painter.end()
            self.last = turn.reply
            self.note(stats_line(self.last))
            if ended_in_thought(self.last):
                self.note("Note: the reply ended inside its thought: /set max_tokens lets it be longer")
            self._notices.tell()

    def _stream(self, turn: Turn) -> None:
        view = ThoughtView(self.painter.console)
        try:
            for pieces, step in enumerate(self.steps(turn)):
                view.write(step.thought)
                if step.answer:
                    view.fold(pieces)
                    self.painter.write(step.answer, step.member)
        finally:
            reply = turn.reply
            view.write(reply.rest.thought)
            view.fold(reply.thought_pieces)
            self.painter.write(reply.rest.answer, "")

    def _weights(self) -> list[float]:
        return [member.weight for member in self.chat.config.members]
