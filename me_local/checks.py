"""Values that a user wrote, checked by a rule, and the words in which errors speak of them.

Knows nothing of which values there are.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from me_local.errors import ConfigError


def require_known(key: str, allowed: Iterable[str], place: str, kind: str) -> None:
    """Raise ConfigError, which begins with the place, for a `kind` of thing that is not among those that there are."""
    if key not in allowed:
        name = key if re.fullmatch(r"[\w-]+", key) else shown(key)
        raise ConfigError(f"{place}{name}: unknown {kind}; {nearest(key, allowed)}")


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


def argument(text: str, place: str) -> tuple[str, object]:
    """The name and the value of "NAME=VALUE": JSON, else a text. Raises ConfigError that begins with the place."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"{place}: must look like NAME=VALUE, got {shown(text)}")
    try:
        return name.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return name.strip(), value


_PROBLEMS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be an integer",
    "less_than_equal": "must be at most {le}",
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
