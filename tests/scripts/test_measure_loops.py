"""What scripts/measure_loops.py calls a loop, and how it reads settings."""

import pytest
from measure_loops import is_loop, read_given, repeated_share

LIST = "\n".join(f"{n}. I am a helpful assistant." for n in range(1, 4))


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("17 times 3 is 50.\n" * 4, True),  # 4 × 18 characters
        ("17 times 3 is 50.\n" * 3, True),  # 54 characters, but 7 of 12 word 4-grams
        ("Well. " + "17 times 3 is 50. " * 3 + "So I think that it may be 50 after all.", False),
        ("First of all. " + "a phrase of twenty-1" * 3 + " And so on.", True),
        (LIST, True),  # numbers are alike
        (" ".join(map(str, range(100))), False),  # but there has to be a letter
        ("2023: " * 20, True),
        ("one two three four five. " * 2 + "six seven", False),  # twice is no loop
        ("", False),
    ],
)
def test_what_a_loop_is(text: str, loops: bool) -> None:
    assert is_loop(text) == loops


def test_the_share_of_what_came_before() -> None:
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)  # a b c d comes twice among five
    assert repeated_share("a b c") == 0


def test_settings_are_json() -> None:
    given = "repeat_penalty=1.1,dry_sequence_breakers=[]"
    assert read_given(given) == {"repeat_penalty": 1.1, "dry_sequence_breakers": ()}
