"""The whole ensemble in one file, to be read: what the engine computes, without all that makes it fast.

Members i = 1..n are language models, each with a vocabulary, a tokenizer T_i, a prompt and a weight of its own. They
share nothing but the text of the reply, in bytes. Its next piece y, which is some bytes or END, has the probability

    P(y | text) = Σ_i λ_i(text) · A_i(p_i(· | prompt_i, T_i(text)))(y)

- T_i(text) are the ids that member i's tokenizer gives the text as a whole, in whatever pieces it was written.
- p_i is the member's distribution over its vocabulary after its prompt and these ids.
- A_i, the alignment, shapes that distribution (temperature, top-k, top-p, min-p), and adds up ids with equal bytes.
- λ_i(text) is the member's weight, from a router that sees the text alone; 0 where the member cannot write the text.

The strategy "ce" (conventional ensembling) evaluates all members, and samples from P. "me" (mixture-model-like
ensembling) draws one member i with probability λ_i, and evaluates and samples from that one alone. Replies have the
same probabilities either way, because A_i depends on nothing but the member and the text.

    members = [load_member(config) for config in load_config(Path("models.toml")).members]
    print(b"".join(step.piece for step in reply(members, b"Once upon a time", strategy="me", seed=1)))

A seed gives the same reply here and in the engine, unless rounding decides a draw: tests/decoding/test_reference.py
compares them. Left out: penalties, biases, and what else shapes a member's distribution; constraints, words and
"union"; the likeliest piece of the mixture (`decode`); stop strings, adapters, GPUs, and llama.cpp's own parameters.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import llama_cpp
import numpy as np

from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.config import MemberConfig
from me_local.sampling import Sampling
from me_local.text.unified import END, UnifiedVocabulary
from me_local.text.vocabulary import Vocabulary

Router = Callable[[bytes, FloatArray], FloatArray]


@dataclass(frozen=True, slots=True)
class Member:
    """A language model; `prompt` has the ids in front of the text, and `n_ctx` is how many there may be in all."""

    model: llama_cpp.Llama
    vocabulary: Vocabulary
    prompt: Sequence[int]
    n_ctx: int
    weight: float
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Step:
    """A sampled piece, empty for END, the `distribution` that it is from, and each member's share in it."""

    number: int
    piece: bytes
    distribution: FloatArray
    shares: FloatArray


def load_member(config: MemberConfig) -> Member:
    """A member from its file, with the prompt of a raw completion and with keys and values in full precision."""
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(str(config.path), n_ctx=config.n_ctx, type_k=f32, type_v=f32, verbose=False)
    vocabulary = Vocabulary(model.model, config.tokenizer)
    prompt = [] if vocabulary.bos is None else [vocabulary.bos]
    n_ctx = min(model.n_ctx(), llama_cpp.llama_model_n_ctx_train(model.model))
    return Member(model, vocabulary, prompt, n_ctx, config.weight, config.sampling)


def reply(
    members: Sequence[Member],
    head: bytes = b"",
    *,
    strategy: Literal["me", "ce"] = "me",
    seed: int = 0,
    max_tokens: int = 512,
    router: Router = lambda text, weights: weights,
) -> Iterator[Step]:
    """A reply, whose text begins with `head`, up to END, `max_tokens`, or a full context of a member that may write."""
    unified = UnifiedVocabulary([member.vocabulary for member in members])
    routing_seed, piece_seed = np.random.SeedSequence(seed).spawn(2)
    routing, key = np.random.default_rng(routing_seed), int(piece_seed.generate_state(1, np.uint64)[0])
    text, sampled = head, list[int]()
    for _ in range(max_tokens):
        weights = route(router, text, members, same=unified.same)
        # Members that all have one vocabulary see the ids as they were sampled.
        known, more = (head, sampled) if unified.same else (text, [])
        contexts = {
            i: [
                *members[i].prompt,
                *members[i].vocabulary.canonical(known, typed=len(head), at_start=bool(head)),
                *more,
            ]
            for i in np.flatnonzero(weights).tolist()
        }
        if any(len(ids) > members[i].n_ctx for i, ids in contexts.items()):
            return
        if strategy == "me":
            weights = np.eye(len(members))[draw(weights, routing.random())]
        terms = np.zeros((len(members), len(unified.pieces)))  # λ_i · A_i
        for i in np.flatnonzero(weights).tolist():
            aligned = align(predict(members[i], contexts[i]), unified.numbers[i], members[i].sampling)
            np.add.at(terms[i], aligned[0], weights[i] * aligned[1])
        mixture = terms.sum(axis=0)
        number = race(mixture, key, len(text))
        yield Step(number, unified.pieces[number], mixture, terms[:, number] / mixture[number])
        if number == END:
            return
        text += unified.pieces[number]
        sampled.append(number - 1)  # the id, where there is one vocabulary


def route(router: Router, text: bytes, members: Sequence[Member], *, same: bool) -> FloatArray:
    """λ(text): the router's weights, 0 for members that lack a token for a byte that is not part of a character."""
    strays = frozenset(ord(c) - 0xDC00 for c in text.decode(errors="surrogateescape") if "\udc80" <= c <= "\udcff")
    able = [same or member.vocabulary.can_write(strays) for member in members]
    weights = np.where(able, router(text, np.array([member.weight for member in members])), 0.0)
    return np.asarray(weights / weights.sum())


def predict(member: Member, ids: Sequence[int]) -> LogitArray:
    """The logits of p_i after these ids, evaluated in an empty cache: float32 (vocabulary,)."""
    member.model.reset()
    member.model.eval(ids)
    pointer = llama_cpp.llama_get_logits_ith(member.model.ctx, -1)
    return np.ctypeslib.as_array(pointer, (member.vocabulary.size,)).copy()


def align(logits: LogitArray, numbers: IntArray, sampling: Sampling) -> tuple[IntArray, FloatArray]:
    """A_i: numbers of pieces, and their probabilities, which add up where a number comes twice.

    `numbers` has that of each id's piece, -1 for ids that are never sampled.
    """
    ids = np.flatnonzero(numbers >= 0)
    ids = ids[np.argsort(-logits[ids], kind="stable")]  # the likeliest first
    ids = ids[: 1 if sampling.temperature == 0 else sampling.top_k or None]
    odds = np.exp((logits[ids].astype(np.float64) - logits[ids[0]]) / (sampling.temperature or 1.0))
    kept = odds >= sampling.min_p * odds[0]
    if sampling.top_p < 1:  # the fewest that have so much of the probability
        kept &= np.cumsum(odds) - odds < sampling.top_p * odds.sum()
    return numbers[ids[kept]], odds[kept] / odds[kept].sum()


def draw(probabilities: FloatArray, uniform: float) -> int:
    """The index at `uniform` (0 <= uniform < 1) of the cumulative distribution."""
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def race(mixture: FloatArray, key: int, place: int) -> int:
    """The number of the piece that arrives first at a place in the text, in bytes: each with its own probability."""
    times = {n: -math.log(uniform_of(key, place, n)) / mixture[n] for n in np.flatnonzero(mixture).tolist()}
    return min(times, key=times.__getitem__)


def uniform_of(key: int, place: int, number: int) -> float:
    """The random number in (0, 1) of a piece at a place in the text."""
    return ((split_mix(split_mix(key, place), number) >> 12) + 0.5) / 2**52


def split_mix(seed: int, index: int) -> int:
    """The 64-bit number that SplitMix64 gives after `index` others."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)
