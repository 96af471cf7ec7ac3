"""Which numbers of pieces are left where some may not come next, by hand and by asking for all of them."""

import numpy as np
import pytest

from me_local.arrays import IntArray
from me_local.mixture.permitting import Beginnings, BoolArray, permitted

PIECES = [b"", b"a", b"ab", b"abc", b"b", b"ba", b"\xc3", b"\xc3\xa9", b"\xff"]


def logits(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def numbers(*values: int) -> IntArray:
    return np.array(values, dtype=np.int32)


def all_of(numbers: IntArray) -> BoolArray:
    return np.ones(len(numbers), dtype=bool)


def test_what_may_not_come_next_is_never_sampled() -> None:
    left = permitted(logits(1, 4, 2, 3), numbers(5, 6, 7, 8), lambda n: n in (5, 7), 0, all_of)
    assert left.tolist() == [5, -1, 7, -1]
    assert left.dtype == np.int32


def test_no_more_are_asked_for_than_are_wanted() -> None:
    asked: list[int] = []

    def permits(number: int) -> bool:
        asked.append(number)
        return number != 6

    left = permitted(logits(1, 4, 2, 3, 0), numbers(5, 6, 7, 8, 9), permits, 2, all_of)
    assert asked == [6, 8, 7]
    assert left.tolist() == [-1, -1, 7, 8, -1]


def test_of_equals_the_smallest_id_is_asked_for_first() -> None:
    left = permitted(logits(2, 1, 2, 2), numbers(9, 8, 7, 6), lambda n: n != 9, 1, all_of)
    assert left.tolist() == [-1, -1, 7, -1]


def test_what_is_never_sampled_is_not_asked_for() -> None:
    values = logits(1, 5, -np.inf, 0)
    left = permitted(values, numbers(3, -1, 4, 5), lambda n: n >= 0, 0, all_of)
    assert left.tolist() == [3, -1, -1, 5]


def test_two_ids_of_one_piece_are_both_left() -> None:
    assert permitted(logits(1, 2, 3), numbers(4, 4, 5), lambda n: n == 4, 0, all_of).tolist() == [4, 4, -1]


def test_none_is_left_where_none_may_come() -> None:
    assert permitted(logits(1, 2), numbers(4, 5), lambda _: False, 3, all_of).tolist() == [-1, -1]
    assert permitted(logits(), numbers(), lambda _: True, 3, all_of).tolist() == []


@pytest.mark.parametrize("size", [100, 5_000, 20_000])
@pytest.mark.parametrize("wanted", [0, 1, 14])
@pytest.mark.parametrize("rare", [2, 97, 1999])
def test_a_large_vocabulary(size: int, wanted: int, rare: int) -> None:
    """The blocks of its largest give what sorting all of it gives; some are equal, and some may never be sampled."""
    random = np.random.default_rng(size + wanted + rare)
    values = random.integers(-50, 50, size).astype(np.float32)
    values[random.integers(0, size, 5)] = -np.inf
    which = np.where(random.random(size) < 0.1, -1, random.permutation(size)).astype(np.int32)
    may = [i for i in range(size) if which[i] >= 0 and which[i] % rare == 1 and values[i] > -np.inf]
    best = sorted(may, key=lambda i: (-values[i], i))[: wanted or None]
    kept = set(best)
    expected = [int(which[i]) if i in kept else -1 for i in range(size)]
    assert permitted(values, which, lambda n: n % rare == 1, wanted, lambda n: n % rare == 1).tolist() == expected


def test_of_many_only_candidates_are_asked_for() -> None:
    asked: list[int] = []

    def permits(number: int) -> bool:
        asked.append(number)
        return number == 0

    size = 10_000
    values = np.linspace(1, 0, size, dtype=np.float32)[::-1].copy()  # the one that may come is the last
    left = permitted(values, np.arange(size, dtype=np.int32), permits, 14, lambda n: n < 3)
    assert np.flatnonzero(left >= 0).tolist() == [0]
    assert asked[-3:] == [2, 1, 0]
    assert len(asked) < 500  # some of the largest, and these


def following(text: bytes) -> BoolArray:
    """Texts "ab", "é" and "b" may follow."""
    may = {b"": [0x61, 0x62, 0xC3], b"a": [0x62], b"\xc3": [0xA9]}.get(text, [])
    return np.isin(np.arange(256), may)


@pytest.mark.parametrize("end", [False, True])
def test_pieces_that_begin_as_they_may(end: bool) -> None:
    among = Beginnings(PIECES).among(following, numbers(*range(9)), end=end)
    assert among.tolist() == [end, True, True, True, True, False, True, True, False]


def test_numbers_may_stand_in_any_order() -> None:
    assert Beginnings(PIECES).among(following, numbers(7, 5, 7), end=False).tolist() == [True, False, True]


def test_single_bytes() -> None:
    beginnings = Beginnings(PIECES)
    assert np.flatnonzero(beginnings.single(numbers(*range(9)))).tolist() == [0x61, 0x62, 0xC3, 0xFF]
    assert np.flatnonzero(beginnings.single(numbers(-1, 0, 1, 2, -1))).tolist() == [0x61]
