"""Ids, prompts and places over HTTP, as llama-server tells them, for one member of an ensemble."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import MESSAGES, Served, Tap, served

from me_local import Message
from me_local.server.app import Access

TAKEN = {"messages": MESSAGES, "chat_template_kwargs": {"tools": 1}}
PART = {"type": "text", "text": "x"}
ASKED = {"prompt": "the cat", "max_tokens": 5, "seed": 1, "stream": True}


@pytest.fixture(scope="module")
def server(two_models: Path) -> Iterator[Served]:
    with served(two_models) as running:
        yield running


@pytest.mark.parametrize("name", ["bpe_a", "spm"])
@pytest.mark.parametrize("text", ["the cat", "Köln 🙂", "<|im_end|>", ""])
def test_ids_of_a_text_and_back(server: Served, name: str, text: str) -> None:
    model = f"me-local/{name}"
    ids = server.http.post("/tokenize", json={"content": text, "model": model}).json()["tokens"]
    member = server.ensemble.members[server.ensemble.names.index(name)]
    assert ids == member.vocabulary.encode(text.encode(), at_start=True)
    back = server.http.post("/v1/detokenize", json={"tokens": ids, "model": model}).json()["content"]
    assert back.removeprefix(" ") == text
    pieces = server.http.post("/tokenize", json={"content": text, "model": model, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    joined = b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces)
    assert joined.decode().removeprefix(" ") == text


def test_the_prompt_of_a_conversation(server: Served) -> None:
    body = {"messages": [*MESSAGES, {"role": "assistant", "content": "It"}], "model": "me-local/bpe_a"}
    prompt = server.http.post("/apply-template", json=body).json()["prompt"]
    messages = [Message("user", MESSAGES[0]["content"])]
    assert prompt == server.ensemble.writers[0].text(messages, {}) + "It"
    assert "<|im_start|>" in prompt


def test_places(server: Served) -> None:
    props = server.http.get("/props").json()
    assert (props["total_slots"], props["default_generation_settings"]) == (1, {"n_ctx": 512})
    assert [member["name"] for member in props["members"]] == ["bpe_a", "spm"]


def test_slots(two_models: Path) -> None:
    """Each place, whether a reply is made there, and how far it is; a balancer may ask for a 503 where none is free."""
    with served(two_models, parallel=2) as server:
        tap = Tap(server.ensemble)
        free = {"id": 0, "n_ctx": 512, "speculative": False, "is_processing": False}
        free |= {"next_token": {"has_next_token": False, "n_decoded": 0}}
        assert server.http.get("/slots").json() == [free, free | {"id": 1}]
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(server.chat, max_tokens=3, seed=1)
            assert tap.begun.wait(30)
            first, second = server.http.get("/v1/slots").json()
            assert (first["is_processing"], second["is_processing"]) == (True, False)
            assert server.http.get("/slots?fail_on_no_slot=1").status_code == 200
            other = pool.submit(server.chat, max_tokens=3, seed=2)
            server.wait_for("running", 2)
            assert server.http.get("/slots").status_code == 200
            full = server.http.get("/slots?fail_on_no_slot=1")
            assert (full.status_code, full.json()["error"]["code"]) == (503, "no_slot")
            tap.let(100)
            assert one.result().status_code == other.result().status_code == 200
        server.wait_for("running", 0)
        assert not any(slot["is_processing"] for slot in server.http.get("/slots").json())


def test_the_place_of_a_reply_tells_its_pieces(server: Served) -> None:
    """Where it is asked for between two pieces."""
    tap = Tap(server.ensemble)
    tap.let(2)
    try:
        with server.http.stream("POST", "/v1/completions", json=ASKED) as answer:
            lines = answer.iter_lines()
            assert all(next(line for line in lines if line).startswith("data: {") for _ in range(2))
            [slot] = server.http.get("/slots").json()
            assert slot["next_token"] == {"has_next_token": True, "n_decoded": 2}
            tap.let(100)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    finally:
        tap.let(1000)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {"content": "a"}, "say which member's: me-local/bpe_a, me-local/spm"),
        ("/tokenize", {"content": "a", "model": "me-local/x"}, "say which member's"),
        ("/tokenize", {}, "content: is missing"),
        ("/detokenize", {"tokens": [-1], "model": "me-local/spm"}, "there are ids from 0"),
        ("/detokenize", {"tokens": [10**30], "model": "me-local/spm"}, "tokens"),
        ("/detokenize", {"tokens": "a", "model": "me-local/spm"}, "tokens"),
        ("/apply-template", {"messages": [], "model": "me-local/spm"}, "messages"),
        ("/apply-template", {"messages": [{"role": "system", "content": "x"}], "model": "me-local/spm"}, "no user"),
        ("/apply-template", TAKEN | {"model": "me-local/spm"}, "chat_template_kwargs: must leave out messages, tools"),
        ("/apply-template", {"messages": [{"role": "user", "content": [PART] * 10_001}]}, "texts are too many"),
    ],
)
def test_what_cannot_be_told(server: Served, path: str, body: dict[str, object], message: str) -> None:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_nothing_is_told_without_the_key(two_models: Path) -> None:
    with served(two_models, Access(key="sesame")) as guarded:
        for path in ("/tokenize", "/detokenize", "/apply-template", "/v1/tokenize"):
            assert guarded.http.post(path, json={}).status_code == 401
        assert guarded.http.get("/props").status_code == 401
