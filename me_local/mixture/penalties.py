"""Penalties: what a context makes of the logits of the tokens that stand in it already.

Pure functions of a member's logits and of the ids of its own context, as in llama.cpp (`llama_sampler_penalties` and
`llama_sampler_dry` in llama-sampler.cpp), with one difference: the caller says which ids are spared.
"""

import math

import numpy as np
import numpy.typing as npt

from me_local.arrays import IntArray, LogitArray
from me_local.sampling import Sampling

BoolArray = npt.NDArray[np.bool_]

_NONE = np.zeros(0, dtype=np.int32)
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
    if limit < least or len(ids) <= least:
        return _NONE, _NONE.astype(np.float32)
    lengths = np.minimum(_matches(ids[::-1], least), limit)  # of what ends at each place, the last first
    places = np.flatnonzero(lengths >= least)
    following = ids[len(ids) - places]
    places, following = places[~breaks[following]], following[~breaks[following]]
    found, where = np.unique(following, return_inverse=True)
    longest = np.zeros(len(found))
    np.maximum.at(longest, where, lengths[places])
    most = _LARGEST / math.log(sampling.dry_base) if sampling.dry_base > 1 else math.inf
    losses = sampling.dry_multiplier * sampling.dry_base ** np.minimum(longest - least, most)
    return found, losses.astype(np.float32)


def _matches(ids: IntArray, least: int) -> npt.NDArray[np.int64]:
    """For how many ids they go on at each place like at the first, int64 (ids,); 0 at the first, and for few."""
    count = len(ids)
    alike = np.ones(count - least, dtype=bool)  # at the places behind the first
    for offset in range(least):
        alike &= ids[1 + offset : 1 + offset + len(alike)] == ids[offset]
    places = np.flatnonzero(alike) + 1
    lengths = [0] * count
    listed = ids.tolist()
    left = right = 0
    for place in places.tolist():  # Gusfield's Z algorithm: no id is looked at twice
        length = min(lengths[place - left], right - place) if place < right else 0
        length = max(length, least)
        if place + length >= right:
            while place + length < count and listed[length] == listed[place + length]:
                length += 1
            left, right = place, place + length
        lengths[place] = length
    return np.array(lengths)
