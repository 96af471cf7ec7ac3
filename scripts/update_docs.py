"""Writes into the documentation what the commands print about themselves: `python scripts/update_docs.py`.

A block that follows a mark such as `<!-- help: me-local chat --help -->` gets the help text of that command, the one
after `<!-- help: /help -->` the list of commands inside a chat. tests/docs checks that they are up to date.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from click.testing import CliRunner

from me_local.cli import main as me_local
from me_local.cli.commands import COMMANDS

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
WIDTH = 80  # columns of a help text
_BLOCK = re.compile(r"(?<=<!-- help: )(?P<line>[^\n]+)(?P<open> -->\n```text\n).*?(?P<close>```\n)", re.DOTALL)


def updated(page: str) -> str:
    """The text of a page with all its blocks as they should be. Raises ValueError for a mark that is not known."""
    return _BLOCK.sub(lambda block: block["line"] + block["open"] + printed(block["line"]) + block["close"], page)


def marks(page: str) -> list[str]:
    """The lines whose output stands in a page."""
    return [block["line"] for block in _BLOCK.finditer(page)]


def printed(line: str) -> str:
    """What a line of a shell, such as `me-local chat --help`, or `/help` in a chat, prints."""
    if line == "/help":
        return _chat_help()
    program, *arguments = line.split()
    if program != "me-local" or arguments[-1:] != ["--help"]:
        raise ValueError(f"no such mark: {line}")
    settings: dict[str, Any] = {"prog_name": program, "terminal_width": WIDTH, "max_content_width": WIDTH}
    result = CliRunner().invoke(me_local, arguments, **settings)
    if result.exit_code:
        raise ValueError(f"{line}: {result.output}")
    return result.output


def _chat_help() -> str:
    notes: list[str] = []
    session: Any = SimpleNamespace(note=notes.append)
    COMMANDS["help"][1](session, "")
    return "\n".join(notes) + "\n"


def main() -> None:
    """Rewrite the page."""
    old = PAGE.read_text()
    new = updated(old)
    if new != old:
        PAGE.write_text(new)
        print(f"{PAGE.name} is up to date now", file=sys.stderr)


if __name__ == "__main__":
    main()
