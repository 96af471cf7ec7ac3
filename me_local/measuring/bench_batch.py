"""How fast an ensemble writes several replies at once: each member alone, CE, and ME with both kinds of route.

The contestants take turns, with each number of replies, in rounds. Each writes until its replies have a certain number
of pieces in all; end of generation is never sampled, and prompts are evaluated before the clock starts.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np

from me_local.asking import make_request
from me_local.config import Config
from me_local.decoding.batching import Batching
from me_local.decoding.engine import Request
from me_local.decoding.reply import Draft
from me_local.ensemble import Ensemble
from me_local.errors import InputError, RunError
from me_local.llama.member import Member
from me_local.llama.weights import Shelf
from me_local.measuring.bench import BatchSpeed, endless, sample_text
from me_local.measuring.cost import CallCost, Way, measure, pieces_per_second
from me_local.mixture.routing import SharedRoute

ROUNDS = 3
STEPS = 24
"""Pieces that each contestant writes in a round, for each of its replies."""
_PROMPT = 64  # pieces, about
_ENDLESS = 1 << 30
_CELLS = 12  # of a context, for each piece
_LARGER = 4  # so many times larger batches may be measured as seldom


@dataclass(frozen=True, slots=True)
class _Contestant:
    kind: str
    name: str
    weights: tuple[float, ...]
    way: Way


def bench_batches(config: Config, counts: Sequence[int], advance: Callable[[], object]) -> tuple[BatchSpeed, ...]:
    """Measure each of these numbers of replies; `advance` is called `batch_work(config, counts)` times.

    Raises LoadError where the memory has no room for all of them, InputError where a member runs elsewhere.
    """
    if away := [member.name for member in config.members if member.url]:
        raise InputError(
            f'--batch: member "{away[0]}" runs elsewhere, and what several replies cost it is not known here'
        )
    cells = _CELLS * (_PROMPT + STEPS)
    short = replace(
        config, members=tuple(replace(m, n_ctx=min(m.n_ctx, cells) if m.n_ctx else cells) for m in config.members)
    )
    speeds: dict[tuple[int, _Contestant], list[float]] = {}
    with ExitStack() as stack:
        shelf = stack.enter_context(closing(Shelf()))
        ensembles = [stack.enter_context(Ensemble(short, batch=count, shelf=shelf)) for count in counts]
        here = [member for member in ensembles[0].members if isinstance(member, Member)]
        costs: list[CallCost] = [measure(member, max(counts)) for member in here]
        for round_ in range(ROUNDS + 1):
            for ensemble in ensembles:
                # The speed of a machine goes up and down, so few replies are measured several times.
                times = max(1, max(counts) // (_LARGER * ensemble.batch)) if round_ else 1
                for contestant in _contestants(config):
                    found = [_run(ensemble, contestant, seed=ROUNDS * again + round_) for again in range(times)]
                    advance()
                    if round_:  # the first warms up
                        speeds.setdefault((ensemble.batch, contestant), []).extend(found)
    length = _PROMPT + STEPS // 2
    return tuple(
        BatchSpeed(count, c.kind, c.name, median(found), pieces_per_second(costs, c.weights, count, c.way, length))
        for (count, c), found in speeds.items()
    )


def batch_work(config: Config, counts: Sequence[int]) -> int:
    """How often `bench_batches` reports progress."""
    return len(counts) * (ROUNDS + 1) * len(_contestants(config))


def _contestants(config: Config) -> list[_Contestant]:
    weights = tuple(member.weight for member in config.members)
    found = [
        _Contestant("single", member.name, tuple(float(i == j) for j in range(len(weights))), "me shared")
        for i, member in enumerate(config.members)
    ]
    if len(weights) > 1:
        found.append(_Contestant("ce", "CE", weights, "ce"))
        found.append(_Contestant("me shared", "ME, shared route", weights, "me shared"))
        found.append(_Contestant("me own", "ME, own routes", weights, "me own"))
    return found


def _run(ensemble: Ensemble, contestant: _Contestant, seed: int) -> float:
    route = SharedRoute(seed) if contestant.way == "me shared" else None
    batching = Batching(endless(ensemble.engine), ensemble.members, route)
    requests = [_request(ensemble, contestant, seed, i) for i in range(ensemble.batch)]
    running = [
        batching.begin(request, partial(Draft, request=request, names=ensemble.names, max_tokens=_ENDLESS, stop=()))
        for request in requests
    ]
    while not all(one.draft.steps for one in running):
        _step(batching)
    before = sum(len(one.draft.steps) for one in running)
    started = time.perf_counter()
    while (written := sum(len(one.draft.steps) for one in running) - before) < STEPS * len(running):
        _step(batching)
    seconds = time.perf_counter() - started
    for one in running:
        batching.cancel(one)
    return written / seconds


def _request(ensemble: Ensemble, contestant: _Contestant, seed: int, index: int) -> Request:
    """A reply to a prompt that has nothing in common with the others': what prompts share is evaluated once."""
    prompts = ensemble.prompter.raw_prompts(f"{index}, {sample_text(_PROMPT)}", ensemble.config)
    return replace(
        make_request(ensemble.config, prompts),
        strategy="ce" if contestant.way == "ce" else "me",
        unit="token",
        argmax=False,
        seed=1000 * seed + index,
        weights=np.array(contestant.weights),
    )


def _step(batching: Batching) -> None:
    for one, _ in batching.step():
        if one.draft.finish_reason:
            raise one.error or RunError("a context is too short to measure several replies at once: raise n_ctx")
