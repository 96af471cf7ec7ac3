"""What a schema's forced bytes gain: bytes/s of a reply in JSON to those of a reply in free text.

    python scripts/bench_structured.py [--models models.toml] [--seeds 6]

The schema is one as people have it who read data out of letters: long keys, texts, numbers, enumerations. Both replies
are conversations with the same ensemble and its settings, written in turn, a few pieces of each, prompts left out. The
last line is the same as JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from me_local.config import Constraint, Overrides, load_config
from me_local.decoding.reply import Reply
from me_local.ensemble import Ensemble
from me_local.llama.weights import Shelf
from me_local.measuring.turns import generation_seconds, write_in_turn

PIECES = 32  # of the free text: about as many as the record takes
LETTER = (
    "Dear Sir or Madam, on 3 March I ordered two oak bookshelves from your shop in Leeds, under the name of Harriet "
    "Blackwood. One of them arrived with a cracked side panel. I paid 348 pounds by bank transfer. I would like to "
    "have the damaged one replaced before the end of the month, please. You reach me best by telephone in the evening."
)
ASKED = f"Read this letter and write down its data as JSON.\n\n{LETTER}"
FREE = "Write a short story about a lighthouse keeper who finds a letter in a bottle."
TEXT = {"type": "string", "maxLength": 40}
PROPERTIES: dict[str, dict[str, Any]] = {
    "customer_full_name": TEXT,
    "product_description": TEXT,
    "number_of_items_ordered": {"type": "integer", "minimum": 1, "maximum": 99},
    "total_amount_in_pounds": {"type": "integer", "minimum": 0, "maximum": 99999},
    "payment_method": {"enum": ["credit_card", "bank_transfer", "direct_debit", "cash_on_delivery"]},
    "requested_resolution": {"enum": ["replacement", "refund", "repair", "no_action_requested"]},
    "preferred_contact_channel": {"enum": ["email", "telephone", "letter"]},
    "requires_immediate_attention": {"type": "boolean"},
}
SCHEMA = {
    "type": "object",
    "properties": PROPERTIES,
    "required": list(PROPERTIES),
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Forced:
    """Bytes per second in JSON and in free text, medians over the seeds, as is their ratio; the share of the JSON that
    was forced, and predictions for each byte of both.
    """

    json_bytes: float
    free_bytes: float
    speed_up: float
    forced: float
    json_predictions: float
    free_predictions: float


def forced(models: Path, seeds: int) -> Forced:
    """What forced bytes gain under the settings of a models.toml."""
    config, constraint = load_config(models), Constraint("json_schema", json.dumps(SCHEMA))
    with ExitStack() as stack:
        shelf = stack.enter_context(closing(Shelf()))
        first, second = (stack.enter_context(Ensemble(config, shelf=shelf)) for _ in range(2))
        pairs = [
            write_in_turn(
                [
                    first.stream(ASKED, Overrides(seed=seed, max_tokens=200, constraint=constraint)),
                    second.stream(FREE, Overrides(seed=seed, max_tokens=PIECES)),
                ]
            )
            for seed in range(seeds)
        ]
    replies, texts = ([pair[i] for pair in pairs] for i in range(2))
    speeds = [[_length([reply]) / generation_seconds([reply]) for reply in each] for each in (replies, texts)]
    forced_bytes = sum(len(step.piece) for reply in replies for step in reply.steps if step.forced)
    return Forced(
        json_bytes=median(speeds[0]),
        free_bytes=median(speeds[1]),
        speed_up=median(of_json / of_text for of_json, of_text in zip(*speeds, strict=True)),
        forced=forced_bytes / _length(replies),
        json_predictions=_predictions(replies) / _length(replies),
        free_predictions=_predictions(texts) / _length(texts),
    )


def _length(replies: Sequence[Reply]) -> int:
    return sum(len(step.piece) for reply in replies for step in reply.steps)


def _predictions(replies: Sequence[Reply]) -> int:
    return sum(usage.calls + usage.guessed for reply in replies for usage in reply.usage)


def main() -> int:
    """Print what forced bytes gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models.toml"))
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    found = forced(arguments.models, arguments.seeds)
    print(
        f"JSON {found.json_bytes:.0f} bytes/s, free text {found.free_bytes:.0f}: {found.speed_up:.2f} times; "
        f"{found.forced:.0%} of the JSON forced; predictions a byte {found.json_predictions:.3f} and "
        f"{found.free_predictions:.3f}"
    )
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
