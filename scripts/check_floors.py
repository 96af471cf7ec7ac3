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
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Literal

import llama_cpp
from bench_step import WARM_UP, aligning, inside, outside

import me_local
from me_local import bench_batch
from me_local.bench import endless, make_generation, sample_text
from me_local.bench_batch import bench_batches
from me_local.cli.bench import repeated
from me_local.config import Config, Sampling, load_config
from me_local.ensemble import Ensemble
from me_local.inspection import inspect_member
from me_local.machine import usable_cores
from me_local.vocabulary import UnifiedVocabulary
from me_local.weights import Shelf


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
    lengths = (100, 1000) if given.short else (100, 8000)
    roomy = replace(config, members=tuple(replace(member, n_ctx=9728) for member in config.members))
    with Ensemble(roomy) as ensemble:
        room = min(member.n_ctx for member in ensemble.members)
        lengths = tuple(min(length, room - 1000) for length in lengths)
        costs = [_outside(ensemble, length, given) for length in lengths]
    print(f"  {', '.join(f'{1e6 * c:.0f} µs at {n} pieces' for n, c in zip(lengths, costs, strict=True))}")
    yield Check(f"outside decode at {lengths[1]} pieces to {lengths[0]}", costs[1] / costs[0], 1.2, False)
    costs = []
    for count in (1, 4):
        members = repeated(config, count).members
        drawn = tuple(replace(member, weight=float(i == 0)) for i, member in enumerate(members))
        with Ensemble(replace(config, members=drawn)) as ensemble:
            costs.append(_outside(ensemble, 100, given))
    print(f"  {1e6 * costs[0]:.0f} µs with one member, {1e6 * costs[1]:.0f} µs with three more that are not drawn")
    yield Check("outside decode with members that are not drawn", costs[1] / costs[0], 1.2, False)


def _outside(ensemble: Ensemble, length: int, given: Given) -> float:
    generation = make_generation(endless(ensemble.engine), ensemble, length=length, seed=1)
    generation.prepare()
    outside(generation, 20)
    return median(outside(generation, given.steps))


def growth(given: Given) -> Iterator[Check]:
    """CE's time grows with the number of members, ME's as its limit says; copies share the weights."""
    counts = (2, 4) if given.short else (2, 4, 8)
    seconds = []
    for count in counts:
        report = bench(given, "--members", str(count))
        print(f"  {count} copies: speed-up {report['speed_up']:.2f}, limit {report['limit']:.2f}")
        yield Check(f"ME's speed-up over its limit, {count} copies", report["measured_over_limit"], 0.9, True)
        seconds.append(1 / next(speed["pieces"] for speed in report["speeds"] if speed["kind"] == "ce"))
    grown = counts[-1] / counts[0]
    name = f"CE's time for a piece, {counts[-1]} copies to {counts[0]}"
    yield Check(name, seconds[-1] / seconds[0], 0.75 * grown, True)
    config = load_config(given.models)
    one, many = (_resident(repeated(config, count)) for count in (1, counts[-1]))
    with Ensemble(repeated(config, 1)) as ensemble:
        member = ensemble.members[0]
        context = inspect_member(member)
        each = (context.kv_cache_bytes or 0) + (context.working_bytes or 0)
    allowed = one + (counts[-1] - 1) * each
    yield Check(
        f"resident memory of {counts[-1]} copies to one model and {counts[-1]} contexts", many / allowed, 1.05, False
    )


def _resident(config: Config) -> float:
    """Resident bytes that a loaded ensemble adds, all of its caches used, in a process of its own."""
    return _in_own_process(_RESIDENT, config)


_RESIDENT = """
from me_local.ensemble import Ensemble
from me_local.bench import make_generation
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


CHECKS = {check.__name__: check for check in (limit, step, single, flat, growth, start, batch)}


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
