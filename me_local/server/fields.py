"""The types that fields of requests have, whichever protocol they belong to: what is bounded, ignored or refused.

A field that is not supported and would change the answer is refused by its name; one without effect is accepted.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

_MOST_TEXTS = 10_000
"""Messages and further parts of them, in a conversation: what is checked and rendered for each takes its time."""
_MOST_FIELDS = 256  # of an object: for each that is wrong a report is made
_SAYS_NOTHING: tuple[Any, ...] = (None, [], {}, "")


class Strict(BaseModel):
    """A part of a request in which further fields are refused, unless they say nothing: clients write such by habit."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _require_few(cls, raw: Any) -> Any:
        raw = _bounded_fields(raw)
        if not isinstance(raw, dict):
            return raw
        return {key: value for key, value in raw.items() if key in cls.model_fields or value not in _SAYS_NOTHING}


class Loose(BaseModel):
    """A part of a request in which further fields change nothing."""

    model_config = ConfigDict(strict=True, extra="ignore")


def no_effect_but(*neutral: object) -> AfterValidator:
    """Refuses every value but these, which change nothing."""

    def check(value: object) -> object:
        if value is not None and value not in neutral:
            raise PydanticCustomError("unsupported", "is not supported; leave it out")
        return value

    return AfterValidator(check)


def without(*off: object) -> BeforeValidator:
    """Values by which clients say that they want nothing."""
    return BeforeValidator(lambda raw: None if not isinstance(raw, bool) and raw in off else raw)


def as_prompts(raw: Any) -> Any:
    """One text, or the ids of one, as a list of one."""
    return [raw] if isinstance(raw, str) or _are_ids(raw) else raw


def bounded_texts(raw: Any) -> Any:
    """The messages, where they are not too many."""
    if not isinstance(raw, list):
        return raw
    contents = [message.get("content") if isinstance(message, dict) else None for message in raw]
    texts = sum(max(1, len(content)) if isinstance(content, list) else 1 for content in contents)
    if texts > _MOST_TEXTS:
        raise PydanticCustomError("too_long", f"{texts:,} texts are too many, at most {_MOST_TEXTS:,} are taken")
    return raw


def _bounded_fields(raw: Any) -> Any:
    if isinstance(raw, dict) and len(raw) > _MOST_FIELDS:
        raise PydanticCustomError("too_long", f"{len(raw):,} fields are too many, at most {_MOST_FIELDS} are taken")
    return raw


def _stops(raw: Any) -> Any:
    return None if raw == "" else [raw] if isinstance(raw, str) else raw


def _are_ids(raw: Any) -> bool:
    return isinstance(raw, list) and len(raw) > 0 and all(type(id_) is int for id_ in raw)


def _text_or_ids(raw: Any) -> Any:
    if isinstance(raw, str) or raw == [] or _are_ids(raw):
        return raw
    raise PydanticCustomError("prompt", "is neither a text nor a list of ids")


Ignored = Annotated[Any, Field(default=None)]
Unsupported = Annotated[Any, Field(default=None), no_effect_but([], {}, "")]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Limit = Annotated[Count | None, without(-1)]
LimitOrNothing = Annotated[Annotated[int, Field(ge=0, le=2**31 - 1)] | None, without(-1)]
TextOrIds = Annotated[Any, BeforeValidator(_text_or_ids)]
Weights = Annotated[dict[str, Finite], BeforeValidator(_bounded_fields)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[Annotated[list[_Stop], Field(max_length=16)] | None, BeforeValidator(_stops)]
