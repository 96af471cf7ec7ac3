"""The fields by which clients shape what is sampled, and the values by which they say that they want nothing.

OpenAI's, llama-server's and vLLM's. Knows nothing of what is made of them.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from me_local.sampling import Bias, read_biases

_Any = Annotated[float, Field(ge=-100, le=100)]
_Factor = Annotated[float, Field(ge=0.01, le=100)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Window = Annotated[int, Field(ge=-1, le=2**31 - 1)]
_Breaker = Annotated[str, Field(min_length=1, max_length=100)]


def _by_ids(raw: Any) -> Any:
    """OpenAI's keys are ids; llama-server's are so where they are numbers."""
    if isinstance(raw, dict):
        raw = [[int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key, raw[key]] for key in raw]
    return None if raw is None else read_biases(raw)


class Shaping(BaseModel):
    """All these fields of a request."""

    temperature: Annotated[float, Field(allow_inf_nan=False, ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int | None, Field(ge=0, le=2**31 - 1), BeforeValidator(lambda raw: 0 if raw == -1 else raw)] = None
    min_p: _Share | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_n_sigma: Annotated[float, Field(ge=-1, le=1e6)] | None = None
    xtc_probability: _Share | None = None
    xtc_threshold: _Share | None = None
    presence_penalty: _Any | None = None
    frequency_penalty: _Any | None = None
    repeat_penalty: _Factor | None = None
    repetition_penalty: _Factor | None = None
    repeat_last_n: _Window | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=1000)] | None = None
    dry_base: Annotated[float, Field(allow_inf_nan=False, ge=1)] | None = None
    dry_allowed_length: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    dry_penalty_last_n: _Window | None = None
    dry_sequence_breakers: Annotated[list[_Breaker], Field(max_length=64)] | None = None
    logit_bias: Annotated[tuple[Bias, ...] | None, BeforeValidator(_by_ids)] = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None

    def shaping(self) -> dict[str, Any]:
        """What they say, as overrides have it."""
        given = {name: getattr(self, name) for name in Shaping.model_fields if name != "repetition_penalty"}
        if self.repeat_penalty is None:
            given["repeat_penalty"] = self.repetition_penalty
        return given
