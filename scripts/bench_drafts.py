"""What guesses (`--draft`) gain on five kinds of text: pieces/s to those without, and evaluations for each piece.

    python scripts/bench_drafts.py [--models models.toml] [--seeds 3] [--pieces 150]

Guesses are those that the models.toml wants, else those by n-grams. The replies with them and without are written in
turn, a few pieces of each, so that the machine cancels out. They are drawn without a penalty for what is repeated. The
last line is the same as JSON.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from me_local.config import Overrides, load_config, override
from me_local.measuring import guesses
from me_local.measuring.guesses import PASSAGE, Gain, TextKind

FRANCE = '  {"name": "France", "capital": "Paris", "population": 68000000, "continent": "Europe"},\n'
JAPAN = '  {"name": "Japan", "capital": "Tokyo", "population": 124000000, "continent": "Asia"},\n'
KINDS = (
    *guesses.KINDS,
    TextKind("JSON", f"[\n{FRANCE}{JAPAN}"),
    TextKind("summary", f"Summarise this text in three sentences:\n\n{PASSAGE}", raw=False),
)


def gains(models: Path, seeds: int, pieces: int) -> Iterator[Gain]:
    """What guesses gain, kind by kind."""
    config = override(load_config(models), Overrides(repeat_penalty=1.0))
    if config.draft == "none":
        config = override(config, Overrides(draft="ngram"))
    return guesses.gains(config, KINDS, seeds=seeds, pieces=pieces)


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
            f"{gain.kind}: {gain.speed_up:.2f} of the pieces/s, {gain.calls_per_piece:.2f} evaluations a piece "
            f"({gain.calls_per_piece_plain:.2f} without), {gain.guessed:.0%} of the predictions guessed",
            flush=True,
        )
        found.append(asdict(gain))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
