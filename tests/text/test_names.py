"""Finding many names, against regular expressions and plain searches."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_local.text.names import Names

SHORT = st.text("ab<|", min_size=1, max_size=5)


@given(st.sets(SHORT, max_size=8), st.text("ab<|", max_size=40))
def test_it_finds_what_a_regular_expression_of_all_names_finds(names: set[str], text: str) -> None:
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    assert list(Names(names).find(text)) == [match.span() for match in pattern.finditer(text)]


@given(st.sets(SHORT, max_size=8), st.text("ab<|", max_size=10))
def test_where_a_name_could_go_on(names: set[str], text: str) -> None:
    starts = {name[:n] for name in names for n in range(1, len(name))}
    ends = {name[n:] for name in names for n in range(1, len(name))}
    assert Names(names).may_begin(text) == any(text.endswith(start) for start in starts)
    assert Names(names).may_end(text) == any(text.startswith(end) for end in ends)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("no name", "no name"),
        ("<a><b>", "<.a.><.b.>"),
        ("x<a>y", "x<.a.>y"),
        ("<<a>>", "<<.a.>>"),
        ("<a>b>", "<.a.>.b.>"),  # the longest that begins there
    ],
)
def test_names_are_changed(text: str, expected: str) -> None:
    assert Names(["<a>", "<b>", "<a>b>"]).replace(text, ".".join) == expected


def test_what_a_change_makes_is_changed_too() -> None:
    # Without the first name the rest is one.
    assert Names(["ab"]).replace("aabb", lambda _: "") == ""


@pytest.mark.parametrize("first", ["]", "^", "-", "\\", "["])
def test_names_may_begin_with_any_character(first: str) -> None:
    assert list(Names([f"{first}a", "b", "-a"]).find(f"x{first}a")) == [(1, 3)]
