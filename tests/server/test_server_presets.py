"""Presets as models of the server: "me-local:NAME"."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_toml
from served import MESSAGES, Served, served

from me_local import Message, Overrides
from me_local.server.app import Access

TOP = """
[sampling]
ignore_eos = true
max_tokens = 9

[presets.code]
max_tokens = 4
temperature = 0.5
strategy = "ce"
system = "on the mat"
weights = { bpe_a = 3, spm = 1 }
"""


@pytest.fixture(scope="module")
def server(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = write_toml(tmp_path_factory.mktemp("presets"), tiny, "bpe_a", "spm", weights=None, top=TOP, member="")
    with served(models, Access(aliases=["gpt"])) as running:
        yield running


def test_they_are_listed_and_described(server: Served) -> None:
    listed = {model["id"]: model for model in server.http.get("/v1/models").json()["data"]}
    assert list(listed) == ["me-local", "gpt", "me-local:code", "me-local/bpe_a", "me-local/spm"]
    described = server.http.get("/v1/models/me-local:code").json()
    assert described == listed["me-local:code"]
    assert (described["strategy"], described["max_tokens"]) == ("ce", 4)
    assert [member["weight"] for member in described["members"]] == [0.75, 0.25]
    assert [member["sampling"]["temperature"] for member in described["members"]] == [0.5, 0.5]
    assert listed["me-local"]["max_tokens"] == 9


def text(server: Served, **fields: object) -> str:
    body = {"messages": MESSAGES, "seed": 1} | fields
    answer = server.http.post("/v1/chat/completions", json=body).raise_for_status().json()
    found = answer["choices"][0]["message"]["content"]
    assert isinstance(found, str)
    return found


def direct(server: Served, messages: list[Message], **settings: object) -> str:
    return server.ensemble.generate(messages, Overrides(seed=1, **settings)).text  # type: ignore[arg-type]


def test_a_request_for_it_gets_its_settings_and_goes_before_them(server: Served) -> None:
    asked = [Message("user", "the cat sat on the mat")]
    code = {"strategy": "ce", "temperature": 0.5, "weights": {"bpe_a": 3, "spm": 1}}
    system = [Message("system", "on the mat"), *asked]
    assert text(server, model="me-local:code") == direct(server, system, max_tokens=4, **code)
    own = {"max_tokens": 6, "temperature": 1.5, "weights": {"bpe_a": 1, "spm": 1}, "strategy": "me"}
    assert text(server, model="me-local:code", **own) == direct(server, system, **own)
    mine = [{"role": "system", "content": "the cat"}, *MESSAGES]
    with_mine = [Message("system", "the cat"), *asked]
    assert text(server, model="me-local:code", messages=mine) == direct(server, with_mine, max_tokens=4, **code)
    assert text(server, model="me-local") == direct(server, asked)


def test_other_protocols_have_them_too(server: Served) -> None:
    ask = {"model": "me-local:code", "messages": MESSAGES, "max_tokens": 3, "seed": 1}
    answer = server.http.post("/v1/messages", json=ask).raise_for_status().json()
    assert answer["content"][0]["text"] == text(server, model="me-local:code", max_tokens=3)
    raw = {"model": "me-local:code", "prompt": "the cat", "seed": 1}
    completion = server.http.post("/v1/completions", json=raw).raise_for_status().json()
    assert completion["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("name", ["me-local:cod", "me-local:", "gpt:code", "me-local/code"])
def test_one_that_there_is_not(server: Served, name: str) -> None:
    answer = server.chat(model=name)
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert f"there is no '{name}'; there are me-local, gpt, me-local:code, me-local/bpe_a" in message
