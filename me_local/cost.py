"""What evaluations cost a member, and how many replies at once are worth while.

One evaluation of k tokens takes about a + b·k + c·r + d·k·m seconds: a to read the weights, b for the arithmetic of a
token, c for the logits after one, of which r are wanted (with a large vocabulary that is more than b), and d for the
attention to each of m cells of the cache. Every member evaluates every piece of every reply once, but reads its weights
only when it is evaluated, and gives logits only to replies that have drawn it. A piece of each of N replies at once
therefore costs

    ME, shared route: Σ (λ_i·a_i + N·b_i + N·λ_i·c_i + N·m·d_i)      CE: Σ (a_i + N·b_i + N·c_i + N·m·d_i)

and with own routes something between the two: that member is evaluated for which most replies wait. How often each
is, a simulation tells.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import numpy as np
from scipy.optimize import nnls

from me_local.alignment import FloatArray
from me_local.batches import Part
from me_local.footprint import allocated_context, available_memory, kv_cache_bytes
from me_local.member import CELL_BYTES, Member
from me_local.weights import supports_gpu

Way = Literal["me shared", "me own", "ce"]

MOST = 64
"""More replies at once than this are never chosen."""
_MOST_TOKENS = 16
_CONTEXTS = (64, 320)  # tokens
_CALLS_TIMED = (  # tokens, of how many of them the logits are wanted, and after how many others
    (1, 1, _CONTEXTS[0]),
    (4, 1, _CONTEXTS[0]),
    (16, 1, _CONTEXTS[0]),
    (16, 16, _CONTEXTS[0]),
    (16, 1, _CONTEXTS[1]),
)
_LENGTH = 256  # tokens of a reply with its prompt, about
_ROUNDS = 3
_UNKNOWN = 8
_CALLS = 2000  # that are simulated
_ENOUGH = 0.9  # of the highest speed: more replies at once only take memory then
_SHARE = 0.7  # of the memory that is free


@dataclass(frozen=True, slots=True)
class CallCost:
    """Seconds of an evaluation: `reading` in any case, `token` for each token, `row` for each row of logits, and `cell`
    for each token and each cell that it attends to.
    """

    reading: float
    token: float
    row: float = 0.0
    cell: float = 0.0


Call = tuple[int, int, int]
"""An evaluation: its tokens, of how many of them the logits are wanted, and the tokens in front of it."""


def fitted(seconds: Mapping[Call, float]) -> CallCost:
    """The cost that suits the seconds of evaluations best; no part of it is negative."""
    calls = np.array([(1, tokens, rows, tokens * cells) for tokens, rows, cells in seconds], dtype=np.float64)
    measured = np.array(list(seconds.values()))
    parts, _ = nnls(calls / measured[:, None], np.ones(len(measured)))  # relative errors count
    return CallCost(*parts.tolist())


def pieces_per_second(
    costs: Sequence[CallCost], weights: Sequence[float], count: int, way: Way, length: int = _LENGTH
) -> float:
    """The speed of `count` replies of `length` tokens at once, all together. Members with weight 0 do not count."""
    writing = np.array(weights) > 0
    shares = np.array(weights) / sum(weights)
    readings = {"me shared": shares / count, "ce": writing / count, "me own": _own_calls(shares, count)}[way]
    seconds = readings @ [cost.reading for cost in costs] + writing @ [cost.token for cost in costs]
    seconds += (writing if way == "ce" else shares) @ [cost.row for cost in costs]
    seconds += length * (writing @ [cost.cell for cost in costs])
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
    """Time some evaluations of a member, in a small context of its own. Raises LoadError, RunError."""
    small = replace(member.config, n_ctx=_CONTEXTS[-1] + _MOST_TOKENS)
    with Member(small, member.weights, outputs=_MOST_TOKENS) as probe:
        cells = allocated_context(small.n_ctx, member.weights.trained_context)
        return fitted(_timed(probe, cells))


def _timed(probe: Member, cells: int) -> dict[Call, float]:
    """The median seconds of some evaluations, of those for which there are cells enough."""
    ids = (np.arange(_CONTEXTS[-1] + _MOST_TOKENS) % probe.vocabulary.size).astype(np.int32)
    seconds: dict[Call, list[float]] = {}
    for call in _CALLS_TIMED:
        tokens, rows, context = call
        if context + tokens > cells:
            continue
        for round_ in range(_ROUNDS + 1):
            probe.prepare(ids[:context])
            started = time.perf_counter()
            probe.evaluate([Part(probe.caches[0], ids[context : context + tokens], "every" if rows > 1 else "last")])
            probe.logits()  # waits for a GPU
            if round_:  # the first warms up
                seconds.setdefault(call, []).append(time.perf_counter() - started)
    return {call: median(times) for call, times in seconds.items()}


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
