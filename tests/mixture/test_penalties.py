"""Penalties by hand, and against llama.cpp's own samplers."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np

from me_local.decoding.shaping import breaking
from me_local.llama.member import Member
from me_local.mixture.penalties import penalised, repeated, repetitions
from me_local.sampling import Sampling

NONE = np.zeros(0, dtype=np.int32)
UNBROKEN = np.zeros(300, dtype=bool)
BREAKERS = ("\n", ":", '"', "*")


def ids(*given: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(given, dtype=np.int32)


def costs(sampling: Sampling, *context: int, breaks: object = UNBROKEN) -> dict[int, float]:
    found, losses = repetitions(ids(*context), breaks, sampling)  # type: ignore[arg-type]
    return dict(zip(found.tolist(), losses.tolist(), strict=True))


def test_the_window_counts_ids_and_spares_some() -> None:
    context = ids(9, 5, 5, 7, 5, 3)
    found, counts = repeated(context, ids(7), Sampling(repeat_last_n=4))
    assert (found.tolist(), counts.tolist()) == ([3, 5], [1, 2])
    assert repeated(context, NONE, Sampling(repeat_last_n=-1))[0].tolist() == [3, 5, 7, 9]
    assert repeated(context, NONE, Sampling(repeat_last_n=99))[1].tolist() == [1, 3, 1, 1]
    assert repeated(ids(), NONE, Sampling())[0].tolist() == []


def test_a_positive_logit_is_divided_a_negative_one_multiplied() -> None:
    sampling = Sampling(repeat_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    logits = penalised(np.array([3.0, -3.0, 0.0], dtype=np.float32), ids(1, 2, 3), sampling)
    assert logits.tolist() == [1.5 - 0.5 - 0.25, -6.0 - 0.5 - 0.5, -0.5 - 0.75]
    assert logits.dtype == np.float32


def test_what_would_go_on_with_a_repetition_costs_more_the_longer_it_is() -> None:
    sampling = Sampling(dry_multiplier=0.5, dry_base=2.0, dry_allowed_length=2)
    assert costs(sampling, 1, 2, 9, 1, 2) == {9: 0.5}
    assert costs(sampling, 7, 1, 2, 9, 7, 1, 2) == {9: 1.0}
    assert costs(sampling, 2, 9, 1, 2) == {}  # one token in common
    assert costs(sampling, 7, 1, 2, 8, 1, 2, 9, 7, 1, 2) == {8: 1.0, 9: 0.5}
    assert costs(sampling, 5, 5, 5, 5) == {5: 1.0}  # the end goes on with 5 behind 5, 5 and 5, 5, 5
    assert costs(sampling, 5, 5, 5) == {5: 0.5}


def test_repetitions_end_at_breakers_and_at_the_window() -> None:
    breaks = UNBROKEN.copy()
    breaks[[3]] = True
    sampling = Sampling(dry_multiplier=0.5, dry_base=2.0, dry_allowed_length=2)
    context = (8, 3, 1, 2, 9, 8, 3, 1, 2)
    assert costs(sampling, *context) == {9: 2.0}
    assert costs(sampling, *context, breaks=breaks) == {9: 0.5}
    assert costs(sampling, 1, 2, 3, 8, 1, 2, breaks=breaks) == {}  # 3 itself is free
    assert costs(sampling, 1, 2, 9, 1, 2, 3, breaks=breaks) == {}
    assert costs(Sampling(dry_multiplier=0.5, dry_penalty_last_n=5), 1, 2, 9, 4, 1, 2) == {}


def test_a_penalty_grows_to_an_end() -> None:
    sampling = Sampling(dry_multiplier=1000.0, dry_base=100.0, dry_allowed_length=1)
    assert 1e20 < costs(sampling, *[5] * 400)[5] < 1e38


@contextmanager
def sampler(made: Any) -> Iterator[Any]:
    try:
        yield made
    finally:
        llama_cpp.llama_sampler_free(made)


def after(made: Any, context: list[int], logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What is left of the logits by a sampler of llama.cpp that has seen a context."""
    for id_ in context:
        llama_cpp.llama_sampler_accept(made, id_)
    data = (llama_cpp.llama_token_data * len(logits))(*[(i, x, 0.0) for i, x in enumerate(logits.tolist())])
    array = llama_cpp.llama_token_data_array(data, len(logits), -1, False)
    llama_cpp.llama_sampler_apply(made, ctypes.byref(array))
    return np.array([array.data[i].logit for i in range(array.size)])


def test_penalties_are_those_of_llama_cpp() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        logits = (3 * random.standard_normal(40)).astype(np.float32)
        context = random.integers(0, 40, random.integers(0, 90)).astype(np.int32)
        last_n = int(random.integers(1, 80))
        factor, presence, frequency = random.uniform(0.7, 1.5), random.uniform(-1, 1), random.uniform(-1, 1)
        with sampler(llama_cpp.llama_sampler_init_penalties(40, last_n, factor, frequency, presence)) as made:
            expected = after(made, context.tolist(), logits)
        sampling = Sampling(
            repeat_penalty=factor, presence_penalty=presence, frequency_penalty=frequency, repeat_last_n=last_n
        )
        found, counts = repeated(context, NONE, sampling)
        logits[found] = penalised(logits[found], counts, sampling)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_dry_is_that_of_llama_cpp(open_member: Callable[..., Member]) -> None:
    vocabulary = open_member("bpe_a").vocabulary
    random = np.random.default_rng(1)
    breaks = breaking(vocabulary, BREAKERS)
    letters = [i for i, piece in enumerate(vocabulary.pieces) if piece.isalpha()][:4]
    colon = next(i for i, piece in enumerate(vocabulary.pieces) if b":" in piece)
    texts = (ctypes.c_char_p * len(BREAKERS))(*[text.encode() for text in BREAKERS])
    penalties = 0
    for _ in range(300):
        alphabet = letters[: random.integers(1, 5)]
        context = random.choice(alphabet, random.integers(0, 60)).astype(np.int32)
        context[random.random(len(context)) < 0.03] = colon
        base, allowed, last_n = random.uniform(1, 2), int(random.integers(1, 5)), int(random.choice([-1, 10, 30]))
        made = llama_cpp.llama_sampler_init_dry(
            vocabulary._pointer, 0.8, base, allowed, 99 if last_n < 0 else last_n, texts, len(BREAKERS)
        )
        logits = np.zeros(vocabulary.size, dtype=np.float32)
        with sampler(made):
            expected = after(made, context.tolist(), logits)
        sampling = Sampling(dry_multiplier=0.8, dry_base=base, dry_allowed_length=allowed, dry_penalty_last_n=last_n)
        found, losses = repetitions(context, breaks, sampling)
        logits[found] -= losses
        penalties += len(found)
        np.testing.assert_allclose(logits, expected, rtol=2e-4)
    assert penalties > 100


def test_what_breaks_is_looked_for_in_each_piece(open_member: Callable[..., Member]) -> None:
    vocabulary = open_member("spm").vocabulary
    for texts in (BREAKERS, ("he", "aa", " t")):
        expected = [any(text.encode() in piece for text in texts) for piece in vocabulary.pieces]
        assert any(expected)
        assert breaking(vocabulary, texts).tolist() == expected
