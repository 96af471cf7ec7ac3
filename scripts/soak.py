"""Does it stay as it was? A long chat and many replies on tiny models: memory and speed over time.

python scripts/soak.py [--turns 300] [--pieces 100000]

Two parts: the turns of one chat, which fills its context again and again, and completions of short and long texts, by
ME and by CE, the same ones over and over. Prints a table and, as its last line, a JSON object; ends with status 1 when
memory or speed did not stay flat. The members are one of full attention, one with a vocabulary of its own, and one
with checkpoints.

How it tells: everything of a fixed size is filled first (the contexts, llama.cpp's buffers, the words that a
vocabulary remembers), and a tenth of each part is warm-up; the rest falls into three thirds. Memory is what the
process has resident after a collection of garbage: the medians of the thirds, and the largest figure of all, must not
lie more than 5% above the first third. Speed is in pieces per second of the process's own processor time, on one
thread. What else runs on the machine still makes it vary, up to twofold, so it is put in relation to a yardstick, the
speed at that moment of a member that has just been loaded: the medians of the thirds must lie within 10% of the first.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import make_tiny_models
import numpy as np

from me_local import Chat, Ensemble, Overrides, load
from me_local.llama.member import Member

MEMBERS = ("bpe_a", "spm", "hybrid")
# With the three likeliest tokens alone these models hardly ever end a reply.
SETTINGS = "[ensemble]\nseed = 1\n[sampling]\ntop_k = 3\n"
MEMORY, SPEED = 0.05, 0.10  # how far a third may be from the first
ROWS = 10  # of the table, for each part
WORDS = 1 << 14  # as many as a vocabulary remembers
SENTENCE = "The cat sat on the mat. "
ROUND = (1, 10, 20, 40, 60)  # sentences in front of the replies of one round


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn, or one round of replies.

    Its pieces, its processor time in seconds, what was resident after it in bytes, and the yardstick in tokens per
    second.
    """

    pieces: int
    seconds: float
    resident: int
    yardstick: float

    @property
    def speed(self) -> float:
        """Pieces per second of processor time."""
        return self.pieces / self.seconds

    @property
    def relative(self) -> float:
        """Pieces in the time of a token of the yardstick."""
        return self.speed / self.yardstick


@dataclass(frozen=True, slots=True)
class Verdict:
    """Medians of the three thirds after the warm-up; memory and its `peak` in MB, speed in pieces per second."""

    pieces: int
    memory: tuple[float, ...]
    peak: float
    speed: tuple[float, ...]
    relative: tuple[float, ...]

    @property
    def memory_is_flat(self) -> bool:
        """Whether nothing lies more than 5% above the first third."""
        return max(*self.memory, self.peak) <= self.memory[0] * (1 + MEMORY)

    @property
    def speed_is_flat(self) -> bool:
        """Whether the thirds lie within 10% of the first."""
        return all(abs(relative / self.relative[0] - 1) <= SPEED for relative in self.relative)


def open_ensemble(folder: Path) -> Ensemble:
    """Write the tiny models into a folder and load an ensemble of them."""
    paths = make_tiny_models.make_all(folder)
    members = "".join(
        f'[[members]]\nname = "{name}"\npath = "{paths[name]}"\nn_ctx = 2048\nn_threads = 1\n' for name in MEMBERS
    )
    (folder / "models.toml").write_text(SETTINGS + members)
    return load(folder / "models.toml")


def fill(ensemble: Ensemble) -> None:
    """Fill what has a fixed size: words that vocabularies remember, contexts, and llama.cpp's buffers."""
    for member in ensemble.members:
        for word in range(WORDS):
            member.vocabulary.encode(b"%08d" % word)
    text = SENTENCE
    while all(len(m.vocabulary.encode((text + SENTENCE).encode())) < m.n_ctx for m in ensemble.members):
        text += SENTENCE
    ensemble.generate(text, Overrides(strategy="ce"), raw=True)


def chat_samples(ensemble: Ensemble, turns: int) -> Iterator[Sample]:
    """A sample for each turn of one chat."""
    chat = Chat(ensemble)
    chat.set(Overrides(max_tokens=100))
    for turn in range(turns):
        text = f"Turn {turn:03}: the cat sat on the mat, and the dog?"
        yield _measured(ensemble, lambda text=text: len(chat.say(text).finish().steps))


def reply_samples(ensemble: Ensemble, pieces: int) -> Iterator[Sample]:
    """A sample for each round of the same replies, until they have so many pieces."""
    while pieces > 0:
        sample = _measured(ensemble, lambda: _round(ensemble))
        pieces -= sample.pieces
        yield sample


def judge(samples: list[Sample]) -> Verdict:
    """What the samples of one part say; there must be at least four."""
    warm = samples[-(-len(samples) // 10) :]
    third = len(warm) // 3
    thirds = [warm[:third], warm[third : 2 * third], warm[2 * third :]]
    return Verdict(
        pieces=sum(s.pieces for s in samples),
        memory=tuple(median(s.resident for s in part) / 1e6 for part in thirds),
        peak=max(s.resident for s in warm) / 1e6,
        speed=tuple(median(s.speed for s in part) for part in thirds),
        relative=tuple(median(s.relative for s in part) for part in thirds),
    )


def _round(ensemble: Ensemble) -> int:
    """Complete the texts of a round by ME and by CE, and return the number of pieces."""
    replies = [
        ensemble.generate(SENTENCE * count, Overrides(seed=count, strategy=strategy), raw=True)
        for count in ROUND
        for strategy in ("me", "ce")
    ]
    return sum(len(reply.steps) for reply in replies)


def _measured(ensemble: Ensemble, work: Callable[[], int]) -> Sample:
    before = _yardstick(ensemble)
    seconds, pieces = _timed(work)
    yardstick = (before + _yardstick(ensemble)) / 2
    gc.collect()
    return Sample(pieces, seconds, _resident(), 1 / yardstick)


def _timed(work: Callable[[], int]) -> tuple[float, int]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _yardstick(ensemble: Ensemble) -> float:
    """Processor seconds that a member takes for a token when it has just been loaded."""
    ids = np.arange(100, 300, dtype=np.int32)
    with Member(ensemble.members[0].config, ensemble.members[0].weights) as member:
        seconds, tokens = _timed(lambda: sum(member.sync(ids[:end]).tokens for end in range(1, len(ids) + 1)))
    return seconds / tokens


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _show(part: str, samples: list[Sample]) -> Verdict:
    """Print a part's rows, each the medians of a tenth of it."""
    done, size = 0, -(-len(samples) // ROWS)
    for start in range(0, len(samples), size):
        rows = samples[start : start + size]
        done += sum(s.pieces for s in rows)
        memory, speed = median(s.resident for s in rows) / 1e6, median(s.speed for s in rows)
        relative = median(s.relative for s in rows)
        print(f"{part:<8} {start + len(rows):>7,} {done:>9,} {memory:>11.1f} {speed:>9.0f} {relative:>9.3f}")
    return judge(samples)


def main() -> None:
    """Run both parts and say whether memory and speed stayed flat."""
    parser = argparse.ArgumentParser(description="A long run on tiny models: do memory and speed stay flat?")
    parser.add_argument("--turns", type=int, default=300, help="turns of the chat")
    parser.add_argument("--pieces", type=int, default=100_000, help="pieces of the replies")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_ensemble(Path(folder)) as ensemble:
        fill(ensemble)
        print(f"{'part':<8} {'samples':>7} {'pieces':>9} {'resident MB':>11} {'pieces/s':>9} {'relative':>9}")
        verdicts = {
            "chat": _show("chat", list(chat_samples(ensemble, options.turns))),
            "replies": _show("replies", list(reply_samples(ensemble, options.pieces))),
        }
    flat = all(v.memory_is_flat and v.speed_is_flat for v in verdicts.values())
    report = {
        part: {
            "pieces": v.pieces,
            "memory_mb": [round(m, 1) for m in v.memory],
            "peak_mb": round(v.peak, 1),
            "pieces_per_second": [round(s) for s in v.speed],
            "relative_speed": [round(r, 3) for r in v.relative],
            "memory_flat": v.memory_is_flat,
            "speed_flat": v.speed_is_flat,
        }
        for part, v in verdicts.items()
    }
    print(json.dumps({**report, "flat": flat}))
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
