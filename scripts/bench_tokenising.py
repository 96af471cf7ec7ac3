"""Measure what it costs to keep the ids of a growing text up to date, on the real vocabularies.

Near each length the text grows by the tokens of the vocabulary, one at a time, and `TokenizedText.ids` is timed for
each: the median in µs. Three texts: English prose, out of the manual that comes with Python; Cyrillic words at random;
and Chinese characters at random, with a comma after every twelve. The memory of words is empty when a measurement
starts, so that the lengths compare; in a reply words come back, and cost less. The last line is JSON.
"""

import argparse
import json
import random
import re
import statistics
import time
from pydoc_data.topics import topics

from real_vocabularies import NAMES, open_model
from rich.console import Console
from rich.table import Table

from me_local.text.growing import TokenizedText
from me_local.text.vocabulary import Vocabulary

LENGTHS = (100, 1_000, 10_000)  # bytes
NEAR = 200  # bytes on either side of a length


def prose() -> bytes:
    """Paragraphs of English without code and lists, on one line each."""
    paragraphs = [p for topic in sorted(topics) for p in topics[topic].split("\n\n")]
    plain = (p.replace("\n", " ") for p in paragraphs if re.match(r"[A-Z][a-z]+ [^*\n]{40}", p) and "  " not in p)
    return "\n\n".join(plain).encode()


def cyrillic() -> bytes:
    """Words of one to ten letters."""
    source, letters = random.Random(1), [chr(code) for code in range(0x430, 0x450)]
    return " ".join("".join(source.choices(letters, k=source.randint(1, 10))) for _ in range(2_000)).encode()


def chinese() -> bytes:
    """Common Chinese characters, without spaces."""
    source, common = random.Random(1), [chr(code) for code in range(0x4E00, 0x5E00)]
    return "\uff0c".join("".join(source.choices(common, k=12)) for _ in range(400)).encode()


def cost(vocabulary: Vocabulary, text: bytes, length: int) -> float:
    """Give the median time of a piece near `length` bytes, in µs."""
    growing = TokenizedText(vocabulary, at_start=True)
    start, times = max(0, length - NEAR), []
    growing.ids(text[:start])
    end = start
    for token in vocabulary.encode(text[start : length + NEAR]):
        end += len(vocabulary.pieces[token])
        grown = text[:end]
        began = time.perf_counter()
        growing.ids(grown)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def main() -> None:
    """Measure every vocabulary, print a table and its JSON."""
    argparse.ArgumentParser(description="Measure the cost of tokenising a growing text, per piece.").parse_args()
    texts = {"prose": prose(), "Cyrillic": cyrillic(), "Chinese": chinese()}
    table = Table("vocabulary", *(f"{kind}, {length:,}" for kind in texts for length in LENGTHS))
    results: dict[str, dict[str, list[float]]] = {}
    for name in NAMES:
        results[name] = {
            kind: [round(cost(Vocabulary(open_model(name)), text, length), 1) for length in LENGTHS]
            for kind, text in texts.items()
        }
        table.add_row(name, *(f"{micros:,.1f}" for costs in results[name].values() for micros in costs))
    Console(width=120).print(table)
    print(json.dumps({"unit": "us per piece", "lengths": LENGTHS, "medians": results}))


if __name__ == "__main__":
    main()
