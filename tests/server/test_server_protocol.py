"""Requests as typed models, and replies in OpenAI's shapes, on values worked out by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers

from me_local.decoding.reply import MemberUsage, Reply, Step
from me_local.errors import ConfigError, InputError, PromptTooLongError, RunError
from me_local.server.answers import Answer, timings
from me_local.server.app import Access
from me_local.server.guard import Gate
from me_local.server.metrics import Metrics
from me_local.server.protocol import ChatRequest, CompletionRequest, parse
from me_local.server.refusals import ApiError, api_error


def usage(
    member: str, *, prompt: int, evaluated: int, calls: int = 1, pieces: float = 1.0, weight: float = 0.5
) -> MemberUsage:
    return MemberUsage(member, pieces, calls, prompt, evaluated, 2, 0.5, 0.25, weight)


def reply(*usages: MemberUsage, seed: int = 7) -> Reply:
    steps = (
        Step("é".encode()[:1], "", "a", 0.5, (1.0, 0.0), (("é".encode()[:1], 0.5), (b"x", 0.25))),
        Step("é".encode()[1:], "é", "b", 1.0, (0.0, 1.0), ((b"\xa9", 1.0),), answer="é"),
        Step(b" x", " x", "b", 0.25, (0.0, 1.0), ((b"", 0.5), (b" x", 0.25)), answer=" x"),
    )
    return Reply("é x", "length", "me", "token", seed, steps, usages, 2.0, answer="é x")


def answer(*, chat: bool = True, logprobs: bool = False, n: int = 1) -> Answer:
    return Answer("me-local", chat=chat, logprobs=logprobs, n=n)


@pytest.mark.parametrize("calls", [0, 1])
def test_usage_is_that_of_the_member_with_most_tokens_whichever_ran(calls: int) -> None:
    none = usage("c", prompt=99, evaluated=0, calls=0, pieces=0, weight=0)
    made = reply(usage("a", prompt=10, evaluated=10), usage("b", prompt=20, evaluated=5, calls=calls, pieces=2), none)
    whole = answer().whole([made])
    assert whole["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 3,
        "total_tokens": 23,
        "prompt_tokens_details": {"cached_tokens": 15 * calls},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_a_prompt_counts_once_however_many_replies_it_got() -> None:
    first, second = reply(usage("a", prompt=10, evaluated=10)), reply(usage("a", prompt=10, evaluated=1))
    third = reply(usage("a", prompt=30, evaluated=29))
    whole = answer(chat=False, n=2).whole([first, second, third, third])
    assert whole["usage"]["prompt_tokens"] == 10 + 30
    assert whole["usage"]["completion_tokens"] == 12
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 + 1


def test_some_of_a_prompt_evaluated_twice_is_not_less_than_nothing_cached() -> None:
    assert usage("a", prompt=10, evaluated=12).prompt_cached == 0
    assert usage("a", prompt=10, evaluated=0, calls=0).prompt_cached == 0


def test_timings_add_up() -> None:
    made = reply(usage("a", prompt=10, evaluated=4), usage("b", prompt=20, evaluated=5, pieces=2))
    total = timings([made, made])
    assert (total["seconds"], total["prompt_seconds"], total["decode_seconds"]) == (4.0, 2.0, 3.0)
    assert total["pieces_per_second"] == 6 / 2
    assert total["members"][1] == {
        "member": "b",
        "pieces": 4,
        "calls": 2,
        "prompt_tokens": 40,
        "prompt_evaluated": 10,
        "text_evaluated": 4,
    }


def test_timings_have_the_names_of_llama_server() -> None:
    total = timings([reply(usage("a", prompt=10, evaluated=4), usage("b", prompt=20, evaluated=5, calls=0))])
    assert total["cache_n"] == 6
    assert [total[f"prompt_{name}"] for name in ("n", "ms", "per_token_ms", "per_second")] == [
        9, 1000, pytest.approx(1000 / 9), 9,
    ]  # fmt: skip
    assert [total[f"predicted_{name}"] for name in ("n", "ms", "per_token_ms", "per_second")] == [
        3, 1000, pytest.approx(1000 / 3), 3,
    ]  # fmt: skip
    none = timings([Reply("", "length", "me", "token", 1, (), (usage("a", prompt=10, evaluated=0, calls=0),), 0.0)])
    assert none["predicted_per_token_ms"] == none["predicted_per_second"] == none["prompt_per_token_ms"] == 0


def test_logprobs_of_a_conversation() -> None:
    [choice] = answer(logprobs=True).whole([reply(usage("a", prompt=1, evaluated=1))])["choices"]
    first, second, third = choice["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("\ufffd", [0xC3], math.log(0.5))
    assert first["top_logprobs"][1] == {"token": "x", "logprob": math.log(0.25), "bytes": [120]}
    assert second["logprob"] == 0
    assert third["top_logprobs"][0] == {"token": "", "logprob": math.log(0.5), "bytes": []}
    assert (choice["message"]["content"], choice["finish_reason"], choice["seed"]) == ("é x", "length", 7)


def test_logprobs_of_a_completion() -> None:
    [choice] = answer(chat=False, logprobs=True).whole([reply(usage("a", prompt=1, evaluated=1))])["choices"]
    assert choice["logprobs"]["tokens"] == ["\ufffd", "\ufffd", " x"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    assert choice["logprobs"]["top_logprobs"][2] == {"": math.log(0.5), " x": math.log(0.25)}


def test_a_chunk_says_who_wrote_it() -> None:
    step = reply().steps[2]
    [chunk] = answer().pieces(1, step, 1)
    [choice] = chunk["choices"]
    assert choice == {
        "index": 1,
        "delta": {"content": " x"},
        "finish_reason": None,
        "member": "b",
        "probability": 0.25,
        "shares": [0.0, 1.0],
    }


def parsed(kind: type[Any], text: str) -> Any:
    return parse(kind, text.encode())


def test_messages_of_a_conversation() -> None:
    request = parsed(
        ChatRequest,
        '{"model": "m", "messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": '
        '[{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]}',
    )
    [messages] = request.prompts()
    assert [(m.role, m.content) for m in messages] == [("system", "be brief"), ("user", "one\ntwo")]


@pytest.mark.parametrize(
    "messages", [[{}] * 10_000, [1] * 10_000, [{"role": "user", "content": [{}] * 10_000}]], ids=["{}", "1", "parts"]
)
def test_only_the_first_fault_of_many_is_looked_into(messages: list[object]) -> None:
    """A report on each of them, of which one is told, takes many seconds where there are a million."""
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate({"model": "m", "messages": messages})
    assert refused.value.error_count() <= 2


def test_replies_that_are_asked_for() -> None:
    ensemble = SimpleNamespace(names=("a", "b"), config=None, with_overrides=lambda _: None)
    request = parsed(CompletionRequest, '{"model": "me-local/b", "prompt": ["x", "y"], "n": 2, "seed": 5, "stop": "z"}')
    asks = request.asks(ensemble)
    assert [(ask.prompt, ask.overrides.seed) for ask in asks] == [("x", 5), ("x", 6), ("y", 7), ("y", 8)]
    assert {ask.overrides.stop for ask in asks} == {("z",)}
    assert asks[0].overrides.weights == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (PromptTooLongError("long"), 400, "context_length_exceeded", None),
        (InputError("empty"), 400, None, None),
        (ConfigError("--weights: unknown member"), 400, None, "weights"),
        (RunError("broke"), 500, None, None),
    ],
)
def test_what_errors_become(error: Exception, status: int, code: str | None, param: str | None) -> None:
    refusal = api_error(error)  # type: ignore[arg-type]
    assert (refusal.status, refusal.code, refusal.param) == (status, code, param)
    assert refusal.as_dict()["error"]["type"] == ("server_error" if status == 500 else "invalid_request_error")


def test_an_error_says_when_to_come_back() -> None:
    refusal = ApiError(429, "full", retry=3)
    assert (refusal.headers, refusal.as_dict()["error"]["type"]) == ({"Retry-After": "3"}, "rate_limit_error")


@pytest.mark.parametrize(
    ("host", "origin", "known"),
    [
        ("localhost", None, True),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", False),
        ("127.0.0.1:8000", "http://localhost:8000", False),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("box.lan", "https://app.example", True),
        ("BOX.lan:8000", None, True),
        ("box.lan.evil.example", None, False),
        ("box.lan@evil.example", None, False),
        ("evil.example", "http://evil.example", False),  # a name that was rebound to this machine
        ("", None, False),
        ("localhost", "null", False),
        ("localhost", "", False),
    ],
)
def test_hosts_and_origins(host: str, origin: str | None, known: bool) -> None:
    access = Access(hosts=["box.lan"], origins=["https://app.example"])
    gate = Gate(lambda *_: None, Metrics(), access.hosts, access.origins)  # type: ignore[arg-type, return-value]
    headers = Headers({"host": host} | ({} if origin is None else {"origin": origin}))
    if known:
        gate._check(headers)
    else:
        with pytest.raises(ApiError) as refused:
            gate._check(headers)
        assert refused.value.status == 403
