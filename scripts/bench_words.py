"""Compare replies whose members are drawn for each piece and for each word: what words cost, and what they gain.

Prompts are questions out of JSON Lines files of `--data` (any files whose lines have a "question"), evenly from all of
them: every other one is answered in a chat, of the others the first half is completed. For both units the replies to
the same prompts are measured by

    bits per byte   under each member, its whole distribution at temperature 1 after its own prompt; END left out
    repeated        share of 4-grams of words that the reply had before
    unknown         share of words of three letters or more that are in no text of `--data`: misspelt or invented
    calls/piece     predictions that were made, for each piece that was kept

Figures are ratios of sums over all replies, with the standard errors of a jackknife over prompts; so are those of the
differences, which are paired. Bits per byte are low where a reply repeats itself, which is why the other two are there.
The last line is JSON.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import me_local
from me_local.arrays import IntArray
from me_local.asking import make_request
from me_local.config import Unit
from me_local.decoding.generation import Generation
from me_local.ensemble import Ensemble
from me_local.llama.member import Member
from me_local.text.unified import END

LETTERS = re.compile(r"[a-z]+")
UNITS: tuple[Unit, ...] = ("token", "word")
Sums = dict[str, tuple[float, float]]  # of one reply: numerator and denominator of each figure


def read_prompts(files: list[Path], count: int) -> list[str]:
    """Take ``count`` questions, in turn from all files and spread over each."""
    share = -(-count // len(files))
    columns = []
    for file in files:
        rows = [json.loads(line)["question"] for line in file.read_text().splitlines()]
        columns.append(rows[:: max(1, len(rows) // share)][:share])
    return [question for row in zip(*columns, strict=True) for question in row][:count]


def read_words(folder: Path) -> set[str]:
    """All words of all texts in a folder, in small letters."""
    files = [*folder.glob("*.jsonl"), *folder.glob("*.txt")]
    return {word for file in files for word in LETTERS.findall(file.read_text().lower())}


@dataclass(frozen=True, slots=True)
class Written:
    """A reply, the number of its pieces, the text in front of it, and the seconds that the pieces took."""

    running: Generation
    pieces: int
    head: bytes
    seconds: float


def write(ensemble: Ensemble, unit: Unit, number: int, prompt: str, most: int) -> Written:
    """Write one reply of at most so many pieces."""
    config = me_local.config.override(ensemble.config, me_local.Overrides(unit=unit, seed=number, strategy="me"))
    if number % 2:
        words = prompt.split()
        prompts = ensemble.prompter.raw_prompts(" ".join(words[: (len(words) + 1) // 2]), config)
    else:
        prompts = ensemble.prompter.prompts([me_local.Message("user", prompt)], config)
    running = Generation(ensemble.engine, make_request(config, prompts), lambda: False)
    started, pieces = time.perf_counter(), 0
    while pieces < most and (draw := running.step()) is not None and draw.number != END:
        pieces += 1
    seconds = time.perf_counter() - started - sum(work.prompt_seconds for work in running.work)
    return Written(running, pieces, prompts.head, seconds)


def bits(member: Member, ids: IntArray, given: int) -> float:
    """The bits that a member needs for the ids behind the first ``given``."""
    total = 0.0
    for length in range(given, len(ids)):
        member.sync(ids[:length])
        logits = member.logits().astype(np.float64)
        top = logits.max()
        total += float(top + np.log(np.exp(logits - top).sum()) - logits[ids[length]]) / np.log(2)
    return total


def measure(ensemble: Ensemble, written: Written, words: set[str]) -> Sums:
    """The figures of one reply, as numerators and denominators."""
    running, pieces = written.running, written.pieces
    reply = running.text[len(written.head) :]
    sums: Sums = {}
    each = [bits(member, running.ids(i), running.given[i]) for i, member in enumerate(ensemble.members)]
    for member, value in zip(ensemble.members, each, strict=True):
        sums[f"bits per byte, {member.name}"] = value, len(reply)
    sums["bits per byte, mean"] = sum(each) / len(each), len(reply)
    text = reply.decode(errors="ignore").lower().rpartition(" ")[0]  # the last word may be cut off
    grams = list(zip(*(text.split()[i:] for i in range(4)), strict=False))
    sums["repeated 4-grams, %"] = 100.0 * (len(grams) - len(set(grams))), len(grams)
    known = [word in words for word in LETTERS.findall(text) if len(word) >= 3]
    sums["unknown words, %"] = 100.0 * known.count(False), len(known)
    sums["calls per piece"] = sum(work.calls for work in running.work), pieces
    sums["bytes per piece"] = len(reply), pieces
    sums["pieces per second"] = pieces, written.seconds
    return sums


def ratios(numerators: np.ndarray, denominators: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ratio of sums, and those that leave one prompt out each."""
    whole = numerators.sum() / denominators.sum()
    without = (numerators.sum() - numerators) / (denominators.sum() - denominators)
    return whole, without


def error(without: np.ndarray) -> float:
    """The standard error of a jackknife."""
    return float(np.sqrt((len(without) - 1) * without.var()))


def compare(found: dict[Unit, list[Sums]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each figure of both units and their difference, with standard errors."""
    for name in found["token"][0]:
        row: dict[str, float] = {}
        left_out = []
        for unit in UNITS:
            whole, without = ratios(*np.array([sums[name] for sums in found[unit]]).T)
            row[unit], row[f"{unit} se"] = float(whole), error(without)
            left_out.append(without)
        row["difference"] = row["word"] - row["token"]
        row["difference se"] = error(left_out[1] - left_out[0])
        yield name, row


def show(console: Console, title: str, found: dict[Unit, list[Sums]]) -> dict[str, dict[str, float]]:
    """Print the table of some replies; give its rows."""
    rows = dict(compare(found))
    table = Table("", "by tokens", "by words", "difference", title=title)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.3f} ± {row[key + ' se']:.3f}" for key in ("token", "word", "difference")))
    console.print(table)
    return rows


def main() -> None:
    """Write the replies, measure them, and print a table for each kind of prompt."""
    parser = argparse.ArgumentParser(description="Compare replies by tokens and by words.")
    parser.add_argument("--models", type=Path, default=Path("models.toml"))
    parser.add_argument("--data", type=Path, required=True, help="a folder of texts, from which the word list is made")
    parser.add_argument("--questions", nargs="+", required=True, help="files there, whose questions are the prompts")
    parser.add_argument("--count", type=int, default=100, help="prompts")
    parser.add_argument("--pieces", type=int, default=60, help="the length of a reply")
    given = parser.parse_args()
    prompts = read_prompts([given.data / name for name in given.questions], given.count)
    words, console = read_words(given.data), Console()
    found: dict[Unit, list[Sums]] = {"token": [], "word": []}
    with me_local.load(given.models) as ensemble:
        for number, prompt in track(list(enumerate(prompts)), "replies", console=Console(stderr=True)):
            for unit in UNITS:
                written = write(ensemble, unit, number, prompt, given.pieces)
                found[unit].append(measure(ensemble, written, words))
    chat: dict[Unit, list[Sums]] = {unit: found[unit][::2] for unit in UNITS}
    raw: dict[Unit, list[Sums]] = {unit: found[unit][1::2] for unit in UNITS}
    tables = {title: show(console, title, part) for title, part in (("all", found), ("chat", chat), ("raw", raw))}
    print(json.dumps(tables))


if __name__ == "__main__":
    main()
