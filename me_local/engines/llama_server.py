"""llama-server, by its own protocol (tools/server in llama.cpp's source).

Its slots are places: each keeps the cache of the context that it saw last.
"""

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from me_local.engines.connection import Connection, Interrupted, plain
from me_local.engines.server import (
    Description,
    Prediction,
    checked_count,
    checked_ids,
    checked_object,
    checked_seconds,
    checked_shortlist,
)
from me_local.errors import RunError

_ALWAYS: dict[str, Any] = {
    "n_predict": 1,
    "n_cache_reuse": 0,  # which would take keys and values from behind other tokens
    "post_sampling_probs": False,
    "response_fields": ["completion_probabilities", "timings", "model"],
    # Of what is sampled there nothing is used. But it comes with no probabilities at all where it is a part of a
    # character, or what the server was told to stop at (`process_token`). So it is always the same token.
    "samplers": ["top_k"],
    "top_k": 1,
    "mirostat": 0,
    "stop": ["\x00 nothing that a token begins with"],
}
_SURELY = 1e9  # is added to its logit, behind the probabilities that are reported


class LlamaServer:
    """A llama-server, and the model of this name in it, where it is a router of several.

    `harmless` is an id whose piece is whole characters.
    """

    def __init__(self, connection: Connection, model: str | None = None, *, harmless: int = 0) -> None:
        self._connection = connection
        self._named = {} if model is None else {"model": model}
        self._props = "/props" if model is None else f"/props?model={quote(model, safe='')}"
        self._always = _ALWAYS | self._named | {"logit_bias": [[harmless, _SURELY]]}
        self._caches = True

    def describe(self, interrupted: Interrupted | None = None) -> Description:
        """From /props: its n_ctx is that of one slot, of which it leaves the last to what it samples."""
        props, _ = self._connection.ask(self._props, interrupted=interrupted)
        where = self._connection.where
        if props.get("role") == "router":
            raise RunError(f"{where}: has several models: name one by model")
        settings = checked_object(props.get("default_generation_settings"), where, "/props")
        n_ctx = checked_count(settings.get("n_ctx"), where, "/props") - 1
        slots = checked_count(props.get("total_slots"), where, "/props")
        return Description(plain(str(props.get("model_path") or props.get("model_alias") or "")), n_ctx, slots)

    def tokenize(self, text: str, interrupted: Interrupted | None = None) -> list[int]:
        """From /tokenize."""
        body = self._named | {"content": text, "add_special": False, "parse_special": False}
        answer, _ = self._connection.ask("/tokenize", body, interrupted=interrupted)
        return checked_ids(answer.get("tokens"), self._connection.where, "/tokenize")

    def forget(self) -> None:
        """The next prompt is evaluated whole, which empties the cache of its slot before."""
        self._caches = False

    def predict(self, ids: Sequence[int], count: int, place: int, interrupted: Interrupted | None) -> Prediction:
        """From /completion."""
        body = self._always | {"prompt": ids, "n_probs": count, "id_slot": place, "cache_prompt": self._caches}
        began = time.monotonic()
        answer, opened = self._connection.ask("/completion", body, interrupted=interrupted)
        took, self._caches = time.monotonic() - began, True
        where = self._connection.where
        timings = checked_object(answer.get("timings", {}), where, "/completion")
        seconds = checked_seconds([timings.get("prompt_ms"), timings.get("predicted_ms")], took)
        evaluated = timings.get("prompt_n")
        tokens = evaluated if isinstance(evaluated, int) and 0 <= evaluated <= len(ids) else len(ids)
        rows = answer.get("completion_probabilities")
        tops = rows[0].get("top_logprobs") if isinstance(rows, list) and rows and isinstance(rows[0], dict) else None
        if not isinstance(tops, list):
            raise RunError(f"{where}: /completion gives no probabilities: is the engine a llama-server?")
        entries = [checked_object(entry, where, "/completion") for entry in tops]
        pairs = [(entry.get("id"), entry.get("logprob")) for entry in entries]
        shortlist = checked_shortlist(pairs, count, where, "/completion")
        return Prediction(shortlist, tokens, seconds, str(answer.get("model")), opened)
