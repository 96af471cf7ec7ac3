"""Writes into the documentation what code and commands say of themselves: `python scripts/update_docs.py`.

A block that follows a mark such as `<!-- help: me-local chat --help -->` gets the help text of that command, the one
after `<!-- help: /help -->` the list of commands inside a chat, one after `<!-- source: FILE -->` that
file, and what stands between `<!-- modules -->` and `<!-- end -->` a table of all modules with the beginnings of their
docstrings. tests/docs checks that they are up to date.
"""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from click.testing import CliRunner

from me_local.cli.commands import COMMANDS
from me_local.cli.program import main as me_local

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "commands.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
WIDTH = 80  # columns of a help text
_BLOCK = re.compile(r"(?<=<!-- help: )(?P<line>[^\n]+)(?P<open> -->\n```text\n).*?(?P<close>```\n)", re.DOTALL)


_SOURCE = re.compile(r"(?<=<!-- source: )(?P<path>[^\n]+)(?P<open> -->\n```python\n).*?(?P<close>```\n)", re.DOTALL)
_MODULES = re.compile(r"(?<=<!-- modules -->\n).*?(?=<!-- end -->)", re.DOTALL)


def updated(page: str) -> str:
    """The text of a page with all its blocks as they should be. Raises ValueError for a mark that is not known."""
    page = _BLOCK.sub(lambda block: block["line"] + block["open"] + printed(block["line"]) + block["close"], page)
    page = _SOURCE.sub(
        lambda block: block["path"] + block["open"] + (ROOT / block["path"]).read_text("utf-8") + block["close"], page
    )
    return _MODULES.sub(lambda _: _modules(), page)


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


def _modules() -> str:
    """A table for each package, the lowest last, and one for the modules beside them."""
    package = ROOT / "me_local"
    folders = [package / name for name in _PACKAGES]
    assert {path.parent for path in package.glob("*/__init__.py")} == set(folders)
    tables = [_table(f"{folder.name}/", sorted(folder.rglob("*.py")), folder) for folder in folders]
    return "\n" + "\n".join([_table("me_local/ itself", sorted(package.glob("*.py")), package), *tables]) + "\n"


_PACKAGES = (
    "cli",
    "server",
    "measuring",
    "evaluation",
    "decoding",
    "mixture",
    "engines",
    "llama",
    "stores",
    "text",
    "system",
)


def _table(title: str, files: list[Path], folder: Path) -> str:
    rows = [(path.relative_to(folder), _first_sentence(path)) for path in files if path.name != "__init__.py"]
    package = f"{_first_sentence(folder / '__init__.py')}\n\n"
    return f"#### {title}\n\n{package}| | |\n|---|---|\n" + "".join(f"| `{path}` | {text} |\n" for path, text in rows)


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def _chat_help() -> str:
    notes: list[str] = []
    session: Any = SimpleNamespace(note=notes.append)
    COMMANDS["help"][1](session, "")
    return "\n".join(notes) + "\n"


def main() -> None:
    """Rewrite the pages."""
    for page in (PAGE, ARCHITECTURE):
        old = page.read_text("utf-8")
        new = updated(old)
        if new != old:
            page.write_text(new, "utf-8")
            print(f"{page.name} is up to date now", file=sys.stderr)


if __name__ == "__main__":
    main()
