"""Thoughts in what clients get and send: told apart in each protocol, whole and streamed, and switched on and off."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import MESSAGES, Served, served
from thinkers import CLOSES, OPENS, write_thinkers

from me_local import Message, Overrides
from me_local.decoding.reply import MemberUsage, Reply, Step
from me_local.server.answers import Answer
from me_local.server.messages_answers import MessageAnswer
from me_local.server.messages_protocol import MessagesRequest
from me_local.server.protocol import ChatRequest, parse
from me_local.server.responses_answers import ResponseAnswer
from me_local.server.responses_protocol import ResponsesRequest
from me_local.text.thoughts import KINDS, Kind, Thoughts

TAGS, CHANNELS = KINDS[0], KINDS[-1]
USAGE = (MemberUsage("a", 1.0, 1, 3, 3, 0, 0.1, 0.1),)
CALL = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
THINKS = 5  # a seed by which the thought ends, and an answer follows


def scripted(text: str, size: int, kind: Kind = TAGS, head: str = "") -> Reply:
    """A reply in pieces of so many characters, as the engine parts it."""
    thoughts = Thoughts([kind], head)
    cuts = [text[i : i + size] for i in range(0, len(text), size)]
    steps = [Step(cut.encode(), cut, "a", 0.5, (1.0,), (), False, *thoughts.add(cut)) for cut in cuts]
    rest = thoughts.end()
    thought = "".join(step.thought for step in steps) + rest.thought
    answer = "".join(step.answer for step in steps) + rest.answer
    return Reply(text, "length", "me", "token", 7, tuple(steps), USAGE, 2.0, None, thought, answer)


def streamed(reply: Reply, answer: Answer) -> list[dict[str, Any]]:
    """The choices of the chunks behind the opening."""
    chunks = [chunk for step in reply.steps for chunk in answer.pieces(0, step, 0)]
    return [chunk["choices"][0] for chunk in (*chunks, answer.end(0, reply))]


def joined(deltas: list[dict[str, Any]], name: str) -> str:
    return "".join(delta.get(name) or "" for delta in deltas)


SCRIPTS = [
    ("<think>\nhm, é\n</think>\n\nIt is <b>.", TAGS, "", "hm, é", "It is <b>."),
    ("hm\n</think>\n\nIt", TAGS, "<think>\n", "hm", "It"),
    ("hm and", TAGS, "<think>\n", "hm and", ""),
    ("hm</thi", TAGS, "<think>", "hm</thi", ""),
    ("<think>\n\n</think>\n\nIt", TAGS, "", "", "It"),
    (" It is.", TAGS, "", "", " It is."),
    ("<thi", TAGS, "", "", "<thi"),
    ("<think>a</think><response>It is</response>", TAGS, "", "a", "It is"),
    ("<think>a</think>It is</resp", TAGS, "", "a", "It is</resp"),
    (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It",
        CHANNELS,
        "",
        "hm",
        "It",
    ),
]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(("text", "kind", "head", "thought", "answer"), SCRIPTS, ids=range(len(SCRIPTS)))
def test_a_stream_tells_what_the_whole_does(
    text: str, kind: Kind, head: str, thought: str, answer: str, size: int
) -> None:
    reply = scripted(text, size, kind, head)
    whole = Answer("m", chat=True, logprobs=True, n=1).whole([reply])["choices"][0]
    assert whole["message"].get("reasoning_content", "") == thought
    assert whole["message"]["content"] == answer
    assert ("reasoning_content" in whole["message"]) == bool(thought)
    choices = streamed(reply, Answer("m", chat=True, logprobs=True, n=1))
    deltas = [choice["delta"] for choice in choices]
    assert (joined(deltas, "reasoning_content"), joined(deltas, "content")) == (thought, answer)
    order = [name for delta in deltas for name, told in delta.items() if told]
    assert order == sorted(order, reverse=True)  # what is thought comes first
    assert len(choices) == len(reply.steps) + 1
    told = [entry for choice in choices if "logprobs" in choice for entry in choice["logprobs"]["content"]]
    assert told == whole["logprobs"]["content"]


@pytest.mark.parametrize(
    ("text", "head", "logged", "thought"),
    [
        ("<think>\nhm</think>\n\nIt is <b>.", "", "It is <b>.", 20),
        ("hm\n</think>It", "<think>\n", "It", 11),
        ("  It", "", "  It", 0),
        ("<thi", "", "<thi", 0),
        ("hm", "<think>\n", "", 2),
        ("<think></think>It", "", "It", 0),
        ("</think><b>", "<think>", "<b>", 0),
        ("a</think><b>", "<think>", "<b>", 9),
    ],
)
def test_what_of_the_pieces_is_the_answers(text: str, head: str, logged: str, thought: int) -> None:
    """Those that might have begun a mark and did not, too."""
    reply = scripted(text, 1, TAGS, head)
    whole = Answer("m", chat=True, logprobs=True, n=1).whole([reply])
    assert "".join(entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]) == logged
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert whole["usage"]["completion_tokens"] == len(text)


def test_characters_in_two_pieces_belong_to_the_answer_whole() -> None:
    first = Step(b"\xc3", "", "a", 0.5, (1.0,))
    second = Step(b"\xa9", "é", "a", 0.5, (1.0,), answer="é")
    mark = Step(b"</think>", "</think>", "a", 0.5, (1.0,), thought="hm")
    reply = Reply("</think>é", "stop", "me", "token", 7, (mark, first, second), USAGE, 2.0, None, "hm", "é")
    assert reply.thought_pieces == 1


@pytest.mark.parametrize("size", [1, 3, 100])
def test_calls_are_looked_for_behind_the_thought(size: int) -> None:
    reply = scripted(f"Shall I {CALL}?</think>Yes. {CALL}", size, TAGS, "<think>")
    tools = {"chat": True, "logprobs": False, "n": 1, "tools": True}
    message = Answer("m", **tools).whole([reply])["choices"][0]["message"]
    assert message["reasoning_content"] == f"Shall I {CALL}?"
    assert message["content"] == "Yes. "
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["clock"]
    deltas = [choice["delta"] for choice in streamed(reply, Answer("m", **tools))]
    assert joined(deltas, "reasoning_content") == message["reasoning_content"]
    assert joined(deltas, "content") == message["content"]
    assert sum(len(delta.get("tool_calls", ())) for delta in deltas) == 1


@pytest.mark.parametrize("size", [1, 4, 100])
def test_the_marks_stay_where_that_is_asked_for(size: int) -> None:
    text = "hm\n</think>\n\nIt"
    reply = scripted(text, size, TAGS, "<think>\n")
    shape = {"chat": True, "logprobs": True, "n": 1, "apart": False}
    whole = Answer("m", **shape).whole([reply])["choices"][0]
    assert whole["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert len(whole["logprobs"]["content"]) == len(reply.steps)
    deltas = [choice["delta"] for choice in streamed(reply, Answer("m", **shape))]
    assert joined(deltas, "content") == text
    assert joined(deltas, "reasoning_content") == ""


def chat_of(kind: Any, **fields: Any) -> ChatRequest:
    """The request for a conversation that one of another protocol becomes."""
    named = {"input": "Hi"} if kind is ResponsesRequest else {"messages": MESSAGES, "max_tokens": 5}
    chat: ChatRequest = parse(kind, json.dumps(named | fields).encode()).chat()
    return chat


def anthropic(reply: Reply) -> tuple[list[Any], list[Any]]:
    """The content of a message, whole and put together from events."""
    request = parse(MessagesRequest, json.dumps({"messages": MESSAGES, "max_tokens": 5}).encode())
    whole = MessageAnswer(request, request.chat()).whole(reply)["content"]
    answer = MessageAnswer(request, request.chat())
    lines = [*answer.opening(), *(line for step in reply.steps for line in answer.piece(step)), *answer.end(reply)]
    content: list[dict[str, Any]] = []
    closed = []
    for event in (json.loads(line.split("data: ")[1]) for line in lines):
        if event["type"] == "content_block_start":
            assert event["index"] == len(content) == len(closed)
            content.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            kind = content[event["index"]]["type"]
            assert event["delta"].pop("type") == f"{kind}_delta"
            content[event["index"]][kind] += event["delta"][kind]
        elif event["type"] == "content_block_stop":
            closed.append(event["index"])
    assert len(closed) == len(content)
    return whole, content


@pytest.mark.parametrize("size", [1, 4, 100])
def test_anthropics_blocks(size: int) -> None:
    whole, events = anthropic(scripted("<think>hm</think>\nIt", size))
    assert whole == events == [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "It"}]
    whole, events = anthropic(scripted("hm", size, TAGS, "<think>"))
    assert whole == events == [{"type": "thinking", "thinking": "hm", "signature": ""}]
    whole, events = anthropic(scripted("", size))
    assert whole == events == [{"type": "text", "text": ""}]


def responses(reply: Reply) -> tuple[Any, list[Any]]:
    """The response, whole and as events."""
    request = parse(ResponsesRequest, b'{"input": "Hi", "reasoning": {"effort": "low"}}')
    whole = ResponseAnswer(request, request.chat()).whole(reply)
    answer = ResponseAnswer(request, request.chat())
    lines = [*answer.opening(), *(line for step in reply.steps for line in answer.piece(step)), *answer.end(reply)]
    return whole, [json.loads(line.split("data: ")[1]) for line in lines]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_openais_items(size: int) -> None:
    whole, events = responses(scripted("<think>hm</think>\nIt", size))
    thought, message = whole["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"] == "It"
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0 or size == 100
    assert whole["reasoning"]["effort"] == "low"
    kinds = [event["type"].removeprefix("response.") for event in events]
    once = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    assert [kind for kind in once if "text" in kind or "item" in kind] == [
        "output_item.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "output_item.done",
        "output_text.delta",
        "output_text.done",
    ]
    of_thought = [event for event in events if "reasoning_text" in event["type"]]
    assert {(event["output_index"], event["content_index"]) for event in of_thought} == {(0, 0)}
    assert "".join(event.get("delta", "") for event in of_thought) == of_thought[-1]["text"] == "hm"
    assert "logprobs" not in of_thought[0]
    last = events[-1]["response"]["output"]
    assert [item["content"][0]["text"] for item in last] == ["hm", "It"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_a_response_that_was_cut_in_its_thought() -> None:
    whole, events = responses(scripted("hm", 1, TAGS, "<think>"))
    for output in whole["output"], events[-1]["response"]["output"]:
        assert [(item["type"], item["status"]) for item in output] == [("reasoning", "incomplete")]
    assert events[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_of_earlier_replies(name: str) -> None:
    said: list[Any] = [*MESSAGES, {"role": "assistant", "content": "It", name: "hm"}, *MESSAGES]
    [messages] = parse(ChatRequest, json.dumps({"messages": said}).encode()).prompts()
    assert messages[1] == Message("assistant", "It", "hm")


def test_thoughts_of_earlier_replies_in_other_protocols() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "thinking", "thinking": "so", "signature": ""},
        {"type": "text", "text": "It"},
    ]
    [messages] = chat_of(
        MessagesRequest, messages=[*MESSAGES, {"role": "assistant", "content": blocks}, *MESSAGES]
    ).prompts()
    assert messages[1] == Message("assistant", "It", "hm\n\nso")
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    sealed = {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "xyz"}
    call = {"type": "function_call", "call_id": "c", "name": "clock", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "noon"}
    user, it = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It"}
    items = [user, thought, call, result, sealed, it, user, thought, user]
    [messages] = chat_of(ResponsesRequest, input=items).prompts()
    assert [(m.role, m.thought) for m in messages] == [
        ("user", ""),
        ("assistant", "hm"),
        ("user", ""),
        ("assistant", ""),
        ("user", ""),
        ("user", ""),
    ]
    assert messages[1].content.startswith("<tool_call>")
    assert messages[3].content == "It"


def test_what_switches_thinking() -> None:
    def chat(**fields: Any) -> Any:
        return parse(ChatRequest, json.dumps({"messages": MESSAGES} | fields).encode()).template_args()

    assert chat() is None
    assert chat(enable_thinking=False) == {"enable_thinking": False}
    assert chat(chat_template_kwargs={"enable_thinking": False, "x": [1]}) == {"enable_thinking": False, "x": [1]}
    assert chat(reasoning_effort="high") == {"reasoning_effort": "high"}
    assert chat(reasoning_effort="none") == {"reasoning_effort": "none", "enable_thinking": False}
    assert chat(reasoning_effort="none", enable_thinking=True)["enable_thinking"] is True
    assert chat_of(MessagesRequest).template_args() is None
    for kind, on in ("enabled", True), ("adaptive", True), ("disabled", False):
        given = {"type": kind} | ({"budget_tokens": 2000} if kind == "enabled" else {})
        assert chat_of(MessagesRequest, thinking=given).template_args() == {"enable_thinking": on}
    assert chat_of(MessagesRequest, output_config={"effort": "max"}).template_args() == {"reasoning_effort": "max"}
    assert chat_of(ResponsesRequest, reasoning={"effort": "low"}).template_args() == {"reasoning_effort": "low"}


@pytest.fixture(scope="module")
def server(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model that thinks and one that does not."""
    with served(write_thinkers(tmp_path_factory.mktemp("thoughts"), tiny, "spm")) as running:
        yield running


def made(server: Served, **fields: Any) -> Reply:
    prompt = [Message("user", MESSAGES[0]["content"])]
    return server.ensemble.generate(prompt, Overrides(**({"seed": THINKS, "max_tokens": 20} | fields)))


def test_a_conversation(server: Served) -> None:
    reply = made(server)
    assert reply.thought
    assert reply.answer
    fields: dict[str, Any] = {"messages": MESSAGES, "seed": THINKS, "max_tokens": 20, "model": "me-local"}
    answer = server.openai.chat.completions.create(**fields)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == (reply.thought, reply.answer)  # type: ignore[attr-defined]
    assert answer.choices[0].finish_reason == reply.finish_reason
    assert answer.usage.completion_tokens_details.reasoning_tokens == reply.thought_pieces > 0
    chunks = list(server.openai.chat.completions.create(**fields, stream=True))
    deltas = [chunk.choices[0].delta.to_dict() for chunk in chunks]
    assert (joined(deltas, "reasoning_content"), joined(deltas, "content")) == (reply.thought, reply.answer)
    bare = server.chat(**fields, reasoning_format="none").json()["choices"][0]["message"]
    assert bare["content"] == reply.text
    assert CLOSES in bare["content"]
    assert "reasoning_content" not in bare


def test_without_thoughts(server: Served) -> None:
    reply = made(server, template_args={"enable_thinking": False})
    assert not reply.thought
    for fields in {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}:
        answer = server.chat(seed=THINKS, max_tokens=20, **fields).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": reply.text, "refusal": None}
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    body = {"messages": MESSAGES, "max_tokens": 20, "seed": THINKS, "thinking": {"type": "disabled"}}
    assert server.http.post("/v1/messages", json=body).json()["content"] == [{"type": "text", "text": reply.text}]


def test_a_reply_that_is_cut_in_its_thought(server: Served) -> None:
    [choice] = server.chat(seed=THINKS, max_tokens=1).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert choice["message"]["reasoning_content"]


def test_a_structure_holds_behind_the_thought(server: Served) -> None:
    fields = {"seed": THINKS, "max_tokens": 60, "guided_choice": ["yes", "no"]}
    message = server.chat(**fields).json()["choices"][0]["message"]
    assert message["content"] in ("yes", "no")
    assert message["reasoning_content"]


def test_responses_and_messages_tell_the_same(server: Served) -> None:
    reply = made(server)
    response = server.openai.responses.create(
        model="me-local", input=MESSAGES[0]["content"], max_output_tokens=20, extra_body={"seed": THINKS}
    )
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == reply.thought  # type: ignore[union-attr, index]
    assert response.output_text == reply.answer
    body = {"messages": MESSAGES, "max_tokens": 20, "seed": THINKS}
    thought, text = server.http.post("/v1/messages", json=body).json()["content"]
    assert (thought["thinking"], text["text"]) == (reply.thought, reply.answer)


def test_the_history_is_what_the_template_makes_of_it(server: Served) -> None:
    said = [*MESSAGES, {"role": "assistant", "content": "It", "reasoning_content": f"hm {OPENS}"}, *MESSAGES]
    body = {"model": "me-local/thinker", "messages": said}
    prompt = server.http.post("/apply-template", json=body).json()["prompt"]
    assert f"assistant\n<think>\nhm {OPENS}\n</think>\n\nIt<|im_end|>" in prompt
    assert prompt.endswith("assistant\n<think>\n")
    body["chat_template_kwargs"] = {"enable_thinking": False, "reasoning_effort": "low"}
    assert server.http.post("/apply-template", json=body).json()["prompt"].endswith("assistant\n[low]")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "must leave out messages, tools"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "an object"),
        ({"chat_template_kwargs": {str(i): i for i in range(300)}}, "chat_template_kwargs", "256"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
            "enable_thinking",
            "contradicts",
        ),
        ({"enable_thinking": "no"}, "enable_thinking", "valid boolean"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'none', 'minimal'"),
        ({"reasoning_format": "deepseek-legacy"}, "reasoning_format", "'auto', 'deepseek' or 'none'"),
        ({"reasoning_format": "none", "tools": [TOOL]}, "reasoning_format", "does not go with tools"),
        ({"messages": [{"role": "user", "content": "x", "reasoning": "y"}]}, "messages.0", "only the assistant"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "x", "reasoning": "y"}]}, None, "gone on with"),
    ],
)
def test_what_is_refused(server: Served, fields: dict[str, Any], param: str | None, words: str) -> None:
    refused = server.chat(**fields)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param)
    assert words in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/responses", {"input": "Hi", "reasoning": {"effort": "huge"}}, "reasoning.effort"),
        (
            "/v1/messages",
            {"messages": MESSAGES, "max_tokens": 5, "output_config": {"effort": "huge"}},
            "output_config.effort",
        ),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5, "thinking": {"type": "sometimes"}}, "thinking.type"),
    ],
)
def test_what_other_protocols_refuse(server: Served, path: str, fields: dict[str, Any], param: str) -> None:
    refused = server.http.post(path, json=fields)
    assert refused.status_code == 400
    assert param in refused.json()["error"]["message"]
