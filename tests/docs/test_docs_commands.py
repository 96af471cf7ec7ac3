"""What the documentation says of commands, options and environment variables is what click says."""

import re
from pathlib import Path

import click
import pytest
import update_docs

from me_local.cli.commands import COMMANDS
from me_local.cli.program import main

ROOT = Path(__file__).parents[2]
PAGE = update_docs.PAGE.read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"_ME_LOCAL_COMPLETE", "ME_LOCAL_MODEL_DIRS"}  # click's own, for shell completion; of no single option


@pytest.mark.parametrize("page", [update_docs.PAGE, update_docs.ARCHITECTURE], ids=lambda page: page.name)
def test_what_code_and_commands_say_of_themselves_is_up_to_date(page: Path) -> None:
    text = page.read_text("utf-8")
    assert update_docs.updated(text) == text, f"{page.name} is out of date: run python scripts/update_docs.py"


def test_each_command_has_its_place_with_its_help_and_so_has_the_chat() -> None:
    helps = [f"me-local {name} --help" for name in main.commands]
    assert sorted(update_docs.marks(PAGE)) == sorted(["/help", "me-local --help", *helps])
    assert sorted(re.findall(r"^## `me-local (\w+)`$", PAGE, re.MULTILINE)) == sorted(main.commands)
    assert sorted(re.findall(r"^\| \[`me-local (\w+)`\]", PAGE, re.MULTILINE)) == sorted(main.commands)


def test_the_help_of_a_command_stands_below_its_heading() -> None:
    sections = re.split(r"^## `me-local (\w+)`$", PAGE, flags=re.MULTILINE)
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        assert f"me-local {name} --help" in update_docs.marks(text)


def test_a_block_that_is_out_of_date_is_rewritten_and_the_rest_stays() -> None:
    page = "# A\n\n<!-- help: /help -->\n```text\nold\n```\n\n```text\nother\n```\n"
    new = update_docs.updated(page)
    assert new.startswith("# A\n\n<!-- help: /help -->\n```text\n/help      list the commands\n")
    assert new.endswith("Ctrl-D leaves.\n```\n\n```text\nother\n```\n")
    assert all(f"\n/{name} " in new for name in COMMANDS)
    assert update_docs.updated(new) == new


@pytest.mark.parametrize("line", ["me-local chat", "me-local nothing --help", "ls --help"])
def test_a_mark_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=line):
        update_docs.printed(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_environment_variables_are_those_of_options(page: Path) -> None:
    options = [option for command in main.commands.values() for option in command.params]
    known = {option.envvar for option in options if isinstance(option, click.Option)}
    assert set(re.findall(r"\b_?ME_LOCAL_[A-Z_]+\b", page.read_text())) <= known | OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_command_lines_exist(page: Path) -> None:
    """In blocks, where a line is a command as one would type it."""
    for name, rest in re.findall(r"^(?:\$ .*?|.*&& )?me-local (\w+)(.*)$", page.read_text(), re.MULTILINE):
        if name not in main.commands:
            continue
        known = {opt for option in main.commands[name].params for opt in (*option.opts, *option.secondary_opts)}
        assert set(re.findall(r"(?<=\s)--?[a-z][\w-]*", rest)) <= known | {"--help"}, (name, rest)
