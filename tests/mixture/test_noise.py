"""Random numbers of pieces, against SplitMix64's published numbers, and by what draws with them must look like.

Seeds are fixed: each statistical test stands or falls for good; its threshold is what one seed in a million would miss.
"""

import numpy as np
import pytest
from scipy import stats

from me_local._reference import split_mix, uniform_of
from me_local.arrays import FloatArray
from me_local.mixture.alignment import Distribution, sample
from me_local.mixture.noise import Noise

MILLIONTH = 1e-6
PLACES = 40_000


def noise(seed: int) -> Noise:
    return Noise(np.random.SeedSequence(seed))


def distribution(probabilities: FloatArray) -> Distribution:
    return Distribution(np.arange(len(probabilities), dtype=np.int32), probabilities)


def drawn(this: Distribution, source: Noise) -> np.ndarray:
    return np.array([sample(this, source.at(place, this.numbers))[0] for place in range(PLACES)])


def test_the_reference_is_splitmix64() -> None:
    """Source: the numbers for this seed at rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64."""
    assert [split_mix(1234567, i) for i in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("place", [0, 1, 77, 10**9])
def test_it_is_that_of_the_reference(place: int) -> None:
    key = int(np.random.SeedSequence(5).generate_state(1, np.uint64)[0])
    numbers = np.array([0, 1, 2, 299_999], dtype=np.int32)
    expected = [-np.log(uniform_of(key, place, n)) for n in numbers.tolist()]
    assert noise(5).at(place, numbers).tolist() == pytest.approx(expected, rel=1e-15)


def test_it_does_not_depend_on_what_else_there_is_to_draw() -> None:
    few, many = np.array([3, 70_000], dtype=np.int32), np.arange(100_000, dtype=np.int32)
    assert (noise(1).at(9, many)[few] == noise(1).at(9, few)).all()
    assert (noise(1).at(9, few) != noise(2).at(9, few)).all()
    assert (noise(1).at(9, few) != noise(1).at(10, few)).all()


@pytest.mark.parametrize("across", ["pieces", "places", "seeds"])
def test_it_is_exponential_and_neighbours_do_not_depend_on_each_other(across: str) -> None:
    one = np.array([7], dtype=np.int32)
    found = {
        "pieces": lambda: noise(3).at(11, np.arange(PLACES, dtype=np.int32)),
        "places": lambda: np.array([noise(3).at(place, one)[0] for place in range(PLACES)]),
        "seeds": lambda: np.array([noise(seed).at(11, one)[0] for seed in range(PLACES)]),
    }[across]()
    uniform = np.exp(-found)
    assert stats.kstest(uniform, "uniform").pvalue > MILLIONTH
    for distance in (1, 2, 256):
        first, second = uniform[: PLACES - PLACES % (2 * distance)].reshape(-1, 2, distance).transpose(1, 0, 2)
        pairs, *_ = np.histogram2d(first.ravel(), second.ravel(), bins=16, range=[[0, 1]] * 2)
        assert stats.chisquare(pairs.ravel()).pvalue > MILLIONTH


def test_pieces_are_drawn_with_their_probabilities_each_time_anew() -> None:
    this = distribution(np.array([0.5, 0.25, 0.15, 0.07, 0.03]))
    found = drawn(this, noise(4))
    assert stats.chisquare(np.bincount(found, minlength=5), this.probabilities * PLACES).pvalue > MILLIONTH
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (found[::2], found[1::2]), 1)
    expected = np.outer(this.probabilities, this.probabilities) * (PLACES / 2)
    assert stats.chisquare(pairs.ravel(), expected.ravel()).pvalue > MILLIONTH


@pytest.mark.parametrize("seed", range(5))
def test_two_distributions_agree_as_often_as_they_are_alike(seed: int) -> None:
    """What the source proves, less five standard deviations."""
    random = np.random.default_rng(seed)
    first, second = (distribution(random.dirichlet(np.full(8, 0.5))) for _ in range(2))
    distance = np.abs(first.probabilities - second.probabilities).sum() / 2
    bound = (1 - distance) / (1 + distance)
    agreed = (drawn(first, noise(seed)) == drawn(second, noise(seed))).mean()
    assert agreed > bound - 5 * np.sqrt(bound * (1 - bound) / PLACES)
