"""Values that a user wrote, checked by a rule, and the words in which errors speak of them.

Knows nothing of which values there are.
"""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, Field, Strict, TypeAdapter, ValidationError

from me_local.errors import ConfigError

_INT32_MAX = 2**31 - 1  # llama.cpp's own sizes and indices are 32-bit


def must(problem: str, holds: Callable[[Any], object]) -> AfterValidator:
    """A rule in words, and what holds where it is kept."""

    def check(value: object) -> object:
        if not holds(value):
            raise ValueError(f"must {problem}")
        return value

    return AfterValidator(check)


Number = Annotated[float, Strict(), AllowInfNan(False)]
AtLeast0 = Annotated[Number, Field(ge=0)]
Int = Annotated[int, Strict(), Field(le=_INT32_MAX)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(lambda raw: (raw,) if isinstance(raw, str) else raw)]


def require_known(key: str, allowed: Iterable[str], place: str, kind: str) -> None:
    """Raise ConfigError, which begins with the place, for a `kind` of thing that is not among those that there are."""
    if key not in allowed:
        raise ConfigError(f"{place}{as_key(key)}: unknown {kind}; {nearest(key, allowed)}")


def as_key(name: str) -> str:
    """A name as TOML writes it for a key."""
    return name if re.fullmatch(r"[\w-]+", name) else shown(name)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The word that was meant, or all that there are."""
    near = get_close_matches(word, allowed, n=1)
    return f"did you mean {shown(near[0])}?" if near else f"allowed: {', '.join(allowed)}"


def number(text: str) -> object:
    """The number that the text is; else the text, for the rule to word the error."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def parsed(text: str) -> object:
    """What the text is as JSON; else the text, for the rule to word the error."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return text


def argument(text: str, place: str) -> tuple[str, object]:
    """The name and the value of "NAME=VALUE": JSON, else a text. Raises ConfigError that begins with the place."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"{place}: must look like NAME=VALUE, got {shown(text)}")
    return name.strip(), parsed(value)


_PROBLEMS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be an integer",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "path_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
    "value_error": "{error}",
}


def by_rule(rule: TypeAdapter[Any], value: object, place: str) -> Any:
    """The value, if the rule holds. Raises ConfigError that begins with the place."""
    try:
        return rule.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
    context = {name: str(part).removesuffix(".0") for name, part in first.get("ctx", {}).items()}
    if "expected" in context:
        context["expected"] = context["expected"].replace("'", '"')
    problem = _PROBLEMS.get(first["type"], "{msg}").format(msg=first["msg"], **context)
    index = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
    raise ConfigError(f"{place}{index}: {problem}, got {shown(first['input'])}")


def shown(value: object) -> str:
    """A value on one line, about as TOML writes it, cut where it is long."""
    text = str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():
        text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
