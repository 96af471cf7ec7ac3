"""How fast an ensemble is on this machine, and how fast it could be.

Measures, in interleaved rounds, what one evaluation of k tokens costs each member, t_i(k), and how fast each member
alone, CE and ME write. The limit of ME's speed-up follows from t_i(k): CE evaluates one token of every member for a
piece; ME evaluates a member when it is drawn, with as many tokens as pieces were written since, a geometric number.
End of generation is never sampled, so that all write equally long. Times are in seconds.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

import numpy as np

from me_local.arrays import IntArray
from me_local.asking import make_request
from me_local.decoding.engine import Engine
from me_local.decoding.generation import Generation
from me_local.ensemble import Ensemble
from me_local.errors import InputError
from me_local.llama.member import Member
from me_local.measuring.guesses import Gain
from me_local.measuring.inspection import inspect_member
from me_local.model import LoadedModel
from me_local.system.machine import processor, usable_cores
from me_local.text.unified import END

TOKENS = (1, 2, 4, 8, 16)
"""How many tokens an evaluation is timed with."""
CONTEXTS = (128, 1024)
"""In how long contexts, in tokens; the second is left out where a member's context is too short."""
ROUNDS = 5
STEPS = 80
"""Pieces that each contestant writes in a round."""
_WARM_UP = 3  # pieces
_TEXT = """
The harbour was quiet when the first boats came home. Anna stood on the wall and counted the lights: one, two, and then
the small green one that was always late. People talked about the weather, the price of the nets and other things that
people talk about when they are tired, until nobody listened any more and it was dark.
"""

Kind = Literal["single", "ce", "ce parallel", "me"]


@dataclass(frozen=True, slots=True)
class CallTime:
    """The median time of one evaluation of `tokens` tokens of a member after `context` tokens."""

    member: str
    context: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over the rounds of one contestant: a single member, CE or ME.

    `pieces` and `bytes` are per second of generation, the prompt left out; `prompt_seconds` is the prompt's time;
    `decode_share` the part of the generation inside `llama_decode`, None where several run at a time; `wire_seconds`
    what a piece took on the way to engines elsewhere and back, as far as these say what they took themselves.
    """

    kind: Kind
    name: str
    pieces: float
    bytes: float
    prompt_seconds: float
    decode_share: float | None
    wire_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchSpeed:
    """Pieces per second of `batch` replies all together, the median over the rounds, and what t_i(k) let expect.

    `kind` is a way of `cost.pieces_per_second`, or "single" for the member `name`.
    """

    batch: int
    kind: str
    name: str
    pieces: float
    predicted: float


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured. `speed_up` is ME over CE (one after the other), the median of the rounds' ratios; `limit`
    what it can be at most; `outside_seconds` the median time of an ME step outside `llama_decode`; `memory_bytes` the
    members' weights, caches and buffers, where llama.cpp tells them; `batches` the speeds of several replies at once,
    and `guesses` what those of `draft` gain, where these were measured.
    """

    machine: dict[str, Any]
    weights: dict[str, float]
    calls: tuple[CallTime, ...]
    speeds: tuple[Speed, ...]
    speed_up: float
    limit: float
    outside_seconds: float
    memory_bytes: int | None
    batches: tuple[BatchSpeed, ...] = ()
    draft: str = "none"
    guesses: tuple[Gain, ...] = ()

    def speed(self, kind: Kind) -> Speed:
        """The contestant of a kind; of single members, the fastest."""
        return max((speed for speed in self.speeds if speed.kind == kind), key=lambda speed: speed.pieces)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {**asdict(self), "measured_over_limit": self.speed_up / self.limit}


@dataclass(frozen=True, slots=True)
class _Contestant:
    kind: Kind
    name: str
    weights: tuple[float, ...]
    strategy: Literal["me", "ce"]
    parallel: bool = False


@dataclass(slots=True)
class _Run:
    pieces: int
    bytes: int
    seconds: float
    decode_seconds: float
    prompt_seconds: float
    wire_seconds: float


def endless(engine: Engine) -> Engine:
    """The same engine without the end of generation."""
    copy = Engine(engine.models, engine.router, engine.alignment)
    copy.unified.numbers = tuple(np.where(numbers == END, -1, numbers) for numbers in engine.unified.numbers)
    return copy


def sample_text(pieces: int) -> str:
    """Plain English of about so many pieces."""
    words = _TEXT.split()
    return " ".join(words[i % len(words)] for i in range(max(1, round(pieces / 1.2))))


def make_generation(
    engine: Engine,
    ensemble: Ensemble,
    *,
    strategy: Literal["me", "ce"] = "me",
    weights: Sequence[float] | None = None,
    parallel: bool = False,
    length: int = 100,
    seed: int = 0,
) -> Generation:
    """A reply to about `length` pieces of English, whose prompt is evaluated with the first step."""
    prompts = ensemble.prompter.raw_prompts(sample_text(length), ensemble.config)
    request = replace(
        make_request(ensemble.config, prompts, alone=True),
        strategy=strategy,
        argmax=False,
        seed=seed,
        parallel=parallel,
    )
    if weights is not None:
        request = replace(request, weights=np.array(weights))
    return Generation(engine, request, lambda: False)


def bench(ensemble: Ensemble, advance: Callable[[], object]) -> Report:
    """Measure an ensemble; `advance` is called `work(ensemble)` times. Raises InputError for contexts too short."""
    for member in ensemble.members:
        if member.n_ctx < CONTEXTS[0] + STEPS + max(TOKENS):
            raise InputError(
                f'member "{member.name}": bench needs a context of {CONTEXTS[0] + STEPS + max(TOKENS)} tokens'
            )
    calls: dict[tuple[int, int, int], list[float]] = {}
    runs: dict[str, list[_Run]] = {}
    contestants = _contestants(ensemble)
    engine = endless(ensemble.engine)
    for round_ in range(ROUNDS + 1):  # the first warms up
        for key, seconds in _call_times(ensemble.members, advance):
            if round_:
                calls.setdefault(key, []).append(seconds)
        for contestant in contestants:
            run = _run(engine, ensemble, contestant, seed=round_)
            advance()
            if round_:
                runs.setdefault(contestant.name, []).append(run)
    return _report(ensemble, contestants, calls, runs)


def work(ensemble: Ensemble) -> int:
    """How often `bench` reports progress."""
    calls = sum(len(list(_contexts(member))) * len(TOKENS) for member in ensemble.members)
    return (ROUNDS + 1) * (calls + len(_contestants(ensemble)))


def _contestants(ensemble: Ensemble) -> list[_Contestant]:
    weights = tuple(member.weight for member in ensemble.config.members)
    count = len(weights)
    found = [
        _Contestant("single", name, tuple(float(i == j) for j in range(count)), "me")
        for i, name in enumerate(ensemble.names)
    ]
    if count > 1:
        found.append(_Contestant("ce", "CE", weights, "ce"))
        found.append(_Contestant("ce parallel", "CE in parallel", weights, "ce", parallel=True))
        found.append(_Contestant("me", "ME", weights, "me"))
    return found


def _contexts(member: LoadedModel) -> Iterator[int]:
    return (context for context in CONTEXTS if context + max(TOKENS) <= member.n_ctx)


def _call_times(
    members: Sequence[LoadedModel], advance: Callable[[], object]
) -> Iterator[tuple[tuple[int, int, int], float]]:
    """Seconds of an evaluation by (member, context, tokens)."""
    for i, member in enumerate(members):
        for context in _contexts(member):
            ids = _ids(member, context + max(TOKENS))
            for tokens in TOKENS:
                member.prepare(ids[:context])
                yield (i, context, tokens), member.sync(ids[: context + tokens]).seconds
                advance()


def _ids(member: LoadedModel, count: int) -> IntArray:
    ids = member.vocabulary.encode(sample_text(2 * count).encode(), at_start=True)
    return np.array(ids[:count], dtype=np.int32)


def _run(engine: Engine, ensemble: Ensemble, contestant: _Contestant, seed: int) -> _Run:
    generation = make_generation(
        engine,
        ensemble,
        strategy=contestant.strategy,
        weights=contestant.weights,
        parallel=contestant.parallel,
        seed=seed,
    )
    for member in ensemble.members:
        member.forget()
    # In ME a member that is not drawn yet would pay for its prompt later.
    generation.prepare()
    prompt = sum(work.prompt_seconds for work in generation.work)
    for _ in range(_WARM_UP):
        generation.step()
    inside, length, wire = _inside(generation), len(generation.text), _on_the_wire(ensemble)
    started = time.perf_counter()
    for _ in range(STEPS - _WARM_UP):
        generation.step()
    seconds = time.perf_counter() - started
    on_the_wire = _on_the_wire(ensemble) - wire
    written = len(generation.text) - length
    return _Run(STEPS - _WARM_UP, written, seconds, _inside(generation) - inside, prompt, on_the_wire)


def _inside(generation: Generation) -> float:
    return sum(work.text_seconds for work in generation.work)


def _on_the_wire(ensemble: Ensemble) -> float:
    return sum(member.wire_seconds for member in ensemble.members)


def _report(
    ensemble: Ensemble,
    contestants: Sequence[_Contestant],
    calls: dict[tuple[int, int, int], list[float]],
    runs: dict[str, list[_Run]],
) -> Report:
    times = {key: median(seconds) for key, seconds in calls.items()}
    weights = [member.weight for member in ensemble.config.members]
    several = len(weights) > 1
    me, ce = runs["ME" if several else ensemble.names[0]], runs["CE" if several else ensemble.names[0]]
    ratios = [b.seconds / a.seconds for a, b in zip(me, ce, strict=True)]
    return Report(
        machine=machine(),
        weights=dict(zip(ensemble.names, weights, strict=True)),
        calls=tuple(CallTime(ensemble.names[i], context, k, times[i, context, k]) for i, context, k in times),
        speeds=tuple(_speed(contestant, runs[contestant.name]) for contestant in contestants),
        speed_up=median(ratios),
        limit=limit([{k: times[i, CONTEXTS[0], k] for k in TOKENS} for i in range(len(weights))], weights),
        outside_seconds=median((run.seconds - run.decode_seconds) / run.pieces for run in me),
        memory_bytes=_memory(ensemble),
    )


def _speed(contestant: _Contestant, runs: Sequence[_Run]) -> Speed:
    return Speed(
        kind=contestant.kind,
        name=contestant.name,
        pieces=median(run.pieces / run.seconds for run in runs),
        bytes=median(run.bytes / run.seconds for run in runs),
        prompt_seconds=median(run.prompt_seconds for run in runs),
        decode_share=None if contestant.parallel else median(run.decode_seconds / run.seconds for run in runs),
        wire_seconds=median(run.wire_seconds / run.pieces for run in runs),
    )


def limit(times: Sequence[dict[int, float]], weights: Sequence[float]) -> float:
    """The largest possible speed-up of ME over CE, from each member's seconds by number of tokens.

    CE pays Σ t_i(1) for a piece. ME pays t_i(K) when member i is drawn, with probability λ_i, where K, the pieces since
    it was drawn last, has the geometric distribution of λ_i. Where t_i(k) = a_i + b_i·k this is the quotient of
    Σ (a_i + b_i) and Σ (λ_i·a_i + b_i). Members with weight 0 do not count.
    """
    pairs = [(time, weight / sum(weights)) for time, weight in zip(times, weights, strict=True) if weight > 0]
    return sum(time[1] for time, _ in pairs) / sum(weight * _expected(time, weight) for time, weight in pairs)


def _expected(times: dict[int, float], weight: float) -> float:
    """The mean of t(K) for a geometric K; between and beyond the measured numbers of tokens t is linear."""
    if weight == 1:
        return times[1]
    backlog = np.arange(1, 1 + int(np.ceil(np.log(1e-9) / np.log1p(-weight))))
    probability = weight * (1 - weight) ** (backlog - 1)
    tokens, seconds = list(times), list(times.values())
    slope = (seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2])
    beyond = np.maximum(backlog - tokens[-1], 0) * slope
    return float(probability @ (np.interp(backlog, tokens, seconds) + beyond) / probability.sum())


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _memory(ensemble: Ensemble) -> int | None:
    """Weights once for each file; caches and buffers of all members."""
    here = [member for member in ensemble.members if isinstance(member, Member)]
    reports = [inspect_member(member) for member in here]
    parts = [(report.kv_cache_bytes, report.working_bytes) for report in reports]
    files = {id(member.weights): member.weights.size for member in here}
    if any(part is None for pair in parts for part in pair):
        return None
    return sum(files.values()) + sum(part or 0 for pair in parts for part in pair)
