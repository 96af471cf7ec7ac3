"""The line of figures below a reply."""

import pytest

from me_local.cli.display import stats_line
from me_local.decoding.reply import MemberUsage, Reply


def test_a_prompt_that_is_evaluated_again_has_nothing_in_a_cache() -> None:
    """An engine without a prefix cache does so for each piece."""
    again = MemberUsage("a", 2.0, 2, 18, 36, 1, 0.25, 0.5)
    kept = MemberUsage("b", 0.0, 1, 20, 5, 0, 0.25, 0.0)
    unused = MemberUsage("c", 0.0, 0, 20, 0, 0, 0.0, 0.0)
    reply = Reply("ab", "length", "me", "token", 7, (), (again, kept, unused), 1.5)
    assert "| prompt 0.50 s, tokens new+cached: a 36+0, b 5+15 | sync 0.50 s | length, seed 7" in stats_line(reply)


@pytest.mark.parametrize(
    ("calls", "guessed", "shown"), [(58, 42, ", 42% guessed |"), (100, 0, "pieces/s |"), (300, 2, "pieces/s |")]
)
def test_predictions_that_were_guessed_are_shown_where_they_count(calls: int, guessed: int, shown: str) -> None:
    usage = (MemberUsage("a", 3.0, calls, 41, 36, 2, 0.4, 0.2, guessed=guessed),)
    reply = Reply("abc", "length", "me", "token", 7, (), usage, 1.0)
    assert shown in stats_line(reply)
