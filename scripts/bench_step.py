"""What a step costs outside llama.cpp's decode: the time of whole steps less that inside `llama_decode`.

Runs an ensemble (models.toml unless told otherwise) without ends of generation and prints the median of a step's time
outside decode at several lengths of text, and of aligning one step alone; the last line is JSON. On a CPU llama.cpp
streams the weights through the caches before each step, so the same steps without any decode are timed, too. With
--profile it prints pyinstrument's tree of the steps instead.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

import me_local
from me_local.decoding.generation import Generation
from me_local.llama.member import Member
from me_local.measuring.bench import endless, make_generation
from me_local.mixture.alignment import top_k
from me_local.sampling import Sampling

WARM_UP = 20


def inside(generation: Generation) -> float:
    """Seconds inside `llama_decode` so far."""
    return sum(work.prompt_seconds + work.text_seconds for work in generation.work)


def outside(generation: Generation, steps: int) -> list[float]:
    """Seconds outside decode of each of so many steps."""
    found = []
    for _ in range(steps):
        before, started = inside(generation), time.perf_counter()
        generation.step()
        found.append(time.perf_counter() - started - (inside(generation) - before))
    return found


def warm(generation: Generation, steps: int) -> list[float]:
    """The same with a decode that does nothing, so that the step finds its code and data in the caches."""
    with patch.object(Member, "_decode", lambda *_: 0):
        return outside(generation, steps)


def aligning(size: int, rounds: int = 500) -> float:
    """Median seconds of aligning random logits, top-k 10, in a loop of nothing else."""
    logits = (3 * np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    numbers, sampling, times = np.arange(1, size + 1, dtype=np.int32), Sampling(), []
    for _ in range(rounds):
        started = time.perf_counter()
        top_k(logits, numbers, sampling)
        times.append(time.perf_counter() - started)
    return median(times)


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models.toml"))
    parser.add_argument("--steps", type=int, default=200, help="steps at each length of text")
    parser.add_argument("--lengths", default="100", help="pieces of text before them, as 100,1000")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    report: dict[str, Any] = {
        "align_us": 1e6 * aligning(262144),
        "outside_us": {},
        "warm_us": {},
        "share_in_decode": {},
    }
    print(f"aligning 262,144 logits, top-k 10, warm: {report['align_us']:.0f} µs")
    with me_local.load(given.models) as ensemble:
        for length in map(int, given.lengths.split(",")):
            generation = make_generation(endless(ensemble.engine), ensemble, length=length, seed=1)
            outside(generation, WARM_UP)
            if given.profile:
                from pyinstrument import Profiler

                with Profiler(interval=0.0001) as profiler:
                    outside(generation, given.steps)
                print(profiler.output_text(unicode=True, show_all=True))
                continue
            before, started = inside(generation), time.perf_counter()
            found = outside(generation, given.steps)
            share = (inside(generation) - before) / (time.perf_counter() - started)
            report["outside_us"][length] = 1e6 * median(found)
            report["share_in_decode"][length] = share
            report["warm_us"][length] = 1e6 * median(warm(generation, given.steps))
            print(
                f"{length:6} pieces of text: {1e6 * median(found):.0f} µs a step outside decode, {share:.1%} inside; "
                f"{report['warm_us'][length]:.0f} µs without any decode"
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
