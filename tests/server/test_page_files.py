"""The files of the page, as they are: small modules that say what they know, and nothing of what its policy forbids."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

STATIC = ROOT / "me_local" / "server" / "static"
FILES = sorted(STATIC.iterdir())
WAYS_IN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|DOMParser|document\.write|\beval\(|new Function"
    r"|srcdoc|\son\w+=[\"']|\sstyle=|<style|<script(?! type=\"module\" src=\")"
)
"""By these a text could become more than text, or the policy would have to be laxer."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_made_of_texts_and_nothing_is_asked_elsewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    assert WAYS_IN.findall(text) == []
    assert re.findall(r"\w+://(?!www\.w3\.org/2000/svg)\w", text) == []
    assert re.findall(r"(?:src|href|from|import|fetch|ask)[ =(]+[\"']/", text) == []  # behind a prefix


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".js"], ids=lambda path: path.name)
def test_a_module_says_what_it_is_and_can_be_read(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith("// ")
    assert len(lines) <= 400
    assert max(map(len, lines)) <= 120


def test_all_of_it_is_small() -> None:
    """As it is sent, with room for what the server says of its members."""
    assert sum(path.stat().st_size for path in FILES) < 98_000
