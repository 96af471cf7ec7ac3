"""Prompts that are told again in front of their completions, by /v1/completions, and prompts of ids."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_toml
from served import Served, served

from me_local import Overrides
from me_local.asking import Ask, Tokens
from me_local.echoes import echo

TEXT = "The harbour was café 😀 quiet"
NAMED = {"model": "me-local/bpe_a"}


@pytest.fixture(scope="module")
def server(two_models: Path) -> Iterator[Served]:
    with served(two_models) as running:
        yield running


def complete(server: Served, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 4, "seed": 1} | fields
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids_of(server: Served, text: str) -> list[int]:
    ids: list[int] = server.http.post("/tokenize", json={"content": text, **NAMED}).json()["tokens"]
    return ids


def test_the_ensemble_scores_words(server: Served) -> None:
    [choice] = complete(server, TEXT, echo=True, logprobs=2, max_tokens=0)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    listed = choice["logprobs"]
    assert listed["tokens"] == ["The", " harbour", " was", " café", " 😀", " quiet"]
    assert listed["text_offset"] == [0, 3, 11, 15, 20, 22]
    units = echo(server.ensemble, Ask(TEXT, echo="scores")).units
    assert listed["token_logprobs"] == [unit.log_probability for unit in units]
    assert listed["top_logprobs"] == [None] * 6


def test_a_member_scores_its_tokens(server: Served) -> None:
    ids = ids_of(server, TEXT)
    by_text = complete(server, TEXT, echo=True, logprobs=2, **NAMED)["choices"][0]
    by_ids = complete(server, ids, echo=True, logprobs=2, **NAMED)["choices"][0]
    listed = by_ids["logprobs"]
    assert listed["token_logprobs"][: len(ids)] == by_text["logprobs"]["token_logprobs"][: len(ids)]
    assert listed["token_logprobs"][0] is listed["top_logprobs"][0] is None
    for log, top in zip(listed["token_logprobs"][1 : len(ids)], listed["top_logprobs"][1 : len(ids)], strict=True):
        assert len(top) == 2
        assert log <= max(top.values()) < 0
    for choice in (by_text, by_ids):
        assert choice["text"].startswith(TEXT)
        entries = choice["logprobs"]
        assert len({len(values) for values in entries.values()}) == 1
        assert entries["text_offset"][len(ids)] == len(TEXT)
    assert by_text["text"] == by_ids["text"]  # these ids are those of the text


def test_pieces_follow_the_prompt_as_they_do_without_it(server: Served) -> None:
    alone = complete(server, TEXT, logprobs=1)["choices"][0]
    for logprobs in (None, 1):
        choice = complete(server, TEXT, echo=True, logprobs=logprobs)["choices"][0]
        assert choice["text"] == TEXT + alone["text"]
    assert choice["logprobs"]["tokens"][6:] == alone["logprobs"]["tokens"]
    assert choice["logprobs"]["token_logprobs"][6:] == alone["logprobs"]["token_logprobs"]


def test_several_prompts_and_choices(server: Served) -> None:
    given = [ids_of(server, "the cat"), ids_of(server, "a dog")]
    answer = complete(server, given, echo=True, logprobs=0, max_tokens=1, n=2, **NAMED)
    assert [choice["text"][:5] for choice in answer["choices"]] == ["the c", "the c", "a dog", "a dog"]
    assert all(choice["logprobs"]["token_logprobs"][1] < 0 for choice in answer["choices"])
    plain = complete(server, given, max_tokens=1, n=2, **NAMED)
    assert [c["text"] for c in answer["choices"]] == [
        text + c["text"] for text, c in zip(("the cat", "the cat", "a dog", "a dog"), plain["choices"], strict=True)
    ]


def test_the_end_stands_behind_the_prompt(server: Served) -> None:
    """A client that leaves out the last entry, as lm-eval does, leaves out no token of the prompt."""
    vocabulary = server.ensemble.members[0].vocabulary
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 1, "top_k": 0, **NAMED}
    choices = [c for seed in (0, 128, 256) for c in complete(server, "the", seed=seed, n=128, **fields)["choices"]]
    choice = next(choice for choice in choices if choice["finish_reason"] == "stop")
    assert choice["text"] == "the"
    listed = choice["logprobs"]
    assert listed["tokens"] == [*[vocabulary.pieces[i].decode() for i in ids_of(server, "the")], ""]
    assert listed["token_logprobs"][-1] < 0
    [streamed] = [c for c in chunks(server, "the", **fields | {"seed": choice["seed"]}) if c["finish_reason"]]
    assert streamed["logprobs"] == {key: values[-1:] for key, values in listed.items()}


def chunks(server: Served, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": prompt, "max_tokens": 4, "seed": 1, "stream": True} | fields
    lines = server.http.post("/v1/completions", json=body).text.split("\n\n")
    return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("prompt", [TEXT, "ids"])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_streams_are_the_answer_in_parts(server: Served, prompt: str, logprobs: int | None) -> None:
    given = ids_of(server, TEXT) if prompt == "ids" else prompt
    fields: dict[str, Any] = {"echo": True, "logprobs": logprobs, **NAMED}
    [whole] = complete(server, given, **fields)["choices"]
    told = chunks(server, given, **fields)
    assert told[0]["text"] == TEXT
    assert "".join(choice["text"] for choice in told) == whole["text"]
    if logprobs:
        for key, values in whole["logprobs"].items():
            assert [value for choice in told for value in choice["logprobs"][key]] == values


def test_ids_of_a_vocabulary_that_all_share(tiny: dict[str, Path], tmp_path: Path) -> None:
    """They need no name of a member, and get the ensemble's own likelihoods; several at once, too."""
    models = write_toml(tmp_path, tiny, "bpe_a", "bpe_b", weights=[0.3, 0.7], top="", member="")
    with served(models, parallel=2) as server:
        ids = server.http.post("/tokenize", json={"content": TEXT}).json()["tokens"]
        [choice] = complete(server, ids, echo=True, logprobs=1, max_tokens=0)["choices"]
        units = echo(server.ensemble, Ask(Tokens(tuple(ids)), Overrides(), 1, "scores")).units
        assert choice["logprobs"]["token_logprobs"] == [unit.log_probability for unit in units]
        many = complete(server, [ids, ids], echo=True, logprobs=1, max_tokens=3)["choices"]
        assert [c["text"][: len(TEXT)] for c in many] == [TEXT, TEXT]
        assert many[0]["logprobs"]["token_logprobs"][: len(ids)] == choice["logprobs"]["token_logprobs"]
