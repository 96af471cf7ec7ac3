"""JSON that is written: one line for every reader, and the same value again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_local.jsonl import json_text
from me_local.server.telling import _line


@given(st.text())
def test_any_text_is_one_line_that_reads_the_same(text: str) -> None:
    written = json_text({"text": text})
    assert len(written.splitlines()) == 1
    assert json.loads(written.encode()) == {"text": text}


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x9b", "\x7f", "\x1b", "\n", "\ud800"])
def test_what_ends_a_line_or_moves_a_terminal_is_escaped(character: str) -> None:
    written = json_text([f"a{character}b", "ä\\u2028"])
    assert character not in written
    assert "ä" in written
    assert json.loads(written) == [f"a{character}b", "ä\\u2028"]
    event = _line({"choices": [character]})
    assert event.startswith('data: {"choices":["\\')
    assert event.endswith('"]}\n\n')
    assert len(event.splitlines()) == 2
