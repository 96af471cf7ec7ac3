"""Aligning, mixing and sampling, against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_local.mixture.alignment import Distribution, argmax, mix, pick, sample, top_k
from me_local.sampling import Sampling
from me_local.text.unified import END

LOG = np.log


def logits(*probabilities: float) -> np.ndarray:
    return LOG(np.array(probabilities, dtype=np.float32))


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def as_dict(distribution: Distribution) -> dict[int, float]:
    return dict(zip(distribution.numbers.tolist(), distribution.probabilities.tolist(), strict=True))


def close(distribution: Distribution, expected: dict[int, float]) -> bool:
    return as_dict(distribution) == pytest.approx(expected, abs=1e-6)


EACH = numbers(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(top_k=0), {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}),
        (Sampling(top_k=2), {1: 4 / 7, 2: 3 / 7}),
        (Sampling(top_k=100), {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}),
        # Temperature 0.5 squares the odds: 16, 9, 4, 1 of 30.
        (Sampling(top_k=0, temperature=0.5), {1: 16 / 30, 2: 9 / 30, 3: 4 / 30, 4: 1 / 30}),
        (Sampling(temperature=0), {1: 1.0}),
        # 0.4 + 0.3 first reach 0.65; at 0.75 the third is needed.
        (Sampling(top_k=0, top_p=0.65), {1: 4 / 7, 2: 3 / 7}),
        (Sampling(top_k=0, top_p=0.75), {1: 4 / 9, 2: 3 / 9, 3: 2 / 9}),
        # Tempered first, then cut: 16/30 + 9/30 reach 0.8.
        (Sampling(top_k=0, temperature=0.5, top_p=0.8), {1: 16 / 25, 2: 9 / 25}),
        # Top-p counts what top-k has left: 0.4 / 0.7 alone reaches 0.57.
        (Sampling(top_k=2, top_p=0.57), {1: 1.0}),
        (Sampling(top_k=0, min_p=0.6), {1: 4 / 7, 2: 3 / 7}),
        (Sampling(top_k=0, min_p=1.0), {1: 1.0}),
    ],
)
def test_truncation_by_hand(sampling: Sampling, expected: dict[int, float]) -> None:
    assert close(top_k(logits(0.4, 0.3, 0.2, 0.1), EACH, sampling), expected)


def test_equal_pieces_add_up_after_the_truncation() -> None:
    # Two ids for piece 7, two that end the generation.
    pieces = numbers(7, END, 7, END, 9)
    distribution = top_k(logits(0.3, 0.2, 0.2, 0.2, 0.1), pieces, Sampling(top_k=4))
    assert close(distribution, {7: 5 / 9, END: 4 / 9})


def test_ids_that_are_never_sampled_are_removed_before_the_truncation() -> None:
    distribution = top_k(logits(0.5, 0.2, 0.2, 0.1), numbers(-1, 2, 3, 4), Sampling(top_k=2))
    assert close(distribution, {2: 0.5, 3: 0.5})


def test_equal_logits_at_the_edge_go_to_the_smallest_ids() -> None:
    distribution = top_k(logits(0.25, 0.25, 0.25, 0.25), numbers(4, 3, 2, 1), Sampling(top_k=2))
    assert close(distribution, {4: 0.5, 3: 0.5})


@given(
    st.integers(1, 20),
    st.lists(st.integers(-20, 20), min_size=65, max_size=1500),
    st.sets(st.integers(0, 1499), max_size=300),
)
def test_the_quick_search_finds_the_largest_of_a_full_sort(k: int, values: list[int], removed: set[int]) -> None:
    scores = np.array(values, dtype=np.float32) / 4
    pieces = np.arange(1, len(values) + 1, dtype=np.int32)
    pieces[[i for i in removed if i < len(values)]] = -1
    allowed = [i for i in range(len(values)) if pieces[i] > 0]
    if not allowed:
        with pytest.raises(ValueError, match="no token"):
            top_k(scores, pieces, Sampling(top_k=k))
        return
    best = sorted(allowed, key=lambda i: (-scores[i], i))[:k]
    found = top_k(scores, pieces, Sampling(top_k=k))
    assert set(found.numbers.tolist()) == {i + 1 for i in best}
    odds = {i + 1: np.exp(float(scores[i])) for i in best}
    assert close(found, {i: value / sum(odds.values()) for i, value in odds.items()})


@pytest.mark.parametrize("k", [1, 10, 25, 60, 200, 300, 5000, 9000])
@pytest.mark.parametrize("frequent", ["first", "last", "anywhere"])
@pytest.mark.parametrize("refused", [0, 2, 40])
def test_every_way_of_searching_finds_the_largest(k: int, frequent: str, refused: int) -> None:
    random = np.random.default_rng(k)
    scores = random.integers(-300, 300, 8000).astype(np.float32) / 16
    if frequent != "anywhere":
        scores = np.sort(scores)[::-1] if frequent == "first" else np.sort(scores)
        scores[random.choice(8000, 30)] += 20
    pieces = np.arange(1, 8001, dtype=np.int32)
    pieces[random.choice(8000, 900, replace=False)] = -1
    pieces[scores.argsort()[8000 - refused :]] = -1  # the best may not be sampled
    allowed = np.flatnonzero(pieces >= 0)
    best = sorted(allowed.tolist(), key=lambda i: (-scores[i], i))[:k]
    assert top_k(scores, pieces, Sampling(top_k=k)).numbers.tolist() == sorted(i + 1 for i in best)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("spread", [0, 5])
@pytest.mark.parametrize(("size", "at"), [(130, 0), (130, 70), (130, 129), (4000, 0), (4000, 1999), (4000, 3999)])
def test_logits_that_are_no_numbers_are_an_error(bad: float, spread: float, size: int, at: int) -> None:
    scores = (spread * np.random.default_rng(at).standard_normal(size)).astype(np.float32)
    scores[at] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        top_k(scores, np.arange(1, size + 1, dtype=np.int32), Sampling())


def test_minus_infinity_is_never_sampled() -> None:
    distribution = top_k(np.array([0, -np.inf, 0, -np.inf], dtype=np.float32), EACH, Sampling(top_k=3))
    assert close(distribution, {1: 0.5, 3: 0.5})


def test_a_mixture_is_the_weighted_mean() -> None:
    first = Distribution(numbers(1, 2), np.array([0.5, 0.5]))
    second = Distribution(numbers(2, 5), np.array([0.2, 0.8]))
    mixture = mix([first, second], [0.75, 0.25])
    assert close(mixture, {1: 0.375, 2: 0.425, 5: 0.2})
    assert mixture.of(2) == pytest.approx(0.425)
    assert mixture.of(3) == mixture.of(9) == 0.0
    assert argmax(mixture) == (2, pytest.approx(0.425))


@pytest.mark.parametrize(
    ("noise", "expected"),
    [((1.0, 1.0, 1.0), 4), ((0.4, 1.0, 1.0), 1), ((1.0, 1.0, 0.4), 6), ((0.6, 1.1, 1.0), 4), ((9.0, 9.0, 4.4), 6)],
)
def test_the_piece_that_arrives_first_is_drawn(noise: tuple[float, ...], expected: int) -> None:
    """With times 4, 2 and 4 for each unit of noise."""
    distribution = Distribution(numbers(1, 4, 6), np.array([0.25, 0.5, 0.25]))
    assert sample(distribution, np.array(noise))[0] == expected


def test_a_piece_without_probability_never_arrives() -> None:
    distribution = Distribution(numbers(1, 4), np.array([0.0, 1.0]))
    assert sample(distribution, np.array([1e-300, 37.0])) == (4, 1.0)


@pytest.mark.parametrize("uniform", [0.0, 0.3, np.nextafter(1.0, 0.0)])
def test_a_weight_of_zero_is_never_picked(uniform: float) -> None:
    assert pick(np.array([0.0, 1.0, 0.0]), uniform) == 1
