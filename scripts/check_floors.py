"""Check that the ensemble is as fast as it should be: ratios in one run each, so that the machine cancels out.

    python scripts/check_floors.py [--models models.toml] [--short] [--slack 0.0] [--only limit,step,...]

Prints each figure beside its floor and ends with status 1 where one is missed. --short takes fewer steps and leaves out
the longest texts; --slack, such as 0.15, forgives so much noise. Run it on a machine that does nothing else.
"""

import argparse
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Literal
from unittest.mock import patch

import llama_cpp
import numpy as np
from bench_drafts import counted_as_on_gpu, gains
from bench_step import WARM_UP, aligning, inside, outside
from bench_structured import forced

import me_local
from me_local.cli.bench import repeated
from me_local.config import Config, load_config
from me_local.decoding.generation import Generation
from me_local.ensemble import Ensemble
from me_local.llama.member import Member
from me_local.llama.weights import Shelf
from me_local.measuring import bench_batch
from me_local.measuring.bench import CONTEXTS, endless, make_generation, sample_text
from me_local.measuring.bench_batch import bench_batches
from me_local.measuring.inspection import inspect_member
from me_local.sampling import Sampling
from me_local.system.machine import usable_cores
from me_local.text.unified import UnifiedVocabulary


@dataclass(frozen=True, slots=True)
class Check:
    """A figure and what it has to be: at least `floor`, or at most."""

    name: str
    figure: float
    floor: float
    at_least: bool

    def holds(self, slack: float) -> bool:
        """Whether it is on the right side, or off by less than the slack."""
        return self.figure >= self.floor * (1 - slack) if self.at_least else self.figure <= self.floor * (1 + slack)


@dataclass(frozen=True, slots=True)
class Given:
    """What is measured, and how thoroughly."""

    models: Path
    short: bool

    @property
    def steps(self) -> int:
        """Steps of each measurement."""
        return 60 if self.short else 200


def bench(given: Given, *options: str) -> dict:
    """The report of `me-local bench`."""
    command = ["me-local", "bench", "--models", str(given.models), "--json", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def limit(given: Given) -> Iterator[Check]:
    """ME stands at the limit that its members' times allow."""
    report = bench(given)
    print(f"  speed-up {report['speed_up']:.2f}, limit {report['limit']:.2f}")
    yield Check("ME's speed-up over its limit", report["measured_over_limit"], 0.95, True)


def step(given: Given) -> Iterator[Check]:
    """A step costs little outside decode, and aligning 262,144 logits is quick."""
    yield Check("aligning 262,144 logits, µs", 1e6 * aligning(262144), 120, False)
    with me_local.load(given.models) as ensemble:
        generation = make_generation(endless(ensemble.engine), ensemble, seed=1)
        generation.prepare()
        outside(generation, 20)
        before, started = inside(generation), time.perf_counter()
        found = outside(generation, given.steps)
        wall, decode = time.perf_counter() - started, inside(generation) - before
    yield Check("an ME step outside decode, µs", 1e6 * median(found), 200, False)
    yield Check("share of ME outside decode", 1 - decode / wall, 0.03, False)


def single(given: Given) -> Iterator[Check]:
    """An ensemble of one is as fast as llama-cpp-python's own loop, and CE of one as ME of one."""
    config = load_config(given.models)
    for member in config.members:
        alone = replace(config, members=(replace(member, weight=1.0),))
        with ExitStack() as stack:
            shelf = stack.enter_context(closing(Shelf()))
            ensembles = [stack.enter_context(Ensemble(alone, shelf=shelf)) for _ in range(2)]
            cores = member.n_threads or usable_cores()
            with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
                llama = llama_cpp.Llama(
                    str(member.path),
                    n_ctx=member.n_ctx,
                    n_threads=cores,
                    n_threads_batch=cores,
                    n_gpu_layers=member.n_gpu_layers,
                    verbose=False,
                )
            stack.callback(llama.close)
            theirs_next = partial(next, _theirs(llama, member.sampling))
            steps = [_ours(ensembles[0], "me"), _ours(ensembles[1], "ce"), theirs_next]
            seconds = _in_turn(steps, 3 * given.steps)
        me, ce, theirs = map(median, seconds)
        print(f"  a step: ME {1e3 * me:.2f} ms, CE {1e3 * ce:.2f} ms, Llama.generate {1e3 * theirs:.2f} ms")
        yield Check(f"{member.name}: speed to Llama.generate", theirs / me, 1.0, True)
        yield Check(f"{member.name}: CE of one to ME of one", me / ce, 0.97, True)


def _in_turn(steps: Sequence[Callable[[], object]], times: int) -> list[list[float]]:
    """Seconds of each step, taken in turn: the speed of a machine goes up and down from one second to the next."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(WARM_UP + times):
        for step, found in zip(steps, seconds, strict=True):
            started = time.perf_counter()
            step()
            found.append(time.perf_counter() - started)
    return [found[WARM_UP:] for found in seconds]


def _ours(ensemble: Ensemble, strategy: Literal["me", "ce"]) -> Callable[[], object]:
    generation = make_generation(endless(ensemble.engine), ensemble, strategy=strategy, seed=1)
    generation.prepare()
    return generation.step


def _theirs(llama: llama_cpp.Llama, sampling: Sampling) -> Iterator[int]:
    return llama.generate(
        llama.tokenize(sample_text(100).encode()),
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        temp=sampling.temperature,
    )


def flat(given: Given) -> Iterator[Check]:
    """What a step costs outside decode depends neither on the length of the text nor on members that are not drawn."""
    config = load_config(given.models)
    roomy = replace(config, members=tuple(replace(member, n_ctx=9728) for member in config.members))
    with _ensembles(roomy, roomy) as (first, second):
        room = min(member.n_ctx for member in first.members)
        lengths = 100, min(1000 if given.short else 8000, room - 1000)
        generations = [_prepared(first, length=lengths[0]), _prepared(second, length=lengths[1])]
        yield from _no_dearer(f"at {lengths[1]} pieces to {lengths[0]}", generations, given)
    few, many = (
        replace(given_, members=tuple(replace(member, weight=float(i == 0)) for i, member in enumerate(given_.members)))
        for given_ in (repeated(config, 1), repeated(config, 4))
    )
    with _ensembles(few, many) as ensembles:
        yield from _no_dearer("with three members that are not drawn", list(map(_prepared, ensembles)), given)


def _no_dearer(what: str, generations: Sequence[Generation], given: Given) -> Iterator[Check]:
    """Steps of both in turn, outside decode: cold, behind a decode that streams the weights, and warm, without any."""
    cold = _outside_in_turn(generations, given.steps)
    with patch.object(Member, "_decode", lambda *_: 0):
        warm = _outside_in_turn(generations, 3 * given.steps)
    for name, costs, floor in (("cold", cold, 1.2), ("warm", warm, 1.1)):
        print(f"  {name}: {1e6 * costs[0]:.0f} and {1e6 * costs[1]:.0f} µs")
        yield Check(f"outside decode {what}, {name}", costs[1] / costs[0], floor, False)


def _outside_in_turn(generations: Sequence[Generation], times: int) -> list[float]:
    """Median seconds outside decode of a step of each, taken in turn."""
    found: list[list[float]] = [[] for _ in generations]
    for _ in range(WARM_UP + times):
        for generation, seconds in zip(generations, found, strict=True):
            seconds += outside(generation, 1)
    return [median(seconds[WARM_UP:]) for seconds in found]


@contextmanager
def _ensembles(*configs: Config) -> Iterator[list[Ensemble]]:
    """Ensembles that share their weights, each with caches of its own."""
    with ExitStack() as stack:
        shelf = stack.enter_context(closing(Shelf()))
        yield [stack.enter_context(Ensemble(config, shelf=shelf)) for config in configs]


def _prepared(ensemble: Ensemble, strategy: Literal["me", "ce"] = "me", length: int = 100) -> Generation:
    generation = make_generation(endless(ensemble.engine), ensemble, strategy=strategy, length=length, seed=1)
    generation.prepare()
    return generation


class _Copies:
    """Copies of one member: steps of ME and CE, and beside each of them the evaluations that it cannot do without.

    `me` evaluates as many tokens as the member that is drawn lacks, and `call` so many of another copy; `ce` evaluates
    a token of each copy, and `one` one of one copy.
    """

    def __init__(self, me: Ensemble, ce: Ensemble, others: Ensemble) -> None:
        self._me, self._ce, self._members = _prepared(me), _prepared(ce, "ce"), cycle(others.members)
        self._ids = others.members[0].vocabulary.encode(sample_text(1000).encode(), at_start=True)
        self._tokens = 1
        self.count = len(others.members)
        self.steps = (self.me, self.call, self.ce, self.one)

    def me(self) -> None:
        before = self._evaluated()
        self._me.step()
        self._tokens = self._evaluated() - before

    def call(self) -> None:
        self._evaluate(self._tokens)

    def ce(self) -> None:
        self._ce.step()

    def one(self) -> None:
        self._evaluate(1)

    def _evaluated(self) -> int:
        return sum(work.prompt_tokens + work.text_tokens for work in self._me.work)

    def _evaluate(self, tokens: int) -> None:
        member, ids = next(self._members), np.array(self._ids[: CONTEXTS[0] + tokens], dtype=np.int32)
        if member.caches[0].length < CONTEXTS[0]:
            member.prepare(ids[: CONTEXTS[0]])
        member.caches[0].cut(CONTEXTS[0])
        member.sync(ids)


def growth(given: Given) -> Iterator[Check]:
    """CE's time grows with the number of members, ME's as its limit says; copies share the weights."""
    config = load_config(given.models)
    counts = (2, 4) if given.short else (2, 4, 8)
    many = [repeated(config, count) for count in counts]
    short = [replace(copies, members=tuple(replace(m, n_ctx=1024) for m in copies.members)) for copies in many]
    with _ensembles(*(config for config in short for _ in range(3))) as ensembles:
        copies = [_Copies(*ensembles[3 * i : 3 * i + 3]) for i in range(len(counts))]
        seconds = _in_turn([step for each in copies for step in each.steps], given.steps)
    for i, count in enumerate(counts):
        me, call, ce, one = seconds[4 * i : 4 * i + 4]
        for_me = median(c / m for c, m in zip(call, me, strict=True))
        for_ce = median(count * o / c for o, c in zip(one, ce, strict=True))
        print(f"  {count} copies: evaluations take {for_me:.3f} of ME's steps, {for_ce:.3f} of CE's")
        yield Check(f"ME's speed-up over its limit, {count} copies", for_me / for_ce, 0.9, True)
    grown = median(many / few for few, many in zip(seconds[2], seconds[-2], strict=True))
    name = f"CE's time for a piece, {counts[-1]} copies to {counts[0]}"
    yield Check(name, grown, 0.75 * counts[-1] / counts[0], True)
    one, most = (_resident(repeated(config, count)) for count in (1, counts[-1]))
    with Ensemble(repeated(config, 1)) as ensemble:
        member = ensemble.members[0]
        context = inspect_member(member)
        each = (context.kv_cache_bytes or 0) + (context.working_bytes or 0)
    allowed = one + (counts[-1] - 1) * each
    yield Check(
        f"resident memory of {counts[-1]} copies to one model and {counts[-1]} contexts", most / allowed, 1.05, False
    )


def _resident(config: Config) -> float:
    """Resident bytes that a loaded ensemble adds, all of its caches used, in a process of its own."""
    return _in_own_process(_RESIDENT, config)


_RESIDENT = """
from me_local.ensemble import Ensemble
from me_local.measuring.bench import make_generation
def resident(): return 1024 * int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
config, before = pickle.load(sys.stdin.buffer), resident()
with Ensemble(config) as ensemble:
    make_generation(ensemble.engine, ensemble).prepare()
    print(resident() - before)
"""


def start(given: Given) -> Iterator[Check]:
    """The unified vocabulary is quick to make, and loading hardly slower than llama-cpp-python's."""
    config = load_config(given.models)
    with Ensemble(config) as ensemble:
        started = time.perf_counter()
        UnifiedVocabulary([member.vocabulary for member in ensemble.members])
        yield Check("unified vocabulary, s", time.perf_counter() - started, 1.0, False)
    # Each load in a process of its own: what a process loads again is quicker, and that is not a user's start.
    ours, theirs = [], []
    for _ in range(3):
        ours.append(_in_own_process(_LOAD, config))
        theirs.append(_in_own_process(_LOAD_PLAIN, config))
    print(f"  ours {median(ours):.2f} s, Llama(...) {median(theirs):.2f} s")
    yield Check("loading to the sum of plain Llama(...)", median(ours) / median(theirs), 1.3, False)


_LOAD = """
from me_local.ensemble import Ensemble
config, started = pickle.load(sys.stdin.buffer), time.perf_counter()
with Ensemble(config):
    print(time.perf_counter() - started)
"""
_LOAD_PLAIN = """
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
import llama_cpp
config, started = pickle.load(sys.stdin.buffer), time.perf_counter()
with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
    loaded = [llama_cpp.Llama(str(m.path), n_ctx=m.n_ctx, verbose=False) for m in config.members]
print(time.perf_counter() - started)
"""


def _in_own_process(code: str, config: Config) -> float:
    """The number that the code prints, which may read the configuration from its standard input."""
    command = [sys.executable, "-c", "import pickle, sys, time\n" + code]
    return float(subprocess.run(command, input=pickle.dumps(config), capture_output=True, check=True).stdout)


def batch(given: Given) -> Iterator[Check]:
    """Several replies at once are faster than one at a time, and a shared route keeps ME's gain."""
    config = load_config(given.models)
    bench_batch.STEPS = 24 if given.short else 100
    counts = (1, 4, 16)
    found = bench_batches(config, counts, lambda: None)
    speeds = {(speed.batch, speed.kind): speed.pieces for speed in found if speed.kind != "single"}
    for (count, kind), pieces in speeds.items():
        print(f"  {count} at once, {kind}: {pieces:.1f} pieces/s")
    yield Check("ME, 16 at once to one at a time", speeds[16, "me shared"] / speeds[1, "me shared"], 1.8, True)
    yield Check("4 at once, ME to CE", speeds[4, "me shared"] / speeds[4, "ce"], 1.2, True)
    yield Check("16 at once, ME to CE", speeds[16, "me shared"] / speeds[16, "ce"], 0.95, True)
    for count in counts[1:]:
        ratio = speeds[count, "me shared"] / speeds[count, "me own"]
        yield Check(f"{count} at once, shared route to own routes", ratio, 1.0, True)


def draft(given: Given) -> Iterator[Check]:
    """Guesses gain where text is repeated, and cost next to nothing elsewhere; bytes that a schema forces are cheap."""
    seeds = 2 if given.short else 4
    for gain in gains(given.models, seeds=seeds, pieces=given.steps):
        floor = 1.2 if gain.kind == "repeated passage" else 0.97
        yield Check(f"{gain.kind}: pieces/s with guesses to without", gain.speed_up, floor, True)
    for gain in counted_as_on_gpu(given.models, seeds=seeds, pieces=given.steps):
        if most := {"repeated passage": 0.5, "edit of code": 0.75}.get(gain.kind):
            yield Check(f"{gain.kind}: evaluations for a piece, as on a GPU", gain.calls_per_piece, most, False)
    found = forced(given.models, seeds=4 if given.short else 8)
    print(f"  {found.forced:.0%} of the JSON forced, {found.json_bytes:.0f} bytes/s to {found.free_bytes:.0f}")
    yield Check("forced JSON: bytes/s to those of free text", found.speed_up, 1.5, True)


CHECKS = {check.__name__: check for check in (limit, step, single, flat, growth, start, batch, draft)}


def main() -> int:
    """Run the checks; the status is 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models.toml"))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--slack", type=float, default=0.0)
    parser.add_argument("--only", default=",".join(CHECKS), help="some of " + ", ".join(CHECKS))
    arguments = parser.parse_args()
    failed = 0
    for name in arguments.only.split(","):
        print(f"{name}: {(CHECKS[name].__doc__ or '').splitlines()[0]}", flush=True)
        for check in CHECKS[name](Given(arguments.models, arguments.short)):
            holds = check.holds(arguments.slack)
            failed += not holds
            relation = "at least" if check.at_least else "at most"
            verdict = "ok" if holds else "MISSED"
            print(f"  {check.name}: {check.figure:.3g}, {relation} {check.floor:g}: {verdict}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
