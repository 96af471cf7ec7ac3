"""Penalties: what a context makes of the logits of the tokens that stand in it already.

Pure functions of a member's logits and of the ids of its own context, as in llama.cpp (`llama_sampler_penalties` and
`llama_sampler_dry` in llama-sampler.cpp), with one difference: the caller says which ids are spared.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from me_local.arrays import IntArray, LogitArray
from me_local.sampling import Sampling

BoolArray = npt.NDArray[np.bool_]

_LARGEST = 60.0  # the logarithm of what a penalty grows to, times the multiplier


def window(length: int, last_n: int) -> int:
    """How many of so many ids a setting looks at, of which -1 means all."""
    return length if last_n < 0 else min(length, last_n)


def repeated(context: IntArray, spared: IntArray, sampling: Sampling) -> tuple[IntArray, IntArray]:
    """The distinct ids in the window of `repeat_last_n` that are not spared, and how often each stands there."""
    ids, counts = np.unique(context[len(context) - window(len(context), sampling.repeat_last_n) :], return_counts=True)
    kept = ~np.isin(ids, spared)
    return ids[kept], counts[kept].astype(np.int32)


def penalised(logits: LogitArray, counts: IntArray, sampling: Sampling) -> LogitArray:
    """The logits of ids that are there so often, float32 (k,), made less likely."""
    scaled = np.where(logits > 0, logits / sampling.repeat_penalty, logits * sampling.repeat_penalty)
    lowered = scaled - sampling.presence_penalty - sampling.frequency_penalty * counts
    return lowered.astype(np.float32)


def repetitions(context: IntArray, breaks: BoolArray, sampling: Sampling) -> tuple[IntArray, LogitArray]:
    """DRY: the ids with which the end of the context would repeat what stands before it, and what each loses.

    `breaks` says of each id whether it ends what is repeated, bool (vocabulary,). The longest repetition that an id
    goes on with counts, in tokens of the context. Source: github.com/oobabooga/text-generation-webui/pull/5637.
    """
    ids = context[len(context) - window(len(context), sampling.dry_penalty_last_n) :]
    broken = np.flatnonzero(breaks[ids])
    limit = len(ids) - 1 - int(broken[-1]) if len(broken) else len(ids)
    least = sampling.dry_allowed_length
    longest: dict[int, int] = {}
    if limit >= least and len(ids) > least:
        backwards = ids[::-1].tolist()
        for start, length in _matches(backwards):
            if (length := min(length, limit)) >= least:
                following = backwards[start - 1]
                longest[following] = max(longest.get(following, 0), length)
    found = np.array([id_ for id_ in sorted(longest) if not breaks[id_]], dtype=np.int32)
    exponents = np.array([longest[id_] - least for id_ in found.tolist()], dtype=np.float64)
    most = _LARGEST / math.log(sampling.dry_base) if sampling.dry_base > 1 else math.inf
    return found, (sampling.dry_multiplier * sampling.dry_base ** np.minimum(exponents, most)).astype(np.float32)


def _matches(ids: Sequence[int]) -> list[tuple[int, int]]:
    """The places behind the first from which the ids go on like at the first, and for how many.

    Gusfield's Z algorithm, which takes as many steps as there are ids at most; places that begin otherwise are skipped.
    """
    count = len(ids)
    lengths = [0] * count
    left = right = 0
    place = 1
    found = []
    while place < count:
        if place >= right:
            try:
                place = ids.index(ids[0], place)
            except ValueError:
                break
            length = 1
        else:
            length = min(lengths[place - left], right - place)
        if place + length >= right:
            while place + length < count and ids[length] == ids[place + length]:
                length += 1
            left, right = place, place + length
        if length:
            lengths[place] = length
            found.append((place, length))
        place += 1
    return found
