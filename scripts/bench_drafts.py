"""What guesses (`draft` in a models.toml) gain on five kinds of text: pieces/s to those without, evaluations a piece.

    python scripts/bench_drafts.py [--models models.toml] [--seeds 3] [--pieces 150] [--as-on-gpu]

Guesses are those that the models.toml wants. The replies with them and without are written in
turn, a few pieces of each, so that the machine cancels out. They are drawn without a penalty for what is repeated. The
last line is the same as JSON.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

from me_local import asking
from me_local.config import Overrides, load_config, override
from me_local.decoding.guessing import CHEAP
from me_local.measuring import guesses
from me_local.measuring.guesses import PASSAGE, Gain, TextKind

FRANCE = '  {"name": "France", "capital": "Paris", "population": 68000000, "continent": "Europe"},\n'
JAPAN = '  {"name": "Japan", "capital": "Tokyo", "population": 124000000, "continent": "Asia"},\n'
KINDS = (
    *guesses.KINDS,
    TextKind("JSON", f"[\n{FRANCE}{JAPAN.rstrip()}"),
    TextKind("summary", f"Summarise this text in three sentences:\n\n{PASSAGE}", raw=False),
)


def gains(models: Path, seeds: int, pieces: int) -> Iterator[Gain]:
    """What guesses gain, kind by kind."""
    config = override(load_config(models), Overrides(repeat_penalty=1.0))
    return guesses.gains(config, KINDS, seeds=seeds, pieces=pieces)


def counted_as_on_gpu(models: Path, seeds: int, pieces: int) -> Iterator[Gain]:
    """The same with guesses from repeated text as long as on a GPU: evaluations mean something, times do not."""
    with patch.object(asking, "DEAR", CHEAP):
        yield from gains(models, seeds, pieces)


def main() -> int:
    """Print what guesses gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models.toml"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pieces", type=int, default=150)
    parser.add_argument("--as-on-gpu", action="store_true", help="guess as much as on a GPU, to count evaluations")
    arguments = parser.parse_args()
    measure = counted_as_on_gpu if arguments.as_on_gpu else gains
    found = []
    for gain in measure(arguments.models, arguments.seeds, arguments.pieces):
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
