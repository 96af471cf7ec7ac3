"""How one member's distribution is shaped before it is mixed with the others: what users set, and the rules for it.

Biases of logits have several spellings that mean the same: {" the": -1.5, " a": false}, and [[" the", -1.5],
[262, false]], where ids may stand, too. Knows nothing of vocabularies.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from me_local.checks import AtLeast0, Int, Number, Texts, number
from me_local.errors import ConfigError

BAN = -100
"""From here down a bias is a ban, which is what users of OpenAI's protocol mean by it."""
_MOST = 1e6
_MOST_BIASES = 1024


@dataclass(frozen=True, slots=True)
class Bias:
    """`value` is added to the logits of the tokens that are `of` a text, or of one id; minus infinity bans them.

    An id is that of the `member` of this name; None: of all of them, which then have to share one vocabulary.
    """

    of: str | int
    value: float
    member: str | None = None


def _bias(of: object, value: object) -> Bias:
    if isinstance(of, bool) or not isinstance(of, str | int) or of == "" or (isinstance(of, int) and of < 0):
        raise ValueError("must name tokens by a text or by an id")
    if value is False:
        return Bias(of, -math.inf)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= _MOST:
        raise ValueError(f"must give each a number, at most {_MOST:.0f}, or false")
    return Bias(of, -math.inf if value <= BAN else float(value))


def read_biases(raw: Any) -> tuple[Bias, ...]:
    """What some spelling of biases means. Raises ValueError, whose text goes on behind their name."""
    entries = raw.items() if isinstance(raw, Mapping) else raw
    if isinstance(entries, str) or not hasattr(entries, "__iter__"):
        raise ValueError("must be a table of texts and numbers, or a list of pairs")
    entries = list(entries)
    if len(entries) > _MOST_BIASES:
        raise ValueError(f"must have at most {_MOST_BIASES} entries")
    if any(not isinstance(entry, Bias) and not _is_pair(entry) for entry in entries):
        raise ValueError("must be a table of texts and numbers, or a list of pairs")
    return tuple(entry if isinstance(entry, Bias) else _bias(*entry) for entry in entries)


def _is_pair(entry: object) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2


def _no_limit(raw: Any) -> Any:
    """As others have it, -1 is no limit, too."""
    return 0 if type(raw) is int and raw == -1 else raw


Biases = Annotated[tuple[Bias, ...], BeforeValidator(read_biases)]
_TopK = Annotated[Int, Field(ge=0), BeforeValidator(_no_limit)]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one member's distribution is shaped before it is mixed with the others."""

    temperature: AtLeast0 = 1.0  # 0 = argmax
    top_k: _TopK = 10  # 0 = no limit
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    typical_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_n_sigma: Annotated[Number, Field(ge=-1, le=1e6)] = -1.0  # -1 and 0 = off
    xtc_probability: Annotated[Number, Field(ge=0, le=1)] = 0.0
    xtc_threshold: Annotated[Number, Field(ge=0, le=1)] = 0.1
    repeat_penalty: Annotated[Number, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[Number, Field(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-100, le=100)] = 0.0
    repeat_last_n: Annotated[Int, Field(ge=-1)] = 64  # tokens of context; -1 = all of them
    dry_multiplier: Annotated[Number, Field(ge=0, le=1000)] = 0.0  # 0 = off
    dry_base: Annotated[Number, Field(ge=1)] = 1.75
    dry_allowed_length: Annotated[Int, Field(ge=1)] = 2  # tokens
    dry_penalty_last_n: Annotated[Int, Field(ge=-1)] = -1  # as repeat_last_n
    dry_sequence_breakers: Texts = ("\n", ":", '"', "*")
    logit_bias: Biases = ()


def parse_bias(text: str) -> tuple[str, object]:
    """An option's TEXT=NUMBER, or TEXT=false. Raises ConfigError."""
    of, equals, value = text.rpartition("=")
    if not equals or not of:
        raise ConfigError(f'--logit-bias: must look like "TEXT=-1.5" or "TEXT=false", got "{text}"')
    return of, False if value == "false" else number(value)
