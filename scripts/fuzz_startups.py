"""Start a chat with models that are damaged at random: each ends in a reply or in one line that says why not.

    python scripts/fuzz_startups.py --count 500

No start may end by a signal or with a traceback, or take longer than a minute. The first that does is printed with its
number; `--first N --count 1 --keep DIR` makes it again. Prints how many ended in which way.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import damaged_models

LIMIT = 60  # seconds
_COMMAND = (sys.executable, "-c", "from me_local.cli import main; main()", "chat", "--max-tokens", "8", "--seed", "1")
_CONTROLS = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")


def main() -> int:
    """Start as many as are asked for; 1 where one of them did what none may do."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=500, metavar="N", help="how many")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the files in this folder")
    given = parser.parse_args()
    ends: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(given.first, given.first + given.count):
            what, models = damaged_models.damaged(folder, number)
            ended, faults = start(models)
            ends[f"{what.partition(' ')[0]}: {ended}"] += 1
            for fault in faults:
                wrong += 1
                print(f"{number} ({what}): {fault}", flush=True)
    print("\n".join(f"{count:5} {end}" for end, count in sorted(ends.items())))
    return int(wrong > 0)


def start(models: Path) -> tuple[str, list[str]]:
    """How a chat with these models ended, and what it should not have done."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*_COMMAND, "--models", str(models)], input=b"Hello there\n", capture_output=True, timeout=2 * LIMIT
        )
    except subprocess.TimeoutExpired:
        return "hangs", [f"not finished after {2 * LIMIT} s"]
    seconds = time.monotonic() - began
    return ("a reply" if done.returncode == 0 else f"status {done.returncode}"), list(_faults(done, seconds))


def _faults(done: "subprocess.CompletedProcess[bytes]", seconds: float) -> Iterator[str]:
    if done.returncode not in (0, 1, 2):
        yield f"status {done.returncode}: {done.stderr[-500:]!r}"
    if b"Traceback" in done.stderr or b"an error of the program" in done.stderr:
        yield f"a traceback: {done.stderr[-500:]!r}"
    if done.returncode and len(re.findall(rb"^(?:Error|Usage): ", done.stderr, re.MULTILINE)) != 1:
        yield f"not one line that says why: {done.stderr[-500:]!r}"
    if _CONTROLS.search(done.stderr):
        yield f"control characters: {done.stderr[-500:]!r}"
    if seconds > LIMIT:
        yield f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
