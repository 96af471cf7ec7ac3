"""Random weights in llama.cpp's own block formats, at the speed of the disk.

A pool of random blocks is drawn once; a tensor is the pool, read round and round from a place of its own. A block
is 32 weights in every format. The pool's length is a prime number larger than any of our vocabularies, so no two
rows of a matrix are the same and no row length falls into step with it.

Sources: ``ggml-common.h`` (block_q4_0, block_q8_0), ``dequantize_row_q4_0`` in ``ggml-quants.c``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

BLOCK = 32  # weights
POOL = 262_147  # blocks, a prime number


def f16_blocks(rng: np.random.Generator, spread: float) -> np.ndarray:
    """Draw normal 16-bit floats, (POOL, BLOCK)."""
    return (rng.standard_normal((POOL, BLOCK), np.float32) * np.float32(spread)).astype("<f2")


def q8_0_blocks(rng: np.random.Generator, spread: float) -> np.ndarray:
    """Draw POOL blocks of a 16-bit scale and 32 integers, uniform in [-127, 127]."""
    blocks = np.empty(POOL, [("scale", "<f2"), ("weights", "i1", BLOCK)])
    blocks["scale"] = spread / ((255**2 - 1) / 12) ** 0.5
    blocks["weights"] = rng.integers(-127, 128, (POOL, BLOCK), np.int8)
    return blocks


def q4_0_blocks(rng: np.random.Generator, spread: float) -> np.ndarray:
    """Draw POOL blocks of a 16-bit scale and 32 integers of 4 bits, uniform in [-8, 7].

    Half the scales are negative (as in real files): the mean of -1/2 would otherwise add up over a row.
    """
    blocks = np.empty(POOL, [("scale", "<f2"), ("weights", "u1", BLOCK // 2)])
    blocks["scale"] = rng.choice([-1, 1], POOL) * (spread / 21.5**0.5)  # 21.5 is the mean square of -8 … 7
    blocks["weights"] = rng.integers(0, 256, (POOL, BLOCK // 2), np.uint8)
    return blocks


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix is stored: the names GGUF has for it, the size of a block in bytes, and how to draw blocks."""

    tensor_type: GGMLQuantizationType
    file_type: LlamaFileType
    block_bytes: int
    draw: Callable[[np.random.Generator, float], np.ndarray]  # takes the standard deviation of a weight


FORMATS = {
    "f16": Format(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, 64, f16_blocks),
    "q8_0": Format(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, 34, q8_0_blocks),
    "q4_0": Format(GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0, 18, q4_0_blocks),
}


class Pools:
    """Gives weights of one format as bytes, from one pool for each standard deviation."""

    def __init__(self, of: Format, seed: int):
        self.of = of
        self.seed = seed
        self.pools: dict[float, memoryview] = {}

    def write(self, file: BinaryIO, *, weights: int, spread: float, at: int) -> None:
        """Write so many weights of this standard deviation, starting with the pool's block ``at`` (taken modulo POOL).

        ``weights`` is a multiple of BLOCK. Needs no memory beside the pool.
        """
        if spread not in self.pools:
            drawn = self.of.draw(np.random.default_rng(self.seed), spread)
            self.pools[spread] = memoryview(drawn.tobytes())
        pool, start = self.pools[spread], at % POOL * self.of.block_bytes
        left = weights // BLOCK * self.of.block_bytes
        while left:
            part = pool[start : start + left]
            file.write(part)
            left, start = left - len(part), 0
