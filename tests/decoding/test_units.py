"""Where texts are cut into words and tokens."""

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from me_local.decoding.units import LONGEST, token_cuts, token_starts, word_cuts
from me_local.errors import InputError
from me_local.llama.member import Member

OpenMember = Callable[..., Member]


def starts(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def every_byte(text: bytes) -> np.ndarray:
    return np.arange(len(text) + 1)


def words(text: bytes, *tokens: np.ndarray, given: int = 0) -> tuple[list[bytes], list[bool]]:
    cuts = word_cuts(text, tokens or (every_byte(text),), given)
    positions = cuts.positions.tolist()
    return [text[a:b] for a, b in itertools.pairwise(positions)], cuts.opens.tolist()


def test_a_word_opens_with_its_white_space() -> None:
    assert words(b"def f(x):\n\n    return  x\n") == (
        [b"def", b" f(x):", b"\n\n    return", b"  x", b"\n"],
        [False, True, True, True, True, False],
    )


def test_a_token_across_the_end_of_a_word_joins_two_words() -> None:
    text = b"end. \nNext one"
    # The second vocabulary has a token ". \n".
    assert words(text, every_byte(text), starts(0, 3, 6, 10, 14))[0] == [b"end. \nNext", b" one"]
    assert words(text, starts(0, 4, 5, 14))[0] == [b"end.", b" \nNext one"]


def test_the_first_word_is_the_one_that_the_given_bytes_end_in() -> None:
    text = b"the cat sat"
    assert words(text, given=4) == ([b"cat", b" sat"], [False, True, False])
    assert words(text, starts(0, 3, 6, 11), given=5)[0] == [b" cat sat"]
    assert words(text, starts(0, 3, 7, 11), given=3)[0] == [b" cat", b" sat"]
    assert words(text, starts(0, 3, 7, 11), given=7)[0] == [b" sat"]


def test_text_without_spaces_is_cut_in_front_of_a_character() -> None:
    text = "春天来了，河边的小博物馆重新开放。".encode()  # three bytes each
    cut, opens = words(text)
    assert b"".join(cut) == text
    assert [part.decode() for part in cut] == list("春天来了，河边的小博物馆重新开放。")
    assert not any(opens)
    assert words("春 a b".encode()) == (["春".encode(), b" a", b" b"], [False, False, True, False])
    assert [len(part) for part in words(b"x" * 70)[0]] == [LONGEST, 1, 1, 1, 1, 1, 1]
    assert words(b"x" * 70, starts(0, 10, 66, 70))[0] == [b"x" * 66, b"x" * 4]
    assert words(b"a " + b"x" * 63 + b" b")[0] == [b"a", b" " + b"x" * 63, b" b"]
    assert words(b"x" * 64 + b" b")[1] == [False, False, False]  # it would have ended in any case


def test_tokens_are_units_where_all_share_a_vocabulary() -> None:
    cuts = token_cuts(starts(0, 3, 5, 9), 3)
    assert cuts.positions.tolist() == [3, 5, 9]
    assert token_cuts(starts(0, 3, 5, 9), 4).positions.tolist() == [3, 5, 9]
    assert token_cuts(starts(0, 3, 5, 9), 5).positions.tolist() == [5, 9]
    assert not cuts.opens.any()


def test_a_space_that_the_tokenizer_adds_has_no_width(open_member: OpenMember) -> None:
    vocabulary = open_member("spm").vocabulary
    text = b"the cat sat"
    ids = vocabulary.encode(text, at_start=True)
    assert vocabulary.joined(ids) == b" the cat sat"
    found = token_starts(vocabulary, ids, text).tolist()
    assert [text[a:b] for a, b in itertools.pairwise(found)] == [
        vocabulary.pieces[ids[0]].removeprefix(b" "),
        *(vocabulary.pieces[i] for i in ids[1:]),
    ]


def test_ids_that_do_not_stand_for_the_text_are_refused(open_member: OpenMember) -> None:
    vocabulary = open_member("bpe_a").vocabulary
    with pytest.raises(InputError, match="no tokens for byte 3 of 'the\\\\x01 cat'"):
        token_starts(vocabulary, vocabulary.encode(b"the cat"), b"the\x01 cat")


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab ,\n\t1春é", min_size=1, max_size=60), share=st.floats(0, 0.9))
def test_words_of_two_vocabularies(open_member: OpenMember, text: str, share: float) -> None:
    whole = text.encode()
    at = int(share * len(whole))
    tokens = [
        token_starts(v, v.encode(whole, at_start=True), whole)
        for v in (open_member("bpe_a").vocabulary, open_member("spm").vocabulary)
    ]
    cuts = word_cuts(whole, tokens, at)
    assert (np.diff(cuts.positions) > 0).all()
    assert cuts.positions[0] <= at
    assert cuts.positions[-1] == len(whole)
    for found in tokens:
        assert set(cuts.positions.tolist()) <= set(found.tolist())
    for position, opens in zip(cuts.positions.tolist(), cuts.opens, strict=True):
        assert not opens or re.match(rb"\S\s", whole[position - 1 : position + 1])
