"""Replies that have to be JSON, match a pattern, be one of some texts or follow a grammar, as clients ask for them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
from served import MESSAGES, Served, served

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "grün"]}, "size": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
LARK = 'start: "ab" | "cd"'
GBNF = 'root ::= "ab" | "cd"'
SPELLINGS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA, "strict": True}}},
    {"response_format": {"type": "json_object", "schema": SCHEMA}},
    {"response_format": {"type": "json_schema", "schema": SCHEMA}},
    {"json_schema": SCHEMA},
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
    {"structured_outputs": {"json": SCHEMA}},
]
TEXTS: list[dict[str, Any]] = [
    {"guided_choice": ["ab", "cd"]},
    {"structured_outputs": {"choice": ["ab", "cd"]}},
    {"guided_regex": "ab|cd"},
    {"structured_outputs": {"regex": "ab|cd"}},
    {"response_format": {"type": "regex", "pattern": "ab|cd"}},
    {"grammar": GBNF},
    {"grammar": LARK},
    {"guided_grammar": LARK},
    {"structured_outputs": {"grammar": GBNF}},
    {"response_format": {"type": "grammar", "grammar": LARK}},
]


@pytest.fixture(scope="module")
def server(two_models: Path) -> Iterator[Served]:
    with served(two_models) as running:
        yield running


@pytest.mark.parametrize("fields", SPELLINGS, ids=lambda fields: json.dumps(fields)[:60])
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_a_reply_keeps_the_schema(server: Served, fields: dict[str, Any], strategy: str) -> None:
    body = {"messages": MESSAGES, "seed": 3, "strategy": strategy} | fields
    choice = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


@pytest.mark.parametrize("fields", TEXTS, ids=lambda fields: json.dumps(fields)[:60])
def test_a_reply_is_one_of_the_texts(server: Served, fields: dict[str, Any]) -> None:
    found = set()
    for seed in range(8):
        body = {"prompt": "the cat", "seed": seed} | fields
        choice = server.http.post("/v1/completions", json=body).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        found.add(choice["text"])
    assert found == {"ab", "cd"}


def test_any_object(server: Served) -> None:
    choice = server.chat(response_format={"type": "json_object"}, seed=1, max_tokens=200).json()["choices"][0]
    text = choice["message"]["content"]
    assert text.startswith("{")
    assert choice["finish_reason"] == "length" or isinstance(json.loads(text), dict)


def test_what_is_cut_by_the_limit_says_so(server: Served) -> None:
    choice = server.chat(json_schema=SCHEMA, max_tokens=2).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_a_stream_gives_the_same_text(server: Served) -> None:
    whole = server.chat(json_schema=SCHEMA, seed=5, max_tokens=50).json()["choices"][0]["message"]["content"]
    stream = server.openai.chat.completions.create(
        model="me-local", messages=MESSAGES, stream=True, seed=5, max_tokens=50, extra_body={"json_schema": SCHEMA}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == whole


def test_openai_parses_it_into_a_model(server: Served) -> None:
    class Thing(pydantic.BaseModel):
        colour: Literal["red", "grün"]
        big: bool

    answer = server.openai.chat.completions.parse(model="me-local", messages=MESSAGES, response_format=Thing, seed=2)
    assert isinstance(answer.choices[0].message.parsed, Thing)


def test_a_text_format_is_no_constraint(server: Served) -> None:
    plain = server.chat(seed=1).json()["choices"][0]["message"]
    assert server.chat(seed=1, response_format={"type": "text"}).json()["choices"][0]["message"] == plain
