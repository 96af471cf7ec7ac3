"""What guesses (`--draft ngram`) gain on five kinds of text: pieces/s to those without, and evaluations for each piece.

    python scripts/bench_drafts.py [--models models.toml] [--seeds 3] [--pieces 150]

The replies with guesses and without are written in turn, a few pieces of each, so that the machine cancels out. They
are drawn without a penalty for what is repeated. The last line is the same as JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from me_local.config import Overrides, load_config
from me_local.decoding.reply import ReplyStream
from me_local.ensemble import Ensemble
from me_local.llama.weights import Shelf

TURN = 8  # pieces of one reply before the other goes on
WARM_UP = 2  # pieces, of which the first has the prompt to evaluate

PASSAGE = (
    "The harbour town of Ellmouth had three bridges and one clock. The clock was kept by a woman called Marian Oakes, "
    "who climbed the tower every morning at six and wound it with a brass key as long as her forearm. In the winter of "
    "the great frost the key broke, and for nineteen days the clock showed twenty past four. Fishermen went out late, "
    "the baker opened early, and the school bell rang whenever the teacher felt that it should. On the twentieth day a "
    "tinker from the hills came down with a new key, which he had made from the hinge of an old church door."
)
CODE = '''def load(path):
    """Read the records of a file."""
    records = []
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, value = line.split("=", 1)
            records.append((name.strip(), value.strip()))
    return records


def total(records):
    """Sum the values of the records."""
    result = 0
    for name, value in records:
        result += int(value)
    return result
'''
FRANCE = '  {"name": "France", "capital": "Paris", "population": 68000000, "continent": "Europe"},\n'
JAPAN = '  {"name": "Japan", "capital": "Tokyo", "population": 124000000, "continent": "Asia"},\n'
KINDS = {  # a prompt, and whether it is completed as it stands
    "repeated passage": (f"{PASSAGE}\n\n{PASSAGE}\n\nThe harbour town of", True),
    "edit of code": (
        f"```python\n{CODE}```\n\nThe same code with the name `rows` instead of `records`:\n\n"
        "```python\ndef load(path):\n",
        True,
    ),
    "JSON": (f"[\n{FRANCE}{JAPAN}", True),
    "summary": (f"Summarise this text in three sentences:\n\n{PASSAGE}", False),
    "free text": ("Write a short story about a lighthouse keeper who finds a letter in a bottle.", False),
}


@dataclass(frozen=True, slots=True)
class Gain:
    """On a kind of text: pieces/s with guesses to those without, evaluations for each piece, predictions guessed."""

    kind: str
    speed: float
    calls_per_piece: float
    calls_per_piece_plain: float
    guessed: float


def gains(models: Path, seeds: int, pieces: int) -> Iterator[Gain]:
    """What guesses gain, kind by kind."""
    config, settings = load_config(models), Overrides(max_tokens=pieces, repeat_penalty=1.0)
    with ExitStack() as stack:
        shelf = stack.enter_context(closing(Shelf()))
        pair = [stack.enter_context(Ensemble(config, shelf=shelf)) for _ in range(2)]
        for kind, (prompt, raw) in KINDS.items():
            streams: list[list[ReplyStream]] = [[], []]
            seconds, counts = [0.0, 0.0], [0, 0]
            for seed in range(seeds):
                both = [
                    ensemble.stream(prompt, replace(settings, seed=seed, draft=draft), raw=raw)
                    for ensemble, draft in zip(pair, ("none", "ngram"), strict=True)
                ]
                _write_in_turn(both, seconds, counts)
                for kept, stream in zip(streams, both, strict=True):
                    kept.append(stream)
            yield _gain(kind, streams, seconds, counts)


def _write_in_turn(both: list[ReplyStream], seconds: list[float], counts: list[int]) -> None:
    for stream in both:
        list(islice(stream, WARM_UP))
    running = {0, 1}
    while running:
        for i in sorted(running):
            started = time.perf_counter()
            written = len(list(islice(both[i], TURN)))
            seconds[i] += time.perf_counter() - started
            counts[i] += written
            if written < TURN:
                running.remove(i)


def _gain(kind: str, streams: list[list[ReplyStream]], seconds: list[float], counts: list[int]) -> Gain:
    replies = [[stream.reply for stream in each] for each in streams]
    written = [sum(len(reply.steps) for reply in each) for each in replies]
    calls = [sum(usage.calls for reply in each for usage in reply.usage) for each in replies]
    guessed = sum(reply.guessed for reply in replies[1])
    speed = (counts[1] / seconds[1]) / (counts[0] / seconds[0])
    return Gain(kind, speed, calls[1] / written[1], calls[0] / written[0], guessed / (calls[1] + guessed))


def main() -> int:
    """Print what guesses gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models.toml"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pieces", type=int, default=150)
    arguments = parser.parse_args()
    found = []
    for gain in gains(arguments.models, arguments.seeds, arguments.pieces):
        print(
            f"{gain.kind}: {gain.speed:.2f} of the pieces/s, {gain.calls_per_piece:.2f} evaluations a piece "
            f"({gain.calls_per_piece_plain:.2f} without), {gain.guessed:.0%} of the predictions guessed",
            flush=True,
        )
        found.append(asdict(gain))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
