"""How a task of one's own finds the answer in a reply, and which answers are the same: its table `[answer]`."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AllowInfNan, BeforeValidator, Field, Strict, TypeAdapter

from me_local.checks import by_rule, require_known, shown
from me_local.errors import ConfigError, InputError
from me_local.evaluation.tasks.answers import letter, number
from me_local.evaluation.tasks.rows import Row, as_text
from me_local.evaluation.tasks.task import letter_of

Find = Literal["text", "number", "letter", "regex", "json"]
Compare = Literal["exact", "case-insensitive", "number"]


def _checked_choices(raw: object) -> object:
    if (type(raw) is int and 2 <= raw <= 26) or (isinstance(raw, str) and raw):
        return raw
    raise ValueError("must be their number, 2 to 26, or the name of the field that lists them")


_Text = Annotated[str, Field(min_length=1)]
_Choices = Annotated[int | str, BeforeValidator(_checked_choices)]
_BELONGS = {"pattern": "regex", "key": "json", "choices": "letter"}
_SCIENTIFIC = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?[eE][+-]?[0-9]{1,3}")


@dataclass(frozen=True, slots=True)
class Rule:
    """The table `[answer]`.

    `field` has the right answer of a question. `pattern` goes with `find = "regex"`, `key` with "json", `choices` with
    "letter": their number, or the field that lists them. `tolerance` goes with `compare = "number"`.
    """

    field: _Text = "answer"
    find: Find = "text"
    pattern: _Text | None = None
    key: _Text | None = None
    choices: _Choices | None = None
    compare: Compare = "exact"
    tolerance: Annotated[float, Strict(), AllowInfNan(False), Field(ge=0)] = 0.0

    def right(self, row: Row) -> tuple[str, int]:
        """The right answer of a question, as `extract` gives those of replies, and the number of choices, 0 for none.

        Raises InputError where it is none of this form.
        """
        count = self.choices if isinstance(self.choices, int) else len(row.choices(self.choices)) if self.choices else 0
        text = row.text(self.field).strip()
        answer = self._normal(text)
        if count and text not in [letter_of(i) for i in range(count)]:
            last = letter_of(count - 1)
            raise InputError(f"{row.where}: {self.field}: must be a letter from A to {last}, got {shown(text)}")
        if answer is None:
            problem = "must be a number" if self.compare == "number" else "is blank"
            raise InputError(f"{row.where}: {self.field}: {problem}, got {shown(text)}")
        return answer, count

    def extract(self, reply: str, count: int) -> str | None:
        """The answer of a reply to a question with so many choices, None where it has none of this form."""
        found = self._found(reply, count)
        return None if found is None else self._normal(found)

    def same(self, one: str, other: str) -> bool:
        """Whether two answers, as `extract` gives them, count as one."""
        if self.compare != "number" or not self.tolerance:
            return one == other
        return abs(Decimal(one) - Decimal(other)) <= Decimal(str(self.tolerance))

    def _found(self, reply: str, count: int) -> str | None:
        if self.find == "letter":
            chosen = letter(reply, count)
            return chosen if chosen in [letter_of(i) for i in range(count)] else None
        if self.pattern is not None:
            groups = [match[1] for match in re.finditer(self.pattern, reply) if match[1] is not None]
            return groups[-1] if groups else None
        return _field(reply, self.key) if self.key is not None else reply

    def _normal(self, text: str) -> str | None:
        text = text.strip()
        if self.compare == "number":
            return format(Decimal(text), "f") if _SCIENTIFIC.fullmatch(text) else number(text)
        return (text.casefold() if self.compare == "case-insensitive" else text) or None


def parse_rule(raw: Mapping[str, Any], place: str) -> Rule:
    """The table `[answer]` of a task file. Raises ConfigError, which begins with the place and names the key."""
    for key in raw:
        require_known(key, Rule.__dataclass_fields__, f"{place}.", "key")
    rule = Rule(**{key: by_rule(_type(key), value, f"{place}.{key}") for key, value in raw.items()})
    for key, find in _BELONGS.items():
        if (key in raw) != (rule.find == find):
            problem = f'goes with find = "{find}"' if key in raw else f'is missing, which find = "{find}" needs'
            raise ConfigError(f"{place}.{key}: {problem}")
    if rule.find == "number":
        rule = replace(rule, compare=raw.get("compare", "number"))
    fixed = {"number": "number", "letter": "exact"}.get(rule.find)
    if fixed and rule.compare != fixed:
        raise ConfigError(f'{place}.compare: with find = "{rule.find}" it can only be "{fixed}"; leave it out')
    if "tolerance" in raw and rule.compare != "number":
        raise ConfigError(f'{place}.tolerance: goes with compare = "number"')
    if rule.pattern is not None:
        _require_group(rule.pattern, f"{place}.pattern")
    return rule


def _require_group(pattern: str, place: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{place}: not a regular expression: {error}") from None
    if groups != 1:
        raise ConfigError(f"{place}: must have one group, (…), for the answer, and has {groups}; others are (?:…)")


def _field(reply: str, key: str) -> str | None:
    """The field of the last JSON object in a reply that has it."""
    decoder, at, found = json.JSONDecoder(), reply.find("{"), None
    while at >= 0:
        end = at + 1
        try:
            value, end = decoder.raw_decode(reply, at)
            found = as_text(value[key]) if key in value else found
        except (ValueError, RecursionError):
            pass
        at = reply.find("{", end)
    return found


@cache
def _type(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(Rule, include_extras=True)[key])
