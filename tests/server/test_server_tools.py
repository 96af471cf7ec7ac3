"""Tools: what members are told, calls that are kept in their form, and what the clients read of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from served import Served, served

from me_local.server import tools
from me_local.server.protocol import ChatRequest, parse
from me_local.server.tools import Splitter
from me_local.text.constraints import start

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a town.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"enum": ["Paris", "Köln"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": NOTHING}}
ASK = [{"role": "user", "content": "How is the weather in Paris?"}]


@pytest.fixture(scope="module")
def server(two_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = tmp_path_factory.mktemp("tools") / "models.toml"
    models.write_text(two_models.read_text().replace("n_ctx = 512", "n_ctx = 2048"))
    with served(models) as running:
        yield running


def call_of(choice: Any) -> Any:
    assert choice.finish_reason == "tool_calls"
    return choice.message.tool_calls[0]


@pytest.mark.parametrize("strategy", ["me", "ce"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_required_is_made_and_keeps_its_schema(server: Served, choice: Any, strategy: str) -> None:
    answer = server.openai.chat.completions.create(
        model="me-local", messages=ASK, tools=[WEATHER], tool_choice=choice, seed=4, parallel_tool_calls=False,
        extra_body={"strategy": strategy},
    )  # fmt: skip
    call = call_of(answer.choices[0])
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    assert answer.choices[0].message.content is None
    assert call.id.startswith("call_")


def test_one_of_several_tools_is_called(server: Served) -> None:
    names = set()
    for seed in range(12):
        answer = server.openai.chat.completions.create(
            model="me-local", messages=ASK, tools=[WEATHER, CLOCK], tool_choice="required", seed=seed,
            parallel_tool_calls=False,
        )  # fmt: skip
        names.add(call_of(answer.choices[0]).function.name)
    assert names == {"get_weather", "clock"}


def test_a_stream_tells_the_same_call(server: Served) -> None:
    fields = {"tools": [CLOCK, WEATHER], "tool_choice": "required", "seed": 7, "parallel_tool_calls": False}
    whole = server.chat(**fields, messages=ASK, max_tokens=100).json()["choices"][0]
    stream = server.openai.chat.completions.create(
        model="me-local", messages=ASK, stream=True, max_tokens=100, **fields
    )
    chunks = [chunk.choices[0] for chunk in stream]
    [call] = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert (call.index, call.function.name) == (0, whole["message"]["tool_calls"][0]["function"]["name"])
    assert call.function.arguments == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_a_stream_tells_the_probabilities_of_a_call(server: Served) -> None:
    fields = {"tools": [WEATHER], "tool_choice": "required", "seed": 7, "parallel_tool_calls": False}
    fields |= {"messages": ASK, "max_tokens": 100, "logprobs": True}
    whole = server.chat(**fields).json()["choices"][0]
    told: list[Any] = []
    for chunk in server.openai.chat.completions.create(model="me-local", stream=True, **fields):
        told += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert [each.model_dump() for each in told] == whole["logprobs"]["content"]
    assert "<tool_call>" in "".join(each.token for each in told)


def test_without_a_call_the_answer_is_a_text(server: Served) -> None:
    plain = server.chat(seed=3, tools=[WEATHER], tool_choice="none").json()["choices"][0]["message"]
    assert plain == server.chat(seed=3).json()["choices"][0]["message"]
    free = server.chat(seed=3, tools=[WEATHER], max_tokens=20).json()["choices"][0]
    assert free["message"]["content"]
    assert "tool_calls" not in free["message"]
    assert free["finish_reason"] in ("stop", "length")


def test_results_go_back_into_the_conversation(server: Served) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [called, called | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "13:00"}]},
        {"role": "user", "content": "And now?"},
    ]
    request = parse(ChatRequest, json.dumps({"messages": messages, "tools": [CLOCK]}).encode())
    [[system, question, reply, results]] = request.prompts()
    assert system.role == "system"
    assert '{"name": "clock", "parameters": {"type": "object"' in system.content
    assert question.content == ASK[0]["content"]
    assert reply.content == "\n".join(['<tool_call>{"name": "clock", "arguments": {}}</tool_call>'] * 2)
    assert results.role == "user"
    assert results.content == (
        "<tool_response>\n12:00\n</tool_response>\n<tool_response>\n13:00\n</tool_response>\nAnd now?"
    )
    assert server.chat(messages=messages, tools=[CLOCK], max_tokens=3).status_code == 200


def test_tools_stand_behind_a_system_message(server: Served) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *ASK]
    request = parse(ChatRequest, json.dumps({"messages": messages, "tools": [CLOCK]}).encode())
    [[system, _]] = request.prompts()
    assert system.content.startswith("Be brief.\n\nYou can call these tools:\n")


AUTO = tools.constraint([tools.Tool.model_validate(WEATHER)], "auto", parallel=True)
CALL = '<tool_call>{"name": "get_weather", "arguments": {"town": "Paris", "days": 3}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "allowed", "whole"),
    [
        ("", True, True),
        ("Fine <tool_call weather", True, True),
        ("Well: <tool_call>", True, False),
        (CALL, True, True),
        (f"Well: {CALL}", True, True),
        (f"{CALL}\n{CALL}", True, True),
        (f"{CALL} and", False, False),
        ('<tool_call>{"name": "clock"', False, False),
        ('<tool_call>{"name": "get_weather", "arguments": {"town": "Rome"', False, False),
    ],
)
def test_what_a_free_choice_allows(text: str, allowed: bool, whole: bool) -> None:
    assert AUTO is not None
    matcher = start(AUTO)
    assert matcher.allows(text.encode()) == allowed
    if allowed:
        matcher.append(text.encode())
        assert matcher.may_end() == whole


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("no call", "no call", []),
        (f"a {CALL}", "a ", ["get_weather"]),
        (f"{CALL}\n{CALL}", "", ["get_weather"] * 2),
        ("a <tool_call>{", "a <tool_call>{", []),
        ("a <tool_call>{}</tool_call> b", "a <tool_call>{}</tool_call> b", []),
        ("a <tool", "a <tool", []),
        ("a < b", "a < b", []),
    ],
)
def test_content_and_calls_are_parted_whatever_the_pieces(size: int, text: str, content: str, names: list[str]) -> None:
    splitter, told = Splitter(), ""
    for at in range(0, len(text), size):
        told += splitter.push(text[at : at + size])[0]
    told += splitter.flush()
    assert told == content
    assert [call.name for call in splitter.calls] == names
    assert all(json.loads(call.arguments) == {"town": "Paris", "days": 3} for call in splitter.calls)
