"""vLLM, by OpenAI's completions with ids as the prompt (vllm/entrypoints/openai in its source).

It has no slots: whatever begins like a context that it saw is found in its prefix cache, by blocks.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from me_local.engines.connection import Connection, Interrupted, plain
from me_local.engines.server import (
    Description,
    Prediction,
    checked_count,
    checked_ids,
    checked_shortlist,
)
from me_local.errors import RunError

_MANY_PLACES = 256  # requests that it runs at once, unless it is told otherwise


class Vllm:
    """A vLLM, and the model of this name in it; None: its first."""

    def __init__(self, connection: Connection, model: str | None = None) -> None:
        self._connection = connection
        self._model = model
        self._salt: dict[str, str] = {}

    def describe(self, interrupted: Interrupted | None = None) -> Description:
        """From /v1/models: the model of the configured name, or the first. It wants room for the token it samples."""
        answer, _ = self._connection.ask("/v1/models", interrupted=interrupted)
        where = self._connection.where
        models = answer.get("data")
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models) or not models:
            raise RunError(f"{where}: /v1/models names no model")
        names = [str(model.get("id")) for model in models]
        if self._model is None:
            self._model = names[0]
        if self._model not in names:
            raise RunError(f'{where}: has no model "{plain(self._model)}"; there are: {plain(", ".join(names))}')
        found = models[names.index(self._model)]
        n_ctx = checked_count(found.get("max_model_len"), where, "/v1/models")
        return Description(plain(f"{self._model} {found.get('root') or ''}"), n_ctx - 1, _MANY_PLACES)

    def tokenize(self, text: str, interrupted: Interrupted | None = None) -> list[int]:
        """From /tokenize."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        answer, _ = self._connection.ask("/tokenize", body, interrupted=interrupted)
        return checked_ids(answer.get("tokens"), self._connection.where, "/tokenize")

    def forget(self) -> None:
        """Its cache is by salts: nothing in there was evaluated with this one."""
        self._salt = {"cache_salt": secrets.token_hex(16)}

    def predict(self, ids: Sequence[int], count: int, place: int, interrupted: Interrupted | None) -> Prediction:
        """From /v1/completions; the sampled token stands among the others, and is dropped where it is one too many."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": ids,
            "max_tokens": 1,
            "logprobs": count,
            "temperature": 1.0,
            "return_tokens_as_token_ids": True,
        } | self._salt
        answer, opened = self._connection.ask("/v1/completions", body, interrupted=interrupted)
        where = self._connection.where
        try:
            tops = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            pairs = [(int(name.removeprefix("token_id:")), value) for name, value in tops.items()]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise RunError(
                f"{where}: /v1/completions gives no log-probabilities by ids: is the engine a vLLM?"
            ) from None
        usage = answer.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        tokens = len(ids) - cached if isinstance(cached, int) and 0 <= cached < len(ids) else len(ids)
        shortlist = checked_shortlist(pairs, count, where, "/v1/completions")
        return Prediction(shortlist, tokens, None, str(answer.get("model")), opened)
