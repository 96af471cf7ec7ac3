"""What is handed to `llama_decode`: tokens of one sequence or of several, each behind those that its cache holds."""

import ctypes
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Literal, NamedTuple, TypeAlias

import llama_cpp
import numpy as np

from me_local.arrays import IntArray
from me_local.llama.cache import Cache

Outputs: TypeAlias = Literal["none", "last", "every"] | tuple[int, ...]
"""After which tokens of a part logits are wanted; these may be named by their indices in it."""

_RUN_TOKENS = 4
"""A run of a model takes at least as long as the arithmetic of so many tokens."""


class Part(NamedTuple):
    """Ids to evaluate behind those of a cache, int32 (tokens,), one at least."""

    cache: Cache
    ids: IntArray
    outputs: Outputs


class Batch:
    """A `llama_batch` for at most `size` tokens in contexts of `cells` tokens, filled anew for each evaluation."""

    def __init__(self, size: int, cells: int, sequences: int) -> None:
        self._all_positions = np.arange(cells, dtype=np.int32)
        self._tokens, self._positions = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32)
        self._wanted = np.zeros(size, dtype=np.int8)
        self._counts = np.ones(size, dtype=np.int32)
        self._numbers = np.arange(sequences, dtype=np.int32)
        # llama.cpp wants a list of sequences for each token: the address of its number here.
        self._addresses = self._numbers.ctypes.data + self._numbers.itemsize * np.arange(sequences, dtype=np.uint64)
        self._sequences = np.full(size, self._addresses[0])
        self.native = llama_cpp.llama_batch(
            token=self._tokens.ctypes.data_as(_INT32),
            pos=self._positions.ctypes.data_as(_INT32),
            n_seq_id=self._counts.ctypes.data_as(_INT32),
            seq_id=self._sequences.ctypes.data_as(ctypes.POINTER(_INT32)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, parts: Sequence[Part]) -> None:
        """Put the parts into it, one after the other."""
        start = 0
        for cache, ids, outputs in parts:
            end = start + len(ids)
            self._tokens[start:end] = ids
            self._positions[start:end] = self._all_positions[cache.length : cache.length + len(ids)]
            self._sequences[start:end] = self._addresses[cache.sequence]
            if isinstance(outputs, tuple):
                self._wanted[start:end] = 0
                self._wanted[[start + index for index in outputs]] = 1
            else:
                self._wanted[start:end] = outputs == "every"
                self._wanted[end - 1] = outputs != "none"
            start = end
        self.native.n_tokens = start


_INT32 = ctypes.POINTER(ctypes.c_int32)


def level(lengths: Mapping[int, int], lags: Mapping[int, int]) -> int:
    """How many tokens each sequence should evaluate at least; `lengths` has those that it must, by its number.

    llama.cpp runs the model once for neighbours with equally many tokens, so to evaluate some once more may cost less.
    `lags` has what others can evaluate now instead of later; they join where they have enough.
    """
    levels = sorted(set(lengths.values()))
    if len(levels) == len(lengths) == 1:
        return levels[0]

    def cost(least: int) -> int:
        raised = {sequence: max(least, length) for sequence, length in lengths.items()}
        joining = {sequence: least for sequence, lag in lags.items() if lag >= least}
        return _RUN_TOKENS * _runs(raised | joining) + sum(raised.values())

    return min(levels, key=cost)


def _runs(lengths: Mapping[int, int]) -> int:
    """How often llama.cpp runs the model for parts of these lengths (`llama_batch_allocr::split_equal`).

    In each run are sequences whose numbers follow one another, with as many tokens each as the shortest has left.
    """
    left, runs = dict(sorted(lengths.items())), 0
    while left:
        first = next(iter(left))
        together = list(takewhile(left.__contains__, count(first)))
        tokens = min(left[sequence] for sequence in together)
        for sequence in together:
            left[sequence] -= tokens
            if not left[sequence]:
                del left[sequence]
        runs += 1
    return runs
