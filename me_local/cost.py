"""What evaluations cost a member, and how many replies at once are worth while.

One evaluation of k tokens takes about a + b·k seconds: a to read the weights, b for the arithmetic of a token. Every
member evaluates every piece of every reply once, but reads its weights only when it is evaluated. A piece of each of N
replies at once therefore costs

    ME, shared route: Σ (λ_i·a_i + N·b_i)        CE: Σ (a_i + N·b_i)        ME, own routes: between the two

With own routes, that member is evaluated for which most replies wait; how often each is, a simulation tells.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np
from scipy.optimize import nnls

from me_local.alignment import FloatArray
from me_local.footprint import allocated_context, available_memory, kv_cache_bytes
from me_local.member import CELL_BYTES, Member
from me_local.weights import supports_gpu

Way = Literal["me shared", "me own", "ce"]

MOST = 64
"""More replies at once than this are never chosen."""
_TOKENS = (1, 4, 16)
_CONTEXT = 64  # tokens
_ROUNDS = 3
_UNKNOWN = 8
_CALLS = 2000  # that are simulated
_ENOUGH = 0.9  # of the highest speed: more replies at once only take memory then
_SHARE = 0.7  # of the memory that is free


@dataclass(frozen=True, slots=True)
class CallCost:
    """Seconds of an evaluation: `reading` in any case, and `token` for each token."""

    reading: float
    token: float


def fitted(seconds: dict[int, float]) -> CallCost:
    """The cost that suits the seconds of evaluations, by number of tokens, best; neither part is negative."""
    tokens = np.array(list(seconds), dtype=np.float64)
    weights = 1 / np.array(list(seconds.values()))  # relative errors count
    columns = np.stack([weights, weights * tokens], axis=1)
    (reading, token), _ = nnls(columns, np.ones(len(tokens)))
    return CallCost(float(reading), float(token))


def pieces_per_second(costs: Sequence[CallCost], weights: Sequence[float], count: int, way: Way) -> float:
    """The speed of `count` replies at once, all together. Members with weight 0 do not count."""
    writing = np.array(weights) > 0
    shares = np.array(weights) / sum(weights)
    readings = {"me shared": shares / count, "ce": writing / count, "me own": _own_calls(shares, count)}[way]
    seconds = readings @ [cost.reading for cost in costs] + writing @ [cost.token for cost in costs]
    return 1 / float(seconds)


def _own_calls(weights: FloatArray, count: int) -> FloatArray:
    """How often each member is evaluated for a piece, where replies draw their own: float64 (members,)."""
    random = np.random.default_rng(0)
    waiting = random.multinomial(count, weights)
    calls, pieces = np.zeros(len(weights)), 0
    for _ in range(_CALLS):
        member = int(waiting.argmax())
        served = int(waiting[member])
        calls[member] += 1
        pieces += served
        waiting[member] = 0
        waiting += random.multinomial(served, weights)
    per_piece: FloatArray = calls / pieces
    return per_piece


def measure(member: Member) -> CallCost:
    """Time some evaluations of a member."""
    most = min(_CONTEXT + max(_TOKENS), member.n_ctx)
    ids = (np.arange(most) % member.vocabulary.size).astype(np.int32)
    seconds: dict[int, list[float]] = {}
    for round_ in range(_ROUNDS + 1):
        for tokens in _TOKENS:
            member.prepare(ids[: most - max(_TOKENS)])
            started = time.perf_counter()
            member.sync(ids[: most - max(_TOKENS) + tokens])
            member.logits()  # waits for a GPU
            if round_:  # the first warms up
                seconds.setdefault(tokens, []).append(time.perf_counter() - started)
    return fitted({tokens: median(times) for tokens, times in seconds.items()})


def choose_batch(members: Sequence[Member], weights: Sequence[float], way: Way, most: int) -> int:
    """How many replies at once, up to `most`: a power of two, the least that is nearly as fast as any that fits."""
    room = _that_fit(members)
    most = max(1, min(most, MOST, room))
    counts = [2**i for i in range(most.bit_length())]
    costs = [measure(member) for member in members]
    speeds = {count: pieces_per_second(costs, weights, count, way) for count in counts}
    enough = _ENOUGH * max(speeds.values())
    chosen: int = next(count for count in counts if speeds[count] >= enough)
    return chosen


def _that_fit(members: Sequence[Member]) -> int:
    """How many replies the memory has room for; where that is not known, a number that is seldom too large."""
    available, needed = available_memory(), 0
    for member in members:
        cells = allocated_context(member.config.n_ctx, member.weights.trained_context)
        cache = kv_cache_bytes(member.weights.metadata, member.weights.memory, member.config, cells)
        logits = 4 * member.vocabulary.size
        if cache is None or (supports_gpu() and member.config.n_gpu_layers):
            return _UNKNOWN
        needed += cache + CELL_BYTES * cells + logits
    return _UNKNOWN if available is None else int(_SHARE * available / needed)
