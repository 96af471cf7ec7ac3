"""OpenAI's responses, by its own client: what members are told, replies whole and as events, and refusals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from served import Served, Tap, served

from me_local import Message
from me_local.decoding.reply import MemberUsage, Reply
from me_local.server.keeping import Limits
from me_local.server.protocol import ChatRequest, parse
from me_local.server.responses_answers import ResponseAnswer
from me_local.server.responses_protocol import ResponsesRequest

TOWN = {
    "type": "object",
    "properties": {"town": {"enum": ["Paris", "Köln"]}},
    "required": ["town"],
    "additionalProperties": False,
}
CLOCK = {"type": "function", "name": "clock", "description": "Tells the time.", "parameters": TOWN, "strict": True}
REQUIRED = {"tools": [CLOCK], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 60}
SHAPED = {"top_k": 0, "repeat_penalty": 1.5, "frequency_penalty": 2, "dry_multiplier": 2.0, "xtc_probability": 0.5}
SHAPED |= {"typical_p": 0.9, "top_n_sigma": 3, "logit_bias": {"a": 4, "e": False}, "min_tokens": 9}


@pytest.fixture(scope="module")
def server(two_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = tmp_path_factory.mktemp("responses") / "models.toml"
    models.write_text(two_models.read_text().replace("n_ctx = 512", "n_ctx = 2048"))
    with served(models) as running:
        yield running


def ask(server: Served, *, seed: int | None = None, **fields: Any) -> Any:
    body = {"model": "me-local", "input": "the cat", "max_output_tokens": 5} | fields
    return server.openai.responses.create(**body, extra_body={} if seed is None else {"seed": seed})


def chat_of(**fields: Any) -> ChatRequest:
    """The request for a conversation that one for a response becomes."""
    return parse(ResponsesRequest, json.dumps({"input": "the cat"} | fields).encode()).chat()


def test_a_reply_is_that_of_the_same_conversation(server: Served) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat"}]
    told = server.chat(messages=messages, seed=3, max_tokens=6, temperature=0.7, top_p=0.9).json()
    response = ask(server, instructions="be kind", seed=3, max_output_tokens=6, temperature=0.7, top_p=0.9)
    assert response.output_text == told["choices"][0]["message"]["content"]
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (told["usage"]["prompt_tokens"], 6)
    assert (response.instructions, response.temperature, response.top_p) == ("be kind", 0.7, 0.9)


def test_all_that_shapes_a_reply_is_taken(server: Served) -> None:
    body = {"input": "the cat", "max_output_tokens": 20, "seed": 1}
    shaped = server.http.post("/v1/responses", json=body | SHAPED).json()["output"][0]["content"][0]["text"]
    told = server.chat(messages=[{"role": "user", "content": "the cat"}], seed=1, max_tokens=20, **SHAPED).json()
    assert shaped == told["choices"][0]["message"]["content"]
    assert shaped != ask(server, seed=1, max_output_tokens=20).output_text


def test_a_reply_that_ends_is_completed(server: Served) -> None:
    response = ask(server, text={"format": {"type": "json_schema", "name": "x", "schema": TOWN}}, max_output_tokens=60)
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert response.output[0].status == "completed"
    jsonschema.validate(json.loads(response.output_text), TOWN)


def test_any_json_is_kept() -> None:
    constraint = chat_of(text={"format": {"type": "json_object"}, "verbosity": "medium"}).constraint()
    assert constraint is not None
    assert constraint.kind == "json_object"
    assert chat_of(text={"format": {"type": "text"}}).constraint() is None


def test_a_call_that_is_required_keeps_its_schema(server: Served) -> None:
    response = ask(server, **REQUIRED, seed=4)
    [call] = response.output
    assert (response.status, call.type, call.name, call.status) == ("completed", "function_call", "clock", "completed")
    jsonschema.validate(json.loads(call.arguments), TOWN)
    assert response.output_text == ""


@pytest.mark.parametrize("fields", [{}, {"tools": [CLOCK]}, REQUIRED, {"text": {"format": {"type": "json_object"}}}])
def test_a_stream_tells_the_same_response(server: Served, fields: dict[str, Any]) -> None:
    whole = ask(server, seed=6, **fields)
    told = list(ask(server, seed=6, stream=True, **fields))
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert [event.type for event in told[:2]] == ["response.created", "response.in_progress"]
    last = told[-1]
    assert last.type == f"response.{whole.status}"
    assert without_ids(last.response) == without_ids(whole)
    done = [event.item for event in told if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in last.response.output]
    deltas = [e.delta for e in told if e.type.endswith(".delta")]
    assert "".join(deltas) == whole.output_text or [item.arguments for item in whole.output] == deltas


def without_ids(response: Any) -> dict[str, Any]:
    """All of a response but what differs from one to the next."""
    told = response.to_dict()
    for name in ("id", "created_at", "completed_at", "timings"):
        del told[name]
    for item in told["output"]:
        del item["id"]
        item.pop("call_id", None)
    del told["usage"]["input_tokens_details"]  # the cache
    return dict(told)


def test_the_events_of_a_text_come_in_order(server: Served) -> None:
    names = [event.type.removeprefix("response.") for event in ask(server, stream=True, max_output_tokens=2, seed=6)]
    assert [name for name in names if name != "output_text.delta"] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]


def test_the_events_of_a_call_come_in_order(server: Served) -> None:
    names = [event.type.removeprefix("response.") for event in ask(server, stream=True, **REQUIRED)]
    assert names == [
        *("created", "in_progress", "output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]


def test_items_are_told_as_messages() -> None:
    call = {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "clock", "arguments": '{"town": "Köln"}'}
    said = {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}
    items = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "input_text", "text": "How late is it?"}]},
        {"type": "message", "role": "user", "content": "Quick!"},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [said]},
        call,
        call | {"call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": "12"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "13"}]},
        {"role": "user", "content": "And?"},
    ]
    [prompt] = chat_of(input=items, instructions="be kind").prompts()
    written = '<tool_call>{"name": "clock", "arguments": {"town": "Köln"}}</tool_call>'
    assert list(prompt) == [
        Message("system", "be kind\nbe short"),
        Message("user", "How late is it?\nQuick!"),
        Message("assistant", f"I look.\n{written}\n{written}"),
        Message(
            "user", "<tool_response>\n12\n</tool_response>\n<tool_response>\n13\n</tool_response>\nAnd?"
        ),
    ]  # fmt: skip


def test_a_conversation_goes_on_behind_a_call(server: Served) -> None:
    first = ask(server, **REQUIRED)
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "12"}
    items = [{"role": "user", "content": "the cat"}, *[item.to_dict() for item in first.output], result]
    assert ask(server, input=items, tools=[CLOCK]).usage.output_tokens >= 1


def test_nothing_is_stored(server: Served) -> None:
    response = ask(server, store=True, metadata={"a": "b"})
    assert response.store is False
    assert response.metadata == {"a": "b"}
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.retrieve(response.id)


def test_what_means_nothing_is_accepted(server: Served) -> None:
    fields = {"background": False, "truncation": "disabled", "reasoning": {"effort": None, "summary": "auto"}}
    assert ask(server, **fields, include=["reasoning.encrypted_content"], user="x", service_tier="auto").output


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'none', 'minimal'"),
        ({"include": ["file_search_call.results"]}, "include", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"tools": [CLOCK | {"name": "a clock"}]}, "tools.0.name", "pattern"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "there is no tool 'x'"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "'item_reference' is not supported"),
        ({"input": [{"role": "user"}]}, "input.0", "content: is missing"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0",
            "'input_image' is not supported",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than"),
        ({"temperature": -1}, "temperature", "greater than"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "schema: is missing"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}}, "text.format", "x"),
        ({"model": "gpt-5"}, "model", "there is no 'gpt-5'"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(server: Served, fields: Any, param: str, words: str) -> None:
    with pytest.raises(openai.APIStatusError, match=words) as refused:
        ask(server, **fields)
    assert refused.value.status_code == (404 if param == "model" else 400)
    assert refused.value.param == param
    assert refused.value.body["message"].startswith(param)  # type: ignore[index]


def test_a_stream_that_waits_says_so_and_an_error_is_its_last_event(
    two_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("me_local.server.streams.BEAT", 0.05)
    with served(two_models, limits=Limits(timeout=0.5)) as running:
        tap = Tap(running.ensemble)
        text = running.http.post("/v1/responses", json={"input": "the cat", "stream": True}).text
        tap.let(600)
    assert "\n\n: waiting\n\n" in text
    last = text.rstrip("\n").split("\n")
    assert last[-2] == "event: response.failed"
    response = json.loads(last[-1].removeprefix("data: "))["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "timeout")


def test_an_empty_reply_has_an_empty_text() -> None:
    request = parse(ResponsesRequest, b'{"input": "x"}')
    usage = MemberUsage("a", 1.0, 1, 3, 3, 0, 0.1, 0.1)
    reply = Reply("", "stop", "me", "token", 1, (), (usage,), 1.0)
    whole = ResponseAnswer(request, request.chat()).whole(reply)
    lines = list(ResponseAnswer(request, request.chat()).end(reply))
    last = json.loads(lines[-1].partition("data: ")[2])["response"]
    for told in (whole, last):
        assert [(item["type"], item["content"][0]["text"]) for item in told["output"]] == [("message", "")]
    assert lines[0].startswith("event: response.output_item.added\n")
