"""Writes docs/chat.svg: a chat with the demo ensemble, as `me-local chat` shows it, from a real run.

python scripts/make_readme_picture.py SEED QUESTION...
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

import me_local
from me_local.cli.display import Painter
from me_local.cli.session import Session

ROOT = Path(__file__).parents[1]


class LinePainter(Painter):
    """Collects a reply and prints it when it ends: there is no terminal here that would wrap its lines."""

    reply = Text()

    def write(self, text: str, member: str) -> None:
        """Remember what a member wrote, or "" for none."""
        self.reply.append(text, style=self.colours.get(member))

    def end(self) -> None:
        """Print the whole reply."""
        self.console.print(self.reply)
        self.reply = Text()


def main(seed: int, questions: list[str]) -> None:
    """Ask the questions in one chat and save what the terminal showed."""
    console = Console(record=True, width=100, force_terminal=True, file=io.StringIO(), highlight=False, markup=False)
    with me_local.load(ROOT / "models.toml", me_local.Overrides(seed=seed, max_tokens=120)) as ensemble:
        session = Session(me_local.Chat(ensemble), LinePainter(console, ensemble.names), console)
        session.greet()
        for question in questions:
            console.print(f"> {question}")
            session.show(session.chat.say(question))
    picture = console.export_svg(title="me-local chat --models models.toml", clear=False)
    # A reader's own monospaced font will do; none is to be fetched from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    (ROOT / "docs" / "chat.svg").write_text(picture)
    print(console.export_text())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
