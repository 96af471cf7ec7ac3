"""What evaluations cost a member, and how many replies at once are worth while.

Timed are evaluations of a token of each of n sequences, with the logits after it, and what another token of each adds;
between these numbers of sequences a straight line is taken. Every member evaluates every piece of every reply once, but
runs only when it is drawn, for all that wait: after 1/λ pieces on average, which are then its backlog. With t_i(n, k)
for k tokens of each of n sequences, a piece of each of N replies at once therefore costs

    ME, shared route: Σ λ_i·t_i(N, 1/λ_i)      CE: Σ t_i(N, 1)

and with own routes something between the two: that member is evaluated for which most replies wait. How often each
is, and for how many, a simulation tells.
"""

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import numpy as np

from me_local.arrays import FloatArray
from me_local.errors import InputError, LoadError
from me_local.llama.batch import Part
from me_local.llama.context import CELL_BYTES
from me_local.llama.member import Member
from me_local.llama.memory import allocated_context, kv_cache_bytes
from me_local.llama.options import longest_context
from me_local.llama.weights import supports_gpu
from me_local.model import LoadedModel
from me_local.system.machine import available_memory

Way = Literal["me shared", "me own", "ce"]

MOST = 64
"""More replies at once than this are never chosen."""
_COUNTS = (1, 4, 16, MOST)
_CONTEXTS = (64, 320)  # tokens
_TOKENS = 4  # of each sequence
_LENGTH = 256  # tokens of a reply with its prompt, about
_ROUNDS = 3
_UNKNOWN = 8
_CALLS = 2000  # that are simulated
_ENOUGH = 0.9  # of the highest speed: more replies at once only take memory then
_TRIED = 16  # sequences, in any case; more where a token gets so much cheaper by these:
_CHEAPER = 0.7
_SHARE = 0.7  # of the memory that is free


@dataclass(frozen=True, slots=True)
class CallCost:
    """Seconds of evaluations of so many sequences at once as `counts` has, ascending.

    `first` is for a token of each of them, after 64 others, with the logits after it; `more` what each further one
    adds; `cell` what each token adds for each cell of the cache, beyond 64, that it attends to.
    """

    counts: tuple[int, ...]
    first: tuple[float, ...]
    more: tuple[float, ...]
    cell: float = 0.0

    def seconds(self, count: float, tokens: float, length: float) -> float:
        """What `tokens` of each of `count` sequences take after `length` others."""
        cells = count * tokens * max(0.0, length - _CONTEXTS[0]) * self.cell
        return self._at(count, self.first) + (tokens - 1) * self._at(count, self.more) + cells

    def _at(self, count: float, seconds: tuple[float, ...]) -> float:
        counts = self.counts
        if count >= counts[-1]:
            return seconds[-1] * count / counts[-1]
        at = max(1, bisect_left(counts, count))
        part = max(0.0, (count - counts[at - 1]) / (counts[at] - counts[at - 1]))
        return seconds[at - 1] + part * (seconds[at] - seconds[at - 1])


def pieces_per_second(
    costs: Sequence[CallCost], weights: Sequence[float], count: int, way: Way, length: int = _LENGTH
) -> float:
    """The speed of `count` replies of `length` tokens at once, all together. Members with weight 0 do not count."""
    writing = [(cost, weight / sum(weights)) for cost, weight in zip(costs, weights, strict=True) if weight > 0]
    shares = [share for _, share in writing]
    calls = _own_calls(np.array(shares), count) if way == "me own" else [share / count for share in shares]
    seconds = 0.0  # for a piece
    for (cost, share), often in zip(writing, calls, strict=True):
        if way == "ce":
            seconds += cost.seconds(count, 1, length) / count
        else:
            seconds += often * cost.seconds(max(1.0, share / often), 1 / share, length)
    return 1 / seconds


def _own_calls(weights: FloatArray, count: int) -> list[float]:
    """How often each member is evaluated for a piece, where replies draw their own."""
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
    # One that is drawn so seldom is evaluated for one reply alone.
    return [float(often) or weight for often, weight in zip(calls / pieces, weights.tolist(), strict=True)]


def measure(member: Member, most: int) -> CallCost:
    """Time evaluations of a member for up to `most` sequences, in contexts of its own. Raises LoadError, RunError.

    No more are timed than there is memory for.
    """
    counts: list[int] = []
    first: list[float] = []
    more: list[float] = []
    most = min(most, MOST)
    for count in sorted({most, *(count for count in _COUNTS if count < most)}):
        try:
            with _probe(member, _CONTEXTS[0] + _TOKENS, count) as probe:
                one, several = (_timed(probe, count, tokens, _CONTEXTS[0]) for tokens in (1, _TOKENS))
        except LoadError:
            if not counts:
                raise
            break
        counts.append(count)
        first.append(one)
        more.append(max(0.0, several - one) / (_TOKENS - 1))
        if count >= _TRIED and one / count > _CHEAPER * first[-2] / counts[-2]:
            break
    return CallCost(tuple(counts), tuple(first), tuple(more), _cell(member))


SEVERAL = 8
"""Tokens of one evaluation that `steps` times."""
_BEHIND = 16  # tokens, few: large models take long for them


def steps(member: Member) -> tuple[float, float] | None:
    """Seconds of an evaluation of one token, and of `SEVERAL` at once; None where there is no memory for a context.

    Raises RunError.
    """
    try:
        with _probe(member, _BEHIND + SEVERAL, 1) as probe:
            return _timed(probe, 1, 1, _BEHIND), _timed(probe, 1, SEVERAL, _BEHIND)
    except LoadError:
        return None


def _cell(member: Member) -> float:
    """Seconds that a token takes for each cell that it attends to."""
    short, long = _CONTEXTS
    with _probe(member, long + _TOKENS, 1) as probe:
        if probe.n_ctx < long + _TOKENS:
            return 0.0
        behind_long, behind_short = (_timed(probe, 1, _TOKENS, context) for context in (long, short))
    return max(0.0, behind_long - behind_short) / (_TOKENS * (long - short))


def _probe(member: Member, cells: int, sequences: int) -> Member:
    config = replace(member.config, n_ctx=cells, n_batch=max(member.config.n_batch, sequences * _TOKENS))
    return Member(config, member.weights, sequences=sequences)


def _timed(probe: Member, count: int, tokens: int, context: int) -> float:
    """The median seconds of evaluating tokens of each of so many sequences, all after the same others.

    Each has tokens of its own: a mixture of experts reads those that are asked for.
    """
    caches = probe.caches[:count]
    ids = (np.arange(context + count * tokens) % probe.vocabulary.size).astype(np.int32)
    own = ids[context:].reshape(count, tokens)
    probe.prepare(ids[:context])
    for cache in caches[1:]:
        cache.borrow(caches[0], context)
    seconds = []
    for _ in range(_ROUNDS + 1):
        for cache in caches:
            cache.cut(context)
        started = time.perf_counter()
        probe.evaluate([Part(cache, each, "last") for cache, each in zip(caches, own, strict=True)])
        probe.logits()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])  # the first warms up


def choose_batch(members: Sequence[LoadedModel], weights: Sequence[float], way: Way, most: int) -> int:
    """How many replies at once, up to `most`: a power of two, the least that is nearly as fast as any that fits.

    Raises InputError where a member runs elsewhere, whose costs are not known here.
    """
    here = [member for member in members if isinstance(member, Member)]
    if len(here) < len(members):
        raise InputError(
            "--batch auto: what several replies cost a member that runs elsewhere is not known: give a number"
        )
    room = _that_fit(here)
    most = max(1, min(most, MOST, room))
    counts = [2**i for i in range(most.bit_length())]
    costs = [measure(member, most) for member in here]
    speeds = {count: pieces_per_second(costs, weights, count, way) for count in counts}
    enough = _ENOUGH * max(speeds.values())
    chosen: int = next(count for count in counts if speeds[count] >= enough)
    return chosen


def _that_fit(members: Sequence[Member]) -> int:
    """How many replies the memory has room for; where that is not known, a number that is seldom too large."""
    available, needed = available_memory(), 0
    for member in members:
        cells = allocated_context(member.config.n_ctx, longest_context(member.config, member.weights.trained_context))
        cache = kv_cache_bytes(member.weights.metadata, member.weights.memory, member.config, cells)
        logits = 4 * member.vocabulary.size
        if cache is None or (supports_gpu() and member.config.n_gpu_layers):
            return _UNKNOWN
        needed += cache + CELL_BYTES * cells + logits
    return _UNKNOWN if available is None else int(_SHARE * available / needed)
