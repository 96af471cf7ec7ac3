"""Replies under schemas are what the schemas say, by a validator that knows nothing of how they were made.

The members are tiny models that have learnt nothing, with vocabularies that cut text differently. Whatever they would
like to write, a reply that ends by itself parses and validates; one that ends by its length is the beginning of such
a reply, since each of its pieces was allowed.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from me_local import Ensemble, Overrides, Reply, load
from me_local.asking import Ask
from me_local.config import Constraint
from me_local.jsonl import json_text

Schema = dict[str, Any]
NAMES = ("bpe_a", "bpe_c", "spm")
MAX_TOKENS = 150
SHORT = {"type": "string", "maxLength": 8}


def obj(required: Sequence[str] | None = None, **properties: Schema) -> Schema:
    """An object with these properties and no others."""
    keys = {"type": "object", "properties": properties, "additionalProperties": False}
    return keys | {"required": list(properties if required is None else required)}


SCHEMAS: dict[str, Schema] = {
    "flat": obj(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 130}, male={"type": "boolean"}),
    "nested": obj(a=obj(b=obj(c=SHORT, d={"type": "null"})), e=obj(f={"type": "boolean"})),
    "optional": obj(["b"], a=SHORT, b={"type": "boolean"}, c={"enum": [1, 2.5, None, "x"]}),
    "a tree": {
        "$defs": {
            "t": obj(name={"enum": ["x", "y"]}, leaves={"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2})
        },
        "$ref": "#/$defs/t",
    },
    "a list by links": {
        "$defs": {"n": obj(v={"type": "boolean"}, next={"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]})},
        "$ref": "#/$defs/n",
    },
    "enum": {"enum": ["red", "grün", "синий", "青", 7, -1.5, None, True, {"a": [1]}]},
    "const": obj(kind={"const": "café ☕"}, n={"const": 42}, of={"const": {"x": [1, {"y": None}]}}),
    "a pattern": obj(plate={"type": "string", "pattern": "^[A-Z]{1,3}-[A-Z]{2} [0-9]{1,4}$"}),
    "patterns": {"type": "array", "items": {"type": "string", "pattern": "^(?:ab|ba)*c?$"}, "maxItems": 3},
    "keys of all kinds": {
        **obj(**{"ключ": SHORT, "größe": {"type": "integer"}, "名前": SHORT, 'a b"c\\d': SHORT, "😀": {"type": "null"}})
    },
    "integers": {"type": "array", "items": {"type": "integer", "minimum": -17, "maximum": 1234}, "maxItems": 5},
    "exclusive": obj(a={"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 21}),
    "numbers": {"type": "array", "items": {"type": "number", "minimum": -0.5, "maximum": 3.75}, "maxItems": 4},
    "multiples": {"type": "array", "items": {"type": "integer", "multipleOf": 7}, "minItems": 2, "maxItems": 3},
    "a matrix": {
        "type": "array",
        "items": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9},
            "minItems": 2,
            "maxItems": 2,
        },
        "minItems": 3,
        "maxItems": 3,
    },
    "a tuple": {
        "type": "array",
        "prefixItems": [SHORT, {"type": "boolean"}, {"enum": ["m", "km"]}],
        "items": False,
        "minItems": 3,
    },
    "one of some": {
        "anyOf": [
            obj(type={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 99}),
            obj(type={"const": "square"}, side={"type": "integer", "minimum": 1, "maximum": 99}),
            {"type": "null"},
        ]
    },
    "all of": {"allOf": [obj(a=SHORT), {"properties": {"a": {"type": "string", "minLength": 2}}}]},
    "a map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    "formats": obj(day={"type": "string", "format": "date"}, of={"type": "string", "format": "ipv4"}),
    "lengths": {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": 3},
        "minItems": 1,
        "maxItems": 4,
    },
}
WAYS = ("me", "ce", "words", "a batch", "a batch by own routes", "one vocabulary")


def asks(seeds: Sequence[int]) -> Iterator[tuple[str, Ask]]:
    """A question for each schema and seed."""
    for name, schema in SCHEMAS.items():
        for seed in seeds:
            yield name, Ask("the", Overrides(seed=seed, constraint=Constraint("json_schema", json_text(schema))))


def opened(way: str, write_models: Callable[..., Path]) -> Ensemble:
    names = ("bpe_a", "bpe_b") if way == "one vocabulary" else NAMES
    strategy, unit = "ce" if way == "ce" else "me", "word" if way == "words" else "token"
    overrides = Overrides(strategy=strategy, unit=unit, max_tokens=MAX_TOKENS)  # type: ignore[arg-type]
    if "own" in way:
        overrides = Overrides(max_tokens=MAX_TOKENS, route="own")
    return load(write_models(*names), overrides, batch=4 if "batch" in way else 1)


def check(name: str, reply: Reply) -> None:
    """That a reply which ends by itself validates; one that does not, ends by its length."""
    if reply.finish_reason == "stop":
        validator = jsonschema.validators.validator_for(SCHEMAS[name], jsonschema.Draft202012Validator)
        validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker()).validate(json.loads(reply.text))
    else:
        assert reply.finish_reason == "length"
        assert len(reply.steps) == MAX_TOKENS
        with pytest.raises(json.JSONDecodeError):
            json.loads(reply.text)


def run(way: str, write_models: Callable[..., Path], seeds: Sequence[int]) -> Counter[tuple[str, str]]:
    """How many replies ended how, under each schema."""
    names = [name for name, _ in asks(seeds)]
    ends: Counter[tuple[str, str]] = Counter()
    with opened(way, write_models) as ensemble:
        for finished in ensemble.generate_many((ask for _, ask in asks(seeds)), raw=True):
            assert finished.error is None
            assert finished.reply is not None
            check(names[finished.index], finished.reply)
            ends[names[finished.index], finished.reply.finish_reason] += 1
    assert ends.total() == len(names)
    return ends


def test_a_reply_under_each_schema(write_models: Callable[..., Path]) -> None:
    ends = run("me", write_models, [1])
    assert sum(count for (_, reason), count in ends.items() if reason == "stop") >= 15


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_many_replies_under_all_schemas(write_models: Callable[..., Path], way: str) -> None:
    """Six ways of eight replies each: 1,008 in all."""
    ends = run(way, write_models, range(8))
    print({f"{name}: {reason}": count for (name, reason), count in sorted(ends.items()) if reason != "stop"})
    assert sum(count for (_, reason), count in ends.items() if reason == "stop") > 0.8 * ends.total()
