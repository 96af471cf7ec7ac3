"""The largest logits, picked where the model runs, so that a GPU need not hand over a whole vocabulary at each step.

llama.cpp lets samplers be attached to a context, one for each sequence; they become part of the model's graph. Here
they give tokens that are never sampled no chance, and keep the `count` largest logits. Equal logits at the edge
are the one difference from all logits: if more tokens have them than there is room for, which are left is open.
"""

import ctypes
from typing import Any

import llama_cpp
import numpy as np

from me_local.arrays import IntArray
from me_local.errors import RunError
from me_local.model import Shortlist


class Shortlister:
    """Samplers on all sequences of a context, which leave `count` of the ids whose number in `numbers` is not negative.

    `name` is the member's, for errors. Raises RunError where llama.cpp cannot run them where the model runs.
    """

    def __init__(
        self, context: llama_cpp.llama_context_p, name: str, sequences: int, count: int, numbers: IntArray
    ) -> None:
        self.count = count
        self.numbers = numbers
        self._context = context
        self._name = name
        removed = np.flatnonzero(numbers < 0)
        biases = (llama_cpp.llama_logit_bias * len(removed))(*[(id_, -np.inf) for id_ in removed.tolist()])
        self._samplers = [_chain(len(numbers), biases, count) for _ in range(sequences)]
        for sequence, sampler in enumerate(self._samplers):
            if not llama_cpp.llama_set_sampler(context, sequence, sampler):
                self.close()
                raise RunError(f'member "{name}": llama.cpp does not pick the largest logits where the model runs')

    def row(self, index: int) -> Shortlist:
        """What is left of the logits after one of the tokens of the last evaluation.

        Waits for a GPU that is still at work. Raises RunError where there is nothing.
        """
        logits = llama_cpp.llama_get_sampled_logits_ith(self._context, index)
        count = llama_cpp.llama_get_sampled_logits_count_ith(self._context, index)
        ids = llama_cpp.llama_get_sampled_candidates_ith(self._context, index)
        if not logits or not count or llama_cpp.llama_get_sampled_candidates_count_ith(self._context, index) != count:
            raise RunError(f'member "{self._name}": llama.cpp gave no logits')
        found = np.ctypeslib.as_array(ids, shape=(count,))
        order = found.argsort()
        return Shortlist(found[order], np.ctypeslib.as_array(logits, shape=(count,))[order])

    def close(self) -> None:
        """Take the samplers off again."""
        for sequence, sampler in enumerate(self._samplers):
            llama_cpp.llama_set_sampler(self._context, sequence, None)
            llama_cpp.llama_sampler_free(sampler)


def _chain(size: int, biases: "ctypes.Array[llama_cpp.llama_logit_bias]", count: int) -> Any:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if len(biases):
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_logit_bias(size, len(biases), biases))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(count))
    return chain
