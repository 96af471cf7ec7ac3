"""Requests that cannot be answered: the right status, nothing leaked, and the server answers the next one."""

import contextlib
import json
import math
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import MESSAGES, Served, served

from me_local.server import connections, guard
from me_local.server.app import Access

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ALIVE = {"model": "me-local", "messages": MESSAGES, "max_tokens": 1}


@pytest.fixture(scope="module")
def server(two_models: Path) -> Iterator[Served]:
    with served(two_models, Access(hosts=["box.lan"])) as running:
        yield running


def refused(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of an error in OpenAI's shape, which gives nothing away of this machine."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert len(response.text) < 1000
    for inside in ("Traceback", "/tmp", ".py", "site-packages", "pydantic"):
        assert inside not in response.text
    return str(error["message"])


def is_alive(server: Served) -> None:
    assert server.http.post(CHAT, json=ALIVE).status_code == 200


DEEP = b"[" * 100_000 + b"]" * 100_000
BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "broken": (b'{"model": "me-local", ', "not valid JSON"),
    "cut in a text": (b'{"model": "me-lo', "not valid JSON"),
    "list": (b"[]", "object"),
    "null": (b"null", "object"),
    "text": (b'"hello"', "object"),
    "two values": (b"{} {}", "not valid JSON"),
    "deep": (DEEP, "not valid JSON"),
    "deep in a field": (b'{"metadata": ' + DEEP + b"}", "not valid JSON"),
    "half a surrogate": (b'{"model": "\\ud800"}', "not valid JSON"),
    "not UTF-8": (b'{"model": "\xff"}', "not valid JSON"),
    "a byte order mark": (b"\xef\xbb\xbfnothing", "not valid JSON"),
    "NUL": (b"\0" * 1000, "not valid JSON"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(server: Served, name: str) -> None:
    body, message = BODIES[name]
    for path in (CHAT, TEXT):
        response = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert message in refused(response, 400)
    is_alive(server)


TOOL = {"type": "function", "function": {"name": "a"}}
PART = {"type": "text", "text": "a"}
MANY_FIELDS = {str(i): 1 for i in range(257)}
FIELDS: list[tuple[dict[str, Any], str | None, str]] = [
    (MANY_FIELDS, None, "fields are too many, at most 256 are taken"),
    ({"weights": MANY_FIELDS}, "weights", "257 fields are too many, at most 256 are taken"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": True}, "temperature", "number"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": math.nan}, "temperature", "finite"),
    ({"temperature": math.inf}, "temperature", "finite"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater"),
    ({"min_p": 2}, "min_p", "less"),
    ({"max_tokens": -2}, "max_tokens", "greater"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": 10**30}, "max_tokens", ""),
    ({"seed": -2}, "seed", "greater"),
    ({"seed": 10**400}, "seed", ""),
    ({"seed": "1"}, "seed", "integer"),
    ({"n": 0}, "n", "greater"),
    ({"n": 129}, "n", "at most 128"),
    ({"stop": [""]}, "stop.0", "at least 1"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": 5}, "stop", "array"),
    ({"stop": "x" * 1001}, "stop.0", "at most 1000"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"model": None}, "model", "string"),
    ({"model": ["me-local"]}, "model", "string"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "write its text"),
    ({"logit_bias": {"zqzqzq": 1}}, "logit_bias", "a token of no member"),
    ({"logit_bias": {"5": 1}, "model": "me-local/spm", "weights": None, "top_k": 1, "min_p": 2}, "min_p", "less"),
    ({"logit_bias": {"9999": 1}, "model": "me-local/spm"}, "logit_bias", "has no token 9999"),
    ({"logit_bias": [["a", True]]}, "logit_bias", "or false"),
    ({"logit_bias": [["a"]]}, "logit_bias", "a list of pairs"),
    ({"logit_bias": 5}, "logit_bias", "a list of pairs"),
    ({"presence_penalty": 1000}, "presence_penalty", "less"),
    ({"frequency_penalty": "much"}, "frequency_penalty", "number"),
    ({"typical_p": 0}, "typical_p", "greater"),
    ({"repeat_penalty": 1e-320}, "repeat_penalty", "greater than or equal to 0.01"),
    ({"top_n_sigma": 1e308}, "top_n_sigma", "less"),
    ({"dry_base": 0.5}, "dry_base", "greater"),
    ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers.0", "at least 1"),
    ({"min_tokens": -1}, "min_tokens", "greater"),
    ({"unit": "word", "strategy": "ce"}, "unit", "needs strategy"),
    ({"unit": "page"}, "unit", "word"),
    ({"strategy": "average"}, "strategy", "'me', 'ce' or 'union'"),
    ({"weights": {"nobody": 1}}, "weights", "unknown member"),
    ({"weights": {"bpe_a": 0, "spm": 0}}, "weights", "every weight is 0"),
    ({"weights": {"bpe_a": -1}}, "weights.bpe_a", "greater"),
    ({"weights": [1, 2]}, "weights", "object"),
    ({"model": "me-local/spm", "weights": {"spm": 1}}, "weights", "a single member has none"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater"),
    ({"mirostat": 2}, "mirostat", "no such field"),
    ({"mirostat_eta": 0.5}, "mirostat_eta", "no such field"),
    ({"grammar": "start: ("}, "grammar", "grammar"),
    ({"guided_regex": "(("}, "guided_regex", "unclosed group"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_json": {"type": "spoon"}}, "guided_json", "spoon"),
    ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "json_schema", "Unsatisfiable"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "only one of it and guided_regex"),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "no such field"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_object'"),
    ({"x" * 10_000: 1}, "x" * 80 + "…", "no such field"),
]
CHAT_FIELDS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"max_tokens": 0}, "max_tokens", "greater"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "Hi"}, "messages", "array"),
    ({"messages": None}, "messages", "array"),
    ({"messages": [{"role": "user"}]}, "messages.0", "content: is missing"),
    ({"messages": [MESSAGES[0]] * 10_001}, "messages", "10,001 texts are too many, at most 10,000 are taken"),
    ({"messages": [{"role": "user", "content": [PART] * 9_999}, {}, {}]}, "messages", "10,001 texts are too many"),
    ({"messages": [{"role": "user", "content": [PART] * 9_999}, {}]}, "messages.1.role", "is missing"),
    ({"messages": [MANY_FIELDS]}, "messages.0", "257 fields are too many, at most 256 are taken"),
    ({"messages": [{"role": "user", "content": [MANY_FIELDS]}]}, "messages.0.content.0", "257 fields are too many"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0", "content: is missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "neither a text nor a list of parts"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "'system'"),
    ({"messages": [{"role": "user", "content": " "}]}, None, "the prompt is empty"),
    ({"messages": [{"role": "system", "content": "x"}]}, None, "no user message"),
    ({"messages": [*MESSAGES, {"role": "system", "content": "x"}]}, None, "ends with the system"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, None, "no user message"),
    ({"continue_final_message": True}, None, "not the assistant's"),
    ({"messages": [{"role": "user", "content": "x", "file": "/etc/passwd"}]}, "messages.0.file", "no such field"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "'text'"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.function", "is missing"),
    (
        {"messages": [{"role": "user", "content": "cat " * 1000}]},
        None,
        "which exceeds the available context size of 512",
    ),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "is missing"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "match"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice", "no tool 'b'"),
    ({"tools": [TOOL], "json_schema": {}}, "tools", "either these or a structure"),
    ({"tools": [TOOL | {"function": {"name": "a", "parameters": {"type": "spoon"}}}]}, "tools", "spoon"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"verbosity": "high"}, "verbosity", "not supported"),
    ({"modalities": ["audio"]}, "modalities", "not supported"),
    ({"top_logprobs": 5}, "top_logprobs", "only goes with logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "contradicts"),
]
TEXT_FIELDS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": None}, "prompt", "array"),
    ({"prompt": ""}, None, "nothing to complete"),
    ({"prompt": []}, "prompt", "at least 1"),
    (
        {"prompt": [1, 2, 3]},
        None,
        "prompt: ids are those of one vocabulary, and the members have several: name one of them",
    ),
    ({"prompt": [[1], [2]], "echo": True, "logprobs": 1}, None, "name one of them"),
    ({"prompt": [1, 10**6], "model": "me-local/spm"}, None, "prompt: there are ids from 0 to"),
    ({"prompt": [[1], []], "model": "me-local/spm"}, None, "nothing to complete"),
    ({"prompt": [1] * 513, "model": "me-local/spm"}, None, "exceeds the available context size of 512"),
    ({"prompt": [1, True]}, "prompt.0", "neither a text nor a list of ids"),
    ({"prompt": [[1, "x"]]}, "prompt.0", "neither a text nor a list of ids"),
    ({"prompt": ["x"] * 100, "n": 2}, "n", "at most 128"),
    ({"prompt": "cat " * 1000}, None, "exceeds the available context size of 512"),
    ({"echo": "yes"}, "echo", "boolean"),
    ({"echo": True, "logprobs": 1, "prompt": "cat " * 1000}, None, "exceeds the available context size of 512"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"logprobs": True}, "logprobs", "integer"),
]


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [(path, *case) for path in (CHAT, TEXT) for case in FIELDS]
    + [(CHAT, *case) for case in CHAT_FIELDS]
    + [(TEXT, *case) for case in TEXT_FIELDS],
)
def test_fields_that_are_refused(
    server: Served, path: str, fields: dict[str, Any], param: str | None, message: str
) -> None:
    body = {"model": "me-local", **({"messages": MESSAGES} if path == CHAT else {"prompt": "x"})} | fields
    response = server.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert message in refused(response, 400, param)
    is_alive(server)


@pytest.mark.parametrize(
    "model", ["gpt-4o", "", "me-local/", "me-local/../../etc/passwd", "me-local/spm.gguf", "x" * 10**6]
)
def test_models_that_there_are_not(server: Served, model: str) -> None:
    response = server.http.post(CHAT, json=ALIVE | {"model": model})
    assert "there are me-local, me-local/bpe_a, me-local/spm" in refused(response, 404, "model")
    is_alive(server)


def test_fields_without_effect(server: Served) -> None:
    neutral = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "cache_prompt": True,
        "timings_per_token": True, "id_slot": 0, "mirostat": None, "service_tier": "auto", "parallel_tool_calls": True,
        "logit_bias": {}, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "top_p": 1,
        "presence_penalty": 0, "frequency_penalty": 0.0, "repeat_penalty": 1, "repeat_last_n": -1, "typical_p": 1.0,
        "top_n_sigma": -1, "dry_multiplier": 0, "dry_penalty_last_n": 0, "xtc_probability": 0, "min_tokens": 0,
        "ignore_eos": False, "n": 1, "stop": "",
        "seed": -1, "max_tokens": -1, "top_k": -1, "unit": "token", "stream": False,
        "logprobs": False,
    }  # fmt: skip
    assert server.http.post(CHAT, json=ALIVE | neutral).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", CHAT, {}, 405),
        ("DELETE", "/v1/models", {}, 405),
        ("POST", "/v1/embeddings", {}, 404),
        ("POST", "/health", {}, 405),
        ("PUT", "/", {}, 405),
        ("GET", "/nothing", {}, 404),
        ("GET", "/%2e%2e/%2e%2e/app.py", {}, 404),
        ("GET", "/..%2fapp.py", {}, 404),
        ("GET", "/%00", {}, 404),
        ("POST", CHAT, {"Content-Type": "text/plain"}, 415),
        ("POST", CHAT, {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", CHAT, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ("GET", "/v1/models", {"Host": "evil.example"}, 403),
        ("GET", "/", {"Host": "evil.example:8000"}, 403),
        ("GET", "/v1/models", {"Host": "127.0.0.1.evil.example"}, 403),
        ("GET", "/v1/models", {"Host": "[::1"}, 403),
        ("GET", "/v1/models", {"Origin": "https://evil.example"}, 403),
        ("POST", CHAT, {"Origin": "http://localhost.evil.example", "Content-Type": "application/json"}, 403),
        ("GET", "/v1/models", {"Origin": "null"}, 403),
        ("GET", "/v1/models", {"Origin": "http://[::1"}, 403),
        ("OPTIONS", CHAT, {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}, 403),
    ],
)
def test_requests_that_are_refused_by_their_head(
    server: Served, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    refused(server.http.request(method, path, headers=headers), status)
    is_alive(server)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:9", "192.168.1.5", "box.lan:80"])
def test_hosts_that_are_known(server: Served, host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert server.http.get("/v1/models", headers=headers).status_code == 200


def talk(server: Served, data: bytes) -> bytes:
    """What the server answers to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):  # the server may have answered before it has read all
            connection.sendall(data)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
        return received


def post(length: int, body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + body


POST = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
CLOSE = b"Connection: close\r\n\r\n"
BYTES: dict[str, tuple[bytes, int]] = {
    "garbage": (b"\xff\x00garbage\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", 400),
    "no Host": (b"GET /v1/models HTTP/1.1\r\n" + CLOSE, 400),
    "no Host in HTTP/1.0": (b"GET /v1/models HTTP/1.0\r\n\r\n", 403),
    "two Hosts": (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n" + CLOSE, 400),
    "a negative length": (post(-1, b""), 400),
    "no length": (POST + CLOSE, 400),
    "a long header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10**6 + b"\r\n" + CLOSE, 400),
    "many headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 10**5 + CLOSE, 400),
    "a long path": (b"GET /" + b"x" * 10**6 + b" HTTP/1.1\r\nHost: localhost\r\n" + CLOSE, 400),
    "100 MB announced": (post(10**8, b"{"), 413),
    "10**30 bytes announced": (post(10**30, b"{"), 400),
    "a chunk that is none": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "a web socket": (
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n",
        200,
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_request(server: Served, name: str) -> None:
    data, status = BYTES[name]
    received = talk(server, data)
    assert received.startswith(f"HTTP/1.1 {status} ".encode()) or (received == b"" and len(data) > 10**5), received[
        :200
    ]
    assert b"Traceback" not in received
    is_alive(server)


def test_a_large_body_in_chunks_is_not_read_to_its_end(server: Served) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 10**8:
            sent += 2**16
            yield b"x" * 2**16

    try:
        response = server.http.post(CHAT, content=chunks(), headers={"Content-Type": "application/json"})
        refused(response, 413)
    except httpx.TransportError:  # it was still sending when the connection was closed
        pass
    assert guard.LARGEST_BODY < sent < 10**8
    is_alive(server)


@pytest.mark.parametrize("data", [b"", b"POST /v1/chat", post(1000, b'{"model": "me-'), b"GET / HTTP/1.1\r\nX"])
def test_a_request_that_is_never_finished_is_given_up(
    server: Served, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.1)
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.1)
    received = talk(server, data)  # ends: the server closes
    assert received == b"" or received.startswith(b"HTTP/1.1 408 ")
    is_alive(server)


@pytest.mark.parametrize("data", [b"POST /v1/chat", post(1000, b'{"model": "me-'), post(10, b"")])
def test_a_client_that_leaves_in_mid_request(server: Served, data: bytes) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(data)
    is_alive(server)


def test_a_thousand_idle_connections(server: Served) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    idle = []
    try:
        for _ in range(1000):
            idle.append(socket.create_connection(("127.0.0.1", server.port), timeout=60))
        httpx.post(f"{server.url}{CHAT}", json=ALIVE, timeout=60).raise_for_status()
        assert len(server.server.server_state.connections) <= connections.MOST_CONNECTIONS
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    is_alive(server)


@pytest.mark.slow
def test_a_reader_that_stops_is_given_up(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_WRITE_SECONDS", 0.1)
    body = json.dumps(ALIVE | {"max_tokens": 300, "n": 100, "stream": True, "logprobs": True, "top_logprobs": 20})
    with socket.socket() as connection:
        connection.settimeout(60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(post(len(body), body.encode()))
        here, opened = connection.getsockname()[1], server.server.server_state.connections
        server.wait_for("running", 1)
        while here in [each.client[1] for each in list(opened) if each.client]:
            is_alive(server)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received = received[-100:] + part
    assert b"[DONE]" not in received
    is_alive(server)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["temperature", "top_p", "top_k", "min_p", "logit_bias",
         "dry_sequence_breakers", "stop", "seed", "n", "stream", "stream_options", "logprobs",
         "top_logprobs", "strategy", "weights", "unit", "messages", "prompt", "model", "tools", "user"]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from([CHAT, TEXT]), fields=st.dictionaries(st.sampled_from(NAMES), json_values, max_size=3))
def test_any_values_are_answered_or_refused(server: Served, path: str, fields: dict[str, Any]) -> None:
    body = {"model": "me-local", "max_tokens": 1, **({"messages": MESSAGES} if path == CHAT else {"prompt": "x"})}
    content = json.dumps(body | fields).encode()
    response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 200), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_request_is_answered_or_refused(server: Served, at: int, byte: int, cut: bool) -> None:
    body = json.dumps(ALIVE).encode()
    whole = bytearray(post(len(body), body))
    whole[at % len(whole)] = byte
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(whole[:at] if cut else whole)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    assert server.http.get("/health").status_code == 200
