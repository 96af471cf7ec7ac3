"""What is handed to `llama_decode`: tokens of one sequence or of several, each behind those that its cache holds."""

import ctypes
from collections.abc import Sequence
from typing import Literal, TypeAlias

import llama_cpp
import numpy as np

from me_local.cache import Cache
from me_local.vocabulary import IntArray

Part: TypeAlias = tuple[Cache, IntArray]
"""Ids to evaluate behind those of a cache, int32 (tokens,), one at least."""

Outputs = Literal["none", "last", "every"]
"""After which tokens of each part logits are wanted."""


class Batch:
    """A `llama_batch` for at most `size` tokens in contexts of `cells` tokens, filled anew for each evaluation.

    With `twins` each token belongs to a second sequence, too: that of its cache, plus `sequences`.
    """

    def __init__(self, size: int, cells: int, sequences: int, *, twins: bool) -> None:
        self._all_positions = np.arange(cells, dtype=np.int32)
        self._tokens, self._positions = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32)
        self._wanted = np.zeros(size, dtype=np.int8)
        self._counts = np.full(size, 2 if twins else 1, dtype=np.int32)
        self._numbers = np.stack([np.arange(sequences), np.arange(sequences) + sequences], axis=1).astype(np.int32)
        # llama.cpp wants a list of sequences for each token: the address of a row here, or of its first number.
        self._addresses = self._numbers.ctypes.data + self._numbers.strides[0] * np.arange(sequences, dtype=np.uint64)
        self._sequences = np.full(size, self._addresses[0])
        self.native = llama_cpp.llama_batch(
            token=self._tokens.ctypes.data_as(_INT32),
            pos=self._positions.ctypes.data_as(_INT32),
            n_seq_id=self._counts.ctypes.data_as(_INT32),
            seq_id=self._sequences.ctypes.data_as(ctypes.POINTER(_INT32)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, parts: Sequence[Part], outputs: Outputs) -> None:
        """Put the parts into it, one after the other."""
        start = 0
        for cache, ids in parts:
            end = start + len(ids)
            self._tokens[start:end] = ids
            self._positions[start:end] = self._all_positions[cache.length : cache.length + len(ids)]
            self._sequences[start:end] = self._addresses[cache.sequence]
            self._wanted[start:end] = outputs == "every"
            self._wanted[end - 1] = outputs != "none"
            start = end
        self.native.n_tokens = start


_INT32 = ctypes.POINTER(ctypes.c_int32)
