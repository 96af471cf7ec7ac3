"""Anthropic's protocol over HTTP: what members are told, replies whole and as events, and refusals in its shape."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from served import MESSAGES, Served, Tap, served

from me_local import Message
from me_local.decoding.reply import MemberUsage, Reply
from me_local.errors import ConfigError
from me_local.server import tools
from me_local.server.app import Access
from me_local.server.keeping import Limits
from me_local.server.messages_answers import MessageAnswer
from me_local.server.messages_protocol import MessagesRequest
from me_local.server.protocol import ChatRequest, parse

TOWN = {
    "type": "object",
    "properties": {"town": {"enum": ["Paris", "Köln"]}},
    "required": ["town"],
    "additionalProperties": False,
}
CLOCK = {"name": "clock", "description": "Tells the time.", "input_schema": TOWN}
HALF = {"role": "assistant", "content": "the dog"}
USAGE = MemberUsage("a", 1.0, 1, 3, 3, 0, 0.1, 0.1)
ANY = {"type": "any", "disable_parallel_tool_use": True}
SHAPED = {"top_k": 0, "repeat_penalty": 1.5, "frequency_penalty": 2, "dry_multiplier": 2.0, "xtc_probability": 0.5}
SHAPED |= {"typical_p": 0.9, "top_n_sigma": 3, "logit_bias": {"a": 4, "e": False}, "min_tokens": 9}


@pytest.fixture(scope="module")
def server(two_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = tmp_path_factory.mktemp("messages") / "models.toml"
    models.write_text(two_models.read_text().replace("n_ctx = 512", "n_ctx = 2048"))
    with served(models, Access(aliases=["claude-tiny"])) as running:
        yield running


def ask(server: Served, **fields: Any) -> httpx.Response:
    body = {"model": "me-local", "max_tokens": 5, "messages": MESSAGES} | fields
    return server.http.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"})


def events(server: Served, **fields: Any) -> list[dict[str, Any]]:
    blocks = ask(server, stream=True, **fields).text.rstrip("\n").split("\n\n")
    named = [block.split("\n") for block in blocks]
    told = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in named]
    assert all(name == data["type"] for name, data in told)
    return [data for _, data in told]


def chat_of(**fields: Any) -> ChatRequest:
    """The request for a conversation that one of Anthropic's becomes."""
    body = {"messages": MESSAGES, "max_tokens": 5} | fields
    return parse(MessagesRequest, json.dumps(body).encode()).chat()


def prompt_of(**fields: Any) -> list[Message]:
    [prompt] = chat_of(**fields).prompts()
    return list(prompt)  # type: ignore[arg-type]


def test_a_reply_is_that_of_the_same_conversation(server: Served) -> None:
    fields = {"seed": 3, "max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 9, "min_p": 0.01}
    told = server.chat(**fields, messages=[{"role": "system", "content": "be kind\nand short"}, *MESSAGES]).json()
    kind = {"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}
    system = [kind, {"type": "text", "text": "and short"}]
    message = ask(server, **fields, system=system).json()
    assert message["content"] == [{"type": "text", "text": told["choices"][0]["message"]["content"]}]
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "me-local")
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    assert message["usage"]["input_tokens"] == told["usage"]["prompt_tokens"]
    assert message["usage"]["output_tokens"] == 6


def test_all_that_shapes_a_reply_is_taken(server: Served) -> None:
    shaped = ask(server, **SHAPED, seed=1, max_tokens=20).json()["content"][0]["text"]
    assert shaped == server.chat(**SHAPED, seed=1, max_tokens=20).json()["choices"][0]["message"]["content"]
    assert shaped != ask(server, seed=1, max_tokens=20).json()["content"][0]["text"]
    refused = ask(server, repeat_penalty=0).json()["error"]["message"]
    assert refused.startswith("repeat_penalty: Input should be greater")
    assert "nobody knows whose token 5 is" in ask(server, logit_bias={"5": 1}).json()["error"]["message"]


@pytest.mark.parametrize("fields", [{}, {"tools": [CLOCK]}, {"tools": [CLOCK], "tool_choice": ANY, "max_tokens": 60}])
def test_a_stream_tells_the_same_message(server: Served, fields: dict[str, Any]) -> None:
    whole = ask(server, seed=11, **fields).json()
    told = events(server, seed=11, **fields)
    start, *body, delta, stop = told
    assert (start["type"], delta["type"]) == ("message_start", "message_delta")
    assert (start["message"]["role"], start["message"]["content"]) == ("assistant", [])
    assert start["message"]["usage"] == whole["usage"] | {"output_tokens": 0}
    assert delta["delta"] == {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    assert delta["usage"] == whole["usage"]
    assert stop == {"type": "message_stop"}
    assert rebuilt(body) == [block | ({"id": ""} if "id" in block else {}) for block in whole["content"]]


def rebuilt(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that events make, as a client does it."""
    blocks: list[dict[str, Any]] = []
    closed = 0
    for event in told:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks) == closed
            blocks.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_stop":
            assert event["index"] == closed
            closed += 1
        elif event["delta"]["type"] == "text_delta":
            assert event["index"] == closed
            blocks[-1]["text"] += event["delta"]["text"]
        else:
            blocks[-1]["json"] += event["delta"]["partial_json"]
    assert closed == len(blocks)
    for block in blocks:
        written = block.pop("json")
        if block["type"] == "tool_use":
            block |= {"input": json.loads(written), "id": ""}
    return blocks


def test_a_call_that_is_required_keeps_its_schema(server: Served) -> None:
    message = ask(server, tools=[CLOCK], tool_choice=ANY, max_tokens=60, seed=1).json()
    [call] = message["content"]
    assert (message["stop_reason"], call["type"], call["name"]) == ("tool_use", "tool_use", "clock")
    jsonschema.validate(call["input"], TOWN)


def test_a_stop_sequence_is_named(server: Served) -> None:
    text = ask(server, seed=5, max_tokens=30).json()["content"][0]["text"]
    stop = text[4]
    message = ask(server, seed=5, max_tokens=30, stop_sequences=["\n\n\n\n", stop]).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert message["content"][0]["text"] == text[: text.index(stop)]
    assert events(server, seed=5, max_tokens=30, stop_sequences=[stop])[-2]["delta"]["stop_sequence"] == stop


def test_the_stops_of_the_ensemble_end_a_turn() -> None:
    """Members that see a plain transcript have some, and the client did not ask for them."""
    request = parse(MessagesRequest, b'{"messages": [{"role": "user", "content": "x"}], "stop_sequences": ["END"]}')
    for stop, told in ((None, "end_turn"), ("\nUser:", "end_turn"), ("END", "stop_sequence")):
        reply = Reply("x", "stop", "me", "token", 1, (), (USAGE,), 1.0, stop)
        assert MessageAnswer(request, request.chat()).whole(reply)["stop_reason"] == told


def test_a_schema_is_kept(server: Served) -> None:
    format_ = {"type": "json_schema", "schema": TOWN}
    for fields in ({"output_config": {"format": format_, "effort": "low"}}, {"output_format": format_}):
        jsonschema.validate(json.loads(ask(server, max_tokens=60, **fields).json()["content"][0]["text"]), TOWN)


def test_calls_and_their_results_are_told_as_openais_are() -> None:
    call = {"type": "tool_use", "id": "a", "name": "clock", "input": {"town": "Köln"}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "12"}]},
        {"type": "text", "text": "And?"},
        {"type": "tool_result", "tool_use_id": "b", "content": "no", "is_error": True},
    ]
    conversation = [
        {"role": "user", "content": "How late is it?"},
        {"role": "user", "content": [{"type": "text", "text": "Quick!"}]},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": results},
    ]
    assert prompt_of(messages=conversation, system="be kind") == [
        Message("system", "be kind"),
        Message("user", "How late is it?\nQuick!"),
        Message("assistant", 'I look.\n<tool_call>{"name": "clock", "arguments": {"town": "Köln"}}</tool_call>', "hm"),
        Message(
            "user",
            "<tool_response>\n12\n</tool_response>\n<tool_response>\nerror: no\n</tool_response>\nAnd?",
        ),
    ]


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, None, None),
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "clock"}, {"type": "function", "function": {"name": "clock"}}, True),
    ],
)
def test_choices_are_those_of_openai(choice: Any, expected: Any, parallel: bool | None) -> None:
    chat = chat_of(tools=[CLOCK], **({"tool_choice": choice} if choice else {}))
    told = chat.tool_choice
    assert (told.model_dump() if isinstance(told, tools.NamedTool) else told) == expected
    assert chat.parallel_tool_calls is parallel
    assert chat.tools is not None
    assert chat.tools[0].function.parameters == TOWN


def test_tokens_are_counted_as_a_reply_counts_them(server: Served) -> None:
    for fields in ({}, {"system": "be kind"}, {"tools": [CLOCK]}, {"messages": [*MESSAGES, HALF]}):
        body = {"model": "me-local", "messages": MESSAGES} | fields
        counted = server.http.post("/v1/messages/count_tokens", json=body).json()
        assert counted == {"input_tokens": ask(server, **fields).json()["usage"]["input_tokens"]}
    long = [{"role": "user", "content": "x " * 3000}]
    assert server.http.post("/v1/messages/count_tokens", json={"messages": long}).json()["input_tokens"] > 2048


def test_the_beginning_of_a_reply_is_gone_on_with(server: Served) -> None:
    chat = server.chat(messages=[*MESSAGES, HALF], seed=2).json()
    assert (
        ask(server, messages=[*MESSAGES, HALF], seed=2).json()["content"][0]["text"]
        == (chat["choices"][0]["message"]["content"])
    )


def test_an_alias_is_the_ensemble(server: Served) -> None:
    told = ask(server, model="claude-tiny", seed=1).json()
    assert told["model"] == "claude-tiny"
    assert told["content"] == ask(server, seed=1).json()["content"]
    assert "claude-tiny" in [model["id"] for model in server.http.get("/v1/models").json()["data"]]
    assert server.http.get("/v1/models/claude-tiny").json()["members"]
    refused = ask(server, model="claude-huge")
    assert refused.status_code == 404
    assert refused.json()["error"]["type"] == "not_found_error"
    assert "claude-tiny" in refused.json()["error"]["message"]


@pytest.mark.parametrize("alias", ["", " ", "me-local", "me-local/spm", "a\nb"])
def test_what_is_no_alias_is_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match="--alias"):
        Access(aliases=[alias])


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0: type: 'image' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id: is missing"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role: "),
        ({"thinking": {"type": "sometimes"}}, "thinking.type: "),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: "),
        ({"tools": [CLOCK | {"name": "a clock"}]}, "tools.0.name: "),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice: there is no tool 'x'"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool"}}, "tool_choice: name: is missing"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
        ({"stop_sequences": [""]}, "stop_sequences.0: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"temperature": -1}, "temperature: "),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "output_config.format: "),
        ({"container": "c"}, "container: is not supported"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management: is not"),
        ({"frobnicate": 1}, "frobnicate: there is no such field"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "prompt is too long: "),
    ],
)
def test_what_is_not_supported_is_refused_in_anthropics_shape(server: Served, fields: Any, words: str) -> None:
    response = ask(server, **fields)
    assert response.status_code == 400
    told = response.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert words in told["error"]["message"]
    assert set(told["error"]) == {"type", "message"}


def test_what_means_nothing_is_accepted(server: Served) -> None:
    fields = {"thinking": {"type": "disabled"}, "metadata": {"user_id": "x"}, "service_tier": "auto", "mcp_servers": []}
    cleared = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    assert ask(server, **fields, context_management=cleared).status_code == 200


def test_a_thread_is_refused_so_that_its_package_goes_on_without(server: Served) -> None:
    response = ask(server, thread={"type": "create"})
    assert response.status_code == 400
    details = response.json()["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_all_refusals_of_the_path_have_its_shape(two_models: Path) -> None:
    with served(two_models, Access(key="right")) as running:
        wrong = running.http.post("/v1/messages", json={}, headers={"X-Api-Key": "wrong"})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")
        right = {"X-Api-Key": "right"}
        assert running.http.post("/messages", json={"messages": MESSAGES}, headers=right).status_code == 200
        assert running.http.post("/messages", json={"messages": MESSAGES}).status_code == 401
        got = running.http.get("/v1/messages", headers=right)
        assert (got.status_code, got.json()["type"]) == (405, "error")
        text = running.http.post("/v1/messages", content=b"x", headers=right)
        assert (text.status_code, text.json()["type"]) == (415, "error")
        big = running.http.post("/v1/messages", json={"x": "x" * 2**23}, headers=right)
        assert (big.status_code, big.json()["error"]["type"]) == (413, "request_too_large")


def test_a_stream_that_waits_pings(two_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("me_local.server.streams.BEAT", 0.05)
    with served(two_models) as running:
        tap = Tap(running.ensemble)
        body = {"max_tokens": 2, "messages": MESSAGES, "stream": True}
        with running.http.stream("POST", "/v1/messages", json=body) as response:
            names = (line for line in response.iter_lines() if line.startswith("event: "))
            assert next(names) == "event: message_start"
            assert next(names) == "event: ping"
            tap.let(2)
            assert list(names)[-1] == "event: message_stop"


@pytest.mark.slow
def test_an_error_in_a_stream_is_its_last_event(two_models: Path) -> None:
    with served(two_models, limits=Limits(timeout=5)) as running:
        tap = Tap(running.ensemble)
        tap.let(1)
        body = {"max_tokens": 5, "messages": MESSAGES, "stream": True}
        text = running.http.post("/v1/messages", json=body).text
        tap.let(10)
    last = text.rstrip("\n").split("\n")
    assert last[-2] == "event: error"
    told = json.loads(last[-1].removeprefix("data: "))
    assert told["error"]["type"] == "timeout_error"


def test_an_empty_reply_has_an_empty_text() -> None:
    request = parse(MessagesRequest, b'{"messages": [{"role": "user", "content": "x"}]}')
    answer, reply = MessageAnswer(request, request.chat()), Reply("", "stop", "me", "token", 1, (), (USAGE,), 1.0)
    names = [line.split("\n")[0].removeprefix("event: ") for line in answer.end(reply)]
    assert names == ["content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert MessageAnswer(request, request.chat()).whole(reply)["content"] == [{"type": "text", "text": ""}]


def test_a_client_that_leaves_a_stream_ends_its_reply(two_models: Path) -> None:
    with served(two_models) as running:
        tap = Tap(running.ensemble)
        tap.let(2)
        body = {"max_tokens": 100, "messages": MESSAGES, "stream": True}
        with running.http.stream("POST", "/v1/messages", json=body) as response:
            assert next(response.iter_lines()) == "event: message_start"
            assert tap.begun.wait(30)
        tap.let(2)
        running.wait_for("running", 0)
        running.wait_for("replies_total", 1)
        tap.let(100)
        assert running.chat().status_code == 200
