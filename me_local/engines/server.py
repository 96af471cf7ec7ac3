"""What an engine is asked, and how its answers are checked: each way to speak to one is a module beside this.

All take the ids of a whole context and give the log-probabilities of the likeliest next ids, over the whole vocabulary
and before any sampling; what they have evaluated of it before is in their prefix cache. Everything that comes back is
checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from me_local.arrays import IntArray
from me_local.engines.connection import Interrupted
from me_local.errors import RunError
from me_local.model import Shortlist

Engine = Literal["llama-server", "vllm"]

_LEAST = -1e30  # llama-server writes the lowest number of 32 bits for a probability of 0


@dataclass(frozen=True, slots=True)
class Description:
    """What an engine says of itself: its `model`, and how many contexts it has at once.

    After `n_ctx` tokens it predicts another, and refuses a longer context.
    """

    model: str
    n_ctx: int
    places: int


class Prediction(NamedTuple):
    """The largest log-probabilities after some ids, `tokens` that were evaluated for it, and the engine's own seconds.

    `seconds` is None where it does not say; `model` is what it calls the model. The connection that the answer came by
    was `opened` at this time of `time.monotonic`.
    """

    shortlist: Shortlist
    tokens: int
    seconds: float | None
    model: str
    opened: float


class Server(Protocol):
    """One way to speak to an engine. All methods raise what `Connection.ask` raises."""

    def describe(self, interrupted: Interrupted | None = None) -> Description:
        """Who it is."""

    def tokenize(self, text: str, interrupted: Interrupted | None = None) -> list[int]:
        """The ids of a text in which nothing becomes a control token."""

    def forget(self) -> None:
        """Have the next prediction find nothing in any cache, and those after it nothing from before."""

    def predict(self, ids: Sequence[int], count: int, place: int, interrupted: Interrupted | None) -> Prediction:
        """The `count` largest log-probabilities after `ids`, which go into the cache of a place."""


def checked_shortlist(pairs: Sequence[tuple[Any, Any]], count: int, where: str, path: str) -> Shortlist:
    """Pairs of an id and a log-probability, checked, the `count` largest; less those of no probability at all.

    Raises RunError.
    """
    found: dict[int, float] = {}
    for id_, value in pairs:
        if not isinstance(id_, int) or isinstance(id_, bool) or id_ < 0 or id_ >= 1 << 31:
            raise RunError(f"{where}: {path} gives something that is not an id")
        if not isinstance(value, int | float) or isinstance(value, bool) or not value <= 1e-3:
            raise RunError(f"{where}: {path} gives NaN, or a number that is no log-probability")
        found[id_] = float(max(value, 2 * _LEAST))  # an integer may be too large for a float
    if len(found) < count:
        raise RunError(
            f"{where}: {path} gives {len(found)} log-probabilities where {count} were asked for: raise its limit "
            "(vLLM: --max-logprobs), or lower top_k"
        )
    likeliest = sorted(found, key=lambda id_: (-found[id_], id_))[:count]
    ids: IntArray = np.array(sorted(id_ for id_ in likeliest if found[id_] > _LEAST), dtype=np.int32)
    return Shortlist(ids, np.array([found[id_] for id_ in ids.tolist()], dtype=np.float32))


def checked_object(value: Any, where: str, path: str) -> dict[str, Any]:
    """The object; raises RunError where it is none."""
    if not isinstance(value, dict):
        raise RunError(f"{where}: {path} gives something else than this engine does")
    return value


def checked_count(value: Any, where: str, path: str) -> int:
    """The number of tokens, or of contexts; raises RunError where it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise RunError(f"{where}: {path} does not say how large a context is")
    return value


def checked_ids(value: Any, where: str, path: str) -> list[int]:
    """The ids; raises RunError where it is no list of them."""
    if not isinstance(value, list) or not all(isinstance(id_, int) for id_ in value):
        raise RunError(f"{where}: {path} gives no list of ids")
    return value


def checked_seconds(values: Sequence[Any], most: float) -> float | None:
    """The sum of times in milliseconds; None where some are none, or they make more than so many seconds."""
    if not all(isinstance(value, int | float) and 0 <= value <= most * 1e3 for value in values):
        return None
    seconds: float = sum(values) / 1e3
    return seconds if seconds <= most else None
