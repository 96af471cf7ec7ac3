"""Many clients at once: is every request answered or refused, and every reply the one that it would be alone?

python scripts/load_server.py [--seconds 60] [--clients 50] [--parallel 1]

Starts `me-local serve` on tiny models and asks it by many clients at a time, for conversations and completions, whole
and streamed, with seeds, from a few prompts, and with a queue that is too short for all of them. One request in ten
goes away in the middle. Each reply is compared with that of an ensemble of this process, which made it alone. Memory
is what the server has resident: after a third of the time as warm-up, its median in the last quarter of the rest must
not lie more than 5% above that in the first. Prints figures and, as its last line, a JSON object; ends with status 1
where something is wrong.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import make_tiny_models
import processes

from me_local import Ensemble, Message, Overrides, load

MEMBERS = ("bpe_a", "spm", "hybrid")
QUEUE = 30
PROMPTS = ["the cat sat on the mat", "a dog and a cat " * 5, "the boats came home late " * 3, "Hello"]
SEEDS = range(3)
PIECES = 12
GROWTH = 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """What a client asks for, and the reply that it must get."""

    path: str
    body: dict[str, Any]
    expected: str


@dataclass(slots=True)
class Result:
    """What happened: requests by outcome, pieces, and the server's memory over time, in bytes."""

    outcomes: Counter[str] = field(default_factory=Counter)
    resident: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def growth(self) -> float:
        """Of the median of the last quarter over that of the first, once it is warm."""
        warm = self.resident[len(self.resident) // 3 :]
        quarter = max(1, len(warm) // 4)
        return median(warm[-quarter:]) / median(warm[:quarter]) - 1

    @property
    def unexpected(self) -> list[str]:
        """Outcomes that must not be."""
        return sorted(set(self.outcomes) - {"right", "429", "left"})


def write_models(folder: Path) -> Path:
    """Write the tiny models and their models.toml into a folder."""
    paths = make_tiny_models.make_all(folder)
    path = folder / "models.toml"
    path.write_text(
        "".join(
            f'[[members]]\nname = "{name}"\npath = "{paths[name]}"\nn_ctx = 512\nn_threads = 1\n' for name in MEMBERS
        )
    )
    return path


def make_jobs(ensemble: Ensemble) -> list[Job]:
    """All that clients ask for, with the replies that the ensemble gives alone."""
    jobs = []
    for prompt in PROMPTS:
        for seed in SEEDS:
            settings = Overrides(seed=seed, max_tokens=PIECES)
            common = {"model": "me-local", "seed": seed, "max_tokens": PIECES}
            chat = {"messages": [{"role": "user", "content": prompt}]}
            reply = ensemble.generate([Message("user", prompt)], settings).text
            jobs.append(Job("/v1/chat/completions", common | chat, reply))
            reply = ensemble.generate(prompt, settings, raw=True).text
            jobs.append(Job("/v1/completions", common | {"prompt": prompt}, reply))
    return jobs


@contextmanager
def serving(models: Path, parallel: int) -> Iterator[tuple[processes.Running, str]]:
    """`me-local serve` as a process, and its address."""
    command = [sys.executable, "-c", "from me_local.cli import main; main()", "serve", "--models", str(models)]
    options = ["--port", "0", "--queue", str(QUEUE), "--cache-mb", "4", "--parallel", str(parallel)]
    with processes.running([*command, *options]) as server:
        yield server, server.expect(r" at (http://\S+)")[1]


def run(models: Path, clients: int, seconds: float, parallel: int = 1) -> Result:
    """Ask for so long by so many clients a server that makes so many replies at once."""
    with load(models) as ensemble:
        jobs = make_jobs(ensemble)
    with serving(models, parallel) as (server, url):
        result = asyncio.run(_ask_all(url, jobs, clients, seconds, server.process.pid))
        server.process.terminate()
        if (status := server.finish()) != 0:
            result.outcomes[f"ended with status {status}"] += 1
    return result


async def _ask_all(url: str, jobs: list[Job], clients: int, seconds: float, pid: int) -> Result:
    result, started = Result(), time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=clients)) as http:
        watching = asyncio.create_task(_watch(result, pid))
        end = started + seconds
        await asyncio.gather(*[_client(http, jobs, random.Random(i), end, result) for i in range(clients)])
        watching.cancel()
        assert (await http.get("/health")).status_code == 200
    result.seconds = time.monotonic() - started
    return result


async def _watch(result: Result, pid: int) -> None:
    while True:
        statm = Path(f"/proc/{pid}/statm").read_text()
        result.resident.append(int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        await asyncio.sleep(0.1)


async def _client(http: httpx.AsyncClient, jobs: list[Job], chance: random.Random, end: float, result: Result) -> None:
    while time.monotonic() < end:
        job = chance.choice(jobs)
        try:
            outcome = await (_streamed(http, job, chance) if chance.random() < 0.5 else _whole(http, job))
        except httpx.HTTPError as error:
            outcome = repr(error)
        result.outcomes[outcome] += 1
        if outcome == "429":
            await asyncio.sleep(chance.random())  # less than it is asked to, so that the queue stays full


async def _whole(http: httpx.AsyncClient, job: Job) -> str:
    response = await http.post(job.path, json=job.body)
    if response.status_code != 200:
        return str(response.status_code)
    choice = response.json()["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return "right" if text == job.expected else f"wrong: {text!r} for {job.body}"


async def _streamed(http: httpx.AsyncClient, job: Job, chance: random.Random) -> str:
    leaves = chance.random() < 0.2
    text = ""
    async with http.stream("POST", job.path, json=job.body | {"stream": True}) as response:
        if response.status_code != 200:
            return str(response.status_code)
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return f"failed: {chunk['error']['message']}"
            choice = chunk["choices"][0]
            text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            if leaves and text:
                return "left"
    return "right" if text == job.expected else f"wrong: {text!r} for {job.body}"


def main() -> None:
    """Run, print the figures, and say whether all is well."""
    parser = argparse.ArgumentParser(description="Many clients at once: is every request answered, and rightly?")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--parallel", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(write_models(Path(folder)), options.clients, options.seconds, options.parallel)
    for outcome, count in result.outcomes.most_common():
        print(f"{count:>7,}  {outcome}")
    well = not result.unexpected and result.growth <= GROWTH
    figures = {
        "clients": options.clients,
        "parallel": options.parallel,
        "seconds": round(result.seconds, 1),
        "outcomes": dict(result.outcomes),
        "resident_mb": [round(result.resident[0] / 1e6, 1), round(result.resident[-1] / 1e6, 1)],
        "growth": round(result.growth, 4),
        "well": well,
    }
    print(json.dumps(figures))
    if not well:
        sys.exit(1)


if __name__ == "__main__":
    main()
