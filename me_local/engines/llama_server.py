"""llama-server, by its own protocol (tools/server in llama.cpp's source).

Its slots are places: each keeps the cache of the context that it saw last.
"""

from collections.abc import Sequence
from typing import Any

from me_local.engines.connection import Connection, Interrupted
from me_local.engines.server import (
    Description,
    Prediction,
    checked_count,
    checked_ids,
    checked_object,
    checked_shortlist,
)
from me_local.errors import RunError


class LlamaServer:
    """A llama-server; without `caches` it evaluates each prompt whole."""

    def __init__(self, connection: Connection, *, caches: bool = True) -> None:
        self._connection = connection
        self._caches = caches

    def describe(self) -> Description:
        """From /props: n_ctx is that of one slot, and of a full one it makes no prediction."""
        props, _ = self._connection.ask("/props")
        where = self._connection.where
        settings = checked_object(props.get("default_generation_settings"), where, "/props")
        n_ctx, slots = (
            checked_count(settings.get("n_ctx"), where, "/props"),
            checked_count(props.get("total_slots"), where, "/props"),
        )
        return Description(str(props.get("model_path") or props.get("model_alias") or ""), n_ctx - 1, slots)

    def tokenize(self, text: str) -> list[int]:
        """From /tokenize."""
        body = {"content": text, "add_special": False, "parse_special": False}
        answer, _ = self._connection.ask("/tokenize", body)
        return checked_ids(answer.get("tokens"), self._connection.where, "/tokenize")

    def predict(self, ids: Sequence[int], count: int, place: int, interrupted: Interrupted | None) -> Prediction:
        """From /completion; one token is sampled, too, of which nothing is used."""
        body = {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": count,
            "cache_prompt": self._caches,
            "id_slot": place,
            "temperature": 1.0,
            "samplers": [],
            "response_fields": ["completion_probabilities", "timings"],
        }
        answer, fresh = self._connection.ask("/completion", body, interrupted=interrupted)
        where = self._connection.where
        timings = checked_object(answer.get("timings", {}), where, "/completion")
        spent: list[Any] = [timings.get(key) for key in ("prompt_ms", "predicted_ms")]
        seconds = sum(spent) / 1e3 if all(isinstance(ms, int | float) for ms in spent) else None
        evaluated = timings.get("prompt_n")
        tokens = evaluated if isinstance(evaluated, int) and 0 <= evaluated <= len(ids) else len(ids)
        rows = answer.get("completion_probabilities")
        if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
            raise RunError(f"{where}: /completion gives no probabilities: is the engine a llama-server?")
        pairs = [
            (checked_object(entry, where, "/completion").get("id"), entry.get("logprob"))
            for entry in rows[0].get("top_logprobs") or ()
        ]
        return Prediction(checked_shortlist(pairs, count, where, "/completion"), tokens, seconds, fresh)
