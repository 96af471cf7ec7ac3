"""How often replies loop at a low temperature, and what it costs on held-out text to keep them from it.

Answers twenty prompts with each of several settings of models.toml's [sampling], and prints a table. A reply **loops**
where a phrase of any length follows itself at least twice, over 60 characters in all (so does one of 20 characters that
comes three times in a row), or where half of its word 4-grams or more have come before in it. White space counts once,
and in a phrase with a letter in it all numbers are alike: "1. I am here. 2. I am here. 3. …" loops.
`--text` adds bits per byte, as `me-local score` finds them (temperature 1, no truncation, mixed by words), but of what
penalties and DRY make of each member's logits:

    python scripts/measure_loops.py --given repeat_penalty=1.1 --given dry_multiplier=0.8,dry_allowed_length=4

The first row is without any of them, the second has what models.toml says.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import me_local
from me_local.arrays import IntArray, LogitArray
from me_local.checks import parsed
from me_local.config import Config, load_config
from me_local.decoding.likelihoods import bits, mixed
from me_local.ensemble import Ensemble
from me_local.evaluation.corpus import read_blocks
from me_local.evaluation.fitting import score_blocks
from me_local.llama.member import Member
from me_local.sampling import Sampling

PROMPTS = (
    "What is 17 times 3?",
    "What is the capital of France?",
    "Give me three tips for sleeping better.",
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue.",
    "List ten animals that live in the sea.",
    "How do I boil an egg?",
    "Write a poem about autumn.",
    "What is the difference between a virus and a bacterium?",
    "Summarise the plot of Romeo and Juliet.",
    "Write a Python function that reverses a string.",
    "A train goes 60 miles in 45 minutes. How fast is it?",
    "Who was Marie Curie?",
    "Plan a weekend in London.",
    "Translate 'Good morning, my friend' into French, Spanish and German.",
    "What are the advantages of electric cars?",
    "Write an email to my landlord about a broken heater.",
    "Count from one to twenty in words.",
    "Why do cats purr?",
    "Tell me something about the history of bread.",
)
_PHRASE = re.compile(r"(?=(.+?)\1{2,})")
_LETTER = re.compile(r"[^\W\d_]")
_OVER = 60  # characters
_SHARE = 0.5
_OFF = {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "dry_multiplier": 0.0}
_PENALTIES = (*_OFF, "repeat_last_n", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers")


@dataclass(frozen=True, slots=True)
class Found:
    """Of one setting: the replies, how many of them loop, and the mean share of word 4-grams that came before."""

    replies: tuple[str, ...]
    loops: int
    share: float


def repeated_share(text: str) -> float:
    """The share of a text's word 4-grams that have come before in it."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_loop(text: str) -> bool:
    """Whether a text loops; the module says what that means."""
    flat = " ".join([*text.split(), ""])  # the last phrase ends as the others do
    alike = re.sub(r"\d+", "0", flat)
    return repeated_share(flat) >= _SHARE or any(_runs(flat)) or any(map(_LETTER.search, _runs(alike)))


def _runs(text: str) -> list[str]:
    """The phrases that follow themselves for long enough."""
    return [match[1] for match in _PHRASE.finditer(text) if _run(text, match) >= _OVER]


def _run(text: str, match: "re.Match[str]") -> int:
    """For how many characters a phrase goes on repeating itself."""
    period, start = len(match[1]), match.start()
    end = start + period
    while end < len(text) and text[end] == text[end - period]:
        end += 1
    return end - start


def answered(ensemble: Ensemble, pieces: int, temperature: float, seeds: int) -> Found:
    """The replies to all prompts, each with so many seeds."""
    overrides = partial(me_local.Overrides, temperature=temperature, max_tokens=pieces)
    finished = [done for seed in range(seeds) for done in ensemble.generate_many(PROMPTS, overrides(seed=1000 * seed))]
    texts = tuple(done.reply.text if done.reply else str(done.error) for done in finished)
    return Found(texts, sum(map(is_loop, texts)), float(np.mean([*map(repeated_share, texts)])))


@contextmanager
def penalised(ensemble: Ensemble) -> Iterator[None]:
    """Members' logits have their penalties while a text is scored."""
    shapers = {
        member.name: ensemble.engine.shaper(i, member.sampling, 0) for i, member in enumerate(ensemble.config.members)
    }
    plain = Member.each_logits

    def each_logits(member: Member, ids: IntArray, start: int) -> Iterator[LogitArray]:
        for end, row in enumerate(plain(member, ids, start), start + 1):
            yield shapers[member.name].shape(row, lambda end=end: ids[:end], end - start)  # type: ignore[misc]

    with patch.object(Member, "each_logits", each_logits):
        yield


def bits_per_byte(ensemble: Ensemble, text: Path) -> float:
    """Of the ensemble on a text, under each member's penalties."""
    blocks = read_blocks(text, raw=False, room=min(member.n_ctx for member in ensemble.members))
    with penalised(ensemble):
        scores = score_blocks(ensemble, blocks, lambda: None)
    weights = np.array([[member.weight] for member in ensemble.config.members])
    total = sum(mixed(part.log_probabilities, weights).sum() for part in scores)
    return bits(float(total)) / sum(part.size for part in scores)


def with_penalties(config: Config, given: Mapping[str, Any]) -> Config:
    """A configuration with these penalties and no others."""
    plain = {field.name: field.default for field in fields(Sampling) if field.name in _PENALTIES}
    members = tuple(
        replace(member, sampling=replace(member.sampling, **{**plain, **given})) for member in config.members
    )
    return replace(config, members=members)


def read_given(text: str) -> dict[str, Any]:
    """Settings such as "repeat_penalty=1.1,dry_allowed_length=4"; values as JSON."""
    pairs = (part.partition("=") for part in text.split(",") if part)
    return {key: tuple(value) if isinstance(value := parsed(raw), list) else value for key, _, raw in pairs}


def said(given: Mapping[str, Any]) -> str:
    """Settings in words."""
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in given.items()) or "none"


def rows(config: Config, wanted: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Config]]:
    """The settings to compare, by name: none, those of the file, and those that are asked for."""
    yield "none", with_penalties(config, {})
    own = {key: getattr(config.members[0].sampling, key) for key in _PENALTIES}
    if any(own[key] != off for key, off in _OFF.items()):
        yield "models.toml", config
    for given in wanted:
        yield said(given), with_penalties(config, given)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models.toml"))
    parser.add_argument("--given", action="append", default=[], type=read_given, metavar="KEY=VALUE,…")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--pieces", type=int, default=200, help="in a reply, at most")
    parser.add_argument("--seeds", type=int, default=1, help="replies to each prompt; 0: none")
    parser.add_argument("--batch", type=int, default=10, help="replies at once; 1: each with a route of its own")
    parser.add_argument("--text", action="append", default=[], type=Path, help="to score; may be given several times")
    parser.add_argument("--output", type=Path, help="replies as JSON Lines")
    given = parser.parse_args()
    print("| penalties | replies that loop | repeated 4-grams, % |", *(f"{text.stem} |" for text in given.text))
    print("|---" * (3 + len(given.text)) + "|")
    for name, config in rows(load_config(given.models), given.given):
        with Ensemble(config, batch=given.batch) as ensemble:
            found = answered(ensemble, given.pieces, given.temperature, given.seeds) if given.seeds else None
        with Ensemble(config) as ensemble:
            rates = [f"{bits_per_byte(ensemble, text):.4f} |" for text in given.text]
        cells = f"{found.loops} of {len(found.replies)} | {100 * found.share:.1f}" if found else "| "
        print(f"| {name} | {cells} |", *rates, flush=True)
        if given.output and found:
            with given.output.open("a") as file:
                file.writelines(json.dumps({"penalties": name, "reply": text}) + "\n" for text in found.replies)


if __name__ == "__main__":
    main()
