"""Several replies of the server at once: each is what it would be alone, whatever becomes of the others."""

import asyncio
import json
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from served import Served, Tap, served
from test_server import started

from me_local import Ensemble, Message, Overrides, load
from me_local.cli.program import main
from me_local.server.keeping import Limits

PLENTY = 10**6  # pieces
PROMPTS = ["the cat sat on the mat", "a dog and a cat " * 5, "the boats came home late " * 20, "Hello"]


@pytest.fixture(scope="module")
def alone(two_models: Path) -> Iterator[Ensemble]:
    """The same ensemble, which makes one reply at a time."""
    with load(two_models) as ensemble:
        yield ensemble


def body(seed: int, *, prompt: int | None = None, **fields: object) -> dict[str, Any]:
    """What is asked for a reply to one of the prompts, chosen by the seed if not by its number."""
    messages = [{"role": "user", "content": PROMPTS[(seed if prompt is None else prompt) % len(PROMPTS)]}]
    return {"model": "me-local", "messages": messages, "max_tokens": 30, "seed": seed} | fields


def expected(ensemble: Ensemble, asked: dict[str, Any]) -> str:
    [message] = asked["messages"]
    settings = {key: asked[key] for key in ("seed", "max_tokens", "strategy", "unit") if key in asked}
    return ensemble.generate([Message("user", message["content"])], Overrides(**settings)).text


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@contextmanager
def asking(server: Served, bodies: Sequence[dict[str, Any]]) -> Iterator[list["Future[httpx.Response]"]]:
    """Asks in this order, each once the one before is running or in the queue; nothing goes on until it is let."""
    with ThreadPoolExecutor(len(bodies)) as clients:
        answers: list[Future[httpx.Response]] = []
        for asked in bodies:
            before = server.metric("running") + server.metric("queue_length")
            answers.append(clients.submit(server.http.post, "/v1/chat/completions", json=asked))
            server.wait_for("(?:running|queue_length)", before + 1)
        yield answers


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"strategy": "ce"}, {"unit": "word"}])
def test_requests_at_once_get_what_they_get_alone(
    two_models: Path, alone: Ensemble, settings: dict[str, object]
) -> None:
    bodies = [body(seed, **settings) for seed in range(7)]
    with served(two_models, parallel=4) as server:
        tap = Tap(server.ensemble)
        with asking(server, bodies) as answers:
            assert (server.metric("running"), server.metric("queue_length")) == (4, 3)
            tap.let(PLENTY)
        assert [text_of(answer.result()) for answer in answers] == [expected(alone, asked) for asked in bodies]
        assert (server.metric("running"), server.metric("replies_total")) == (0, 7)
        assert server.metric("wait_seconds_count") == 7


def test_they_are_evaluated_together(two_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(two_models, parallel=4) as server:
        tap = Tap(server.ensemble)
        sizes: list[int] = []
        for member in server.ensemble.members:
            decode = member._decode

            def counted(parts: Sequence[object], decode: Any = decode) -> int:
                sizes.append(len(parts))
                return int(decode(parts))

            monkeypatch.setattr(member, "_decode", counted)
        with asking(server, [body(seed, strategy="ce", stop=[]) for seed in range(4)]) as answers:
            tap.let(PLENTY)
        members = [answer.result().json()["timings"]["members"] for answer in answers]
    calls = sum(member["calls"] for usage in members for member in usage)
    assert max(sizes) == 4
    assert sum(sizes) >= calls
    assert len(sizes) < calls / 2


def test_the_choices_of_a_request_are_made_together(two_models: Path, alone: Ensemble) -> None:
    texts = [expected(alone, body(seed, prompt=0)) for seed in range(5)]
    with served(two_models, parallel=3) as server:
        tap = Tap(server.ensemble)
        with ThreadPoolExecutor(1) as clients:
            answer = clients.submit(server.chat, **body(0, n=5))
            server.wait_for("running", 3)
            tap.let(PLENTY)
        choices = answer.result().json()["choices"]
        assert [choice["message"]["content"] for choice in choices] == texts
        assert [choice["seed"] for choice in choices] == [0, 1, 2, 3, 4]
        streamed = [""] * 5
        roles: list[int] = []
        for chunk in server.openai.chat.completions.create(**body(0, n=5), stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
                roles += [choice.index] if choice.delta.role else []
        assert (streamed, sorted(roles)) == (texts, [0, 1, 2, 3, 4])


@pytest.mark.slow
def test_one_that_goes_away_disturbs_no_other(two_models: Path, alone: Ensemble) -> None:
    bodies = [body(seed) for seed in (1, 2)]
    long = next(asked for seed in range(99) if len(expected(alone, asked := body(seed, max_tokens=200))) > 200)
    with served(two_models, parallel=3) as server, ThreadPoolExecutor(1) as clients:
        tap = Tap(server.ensemble)
        leaving = clients.submit(_leave_after_a_piece, server.url, long)
        server.wait_for("running", 1)
        with asking(server, bodies) as answers:
            tap.let(20)
            leaving.result()
            server.wait_for("running", 2)
            tap.let(PLENTY)
        assert [text_of(answer.result()) for answer in answers] == [expected(alone, asked) for asked in bodies]
        server.wait_for('replies_total{finish_reason="cancelled"}', 1)
        assert text_of(server.http.post("/v1/chat/completions", json=bodies[0])) == expected(alone, bodies[0])


def _leave_after_a_piece(url: str, asked: dict[str, Any]) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked | {"stream": True}, timeout=60) as response:
        assert any('"member"' in line for line in response.iter_lines())


def test_a_member_that_fails_for_one_reply_ends_that_alone(
    two_models: Path, alone: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [body(seed) for seed in range(3)]
    with served(two_models, parallel=3) as server:
        tap = Tap(server.ensemble)
        with asking(server, bodies) as answers:
            for member in server.ensemble.members:
                decode = member._decode

                def failing(parts: Any, decode: Any = decode) -> int:
                    return -3 if any(cache.sequence == 0 for cache, *_ in parts) else int(decode(parts))

                monkeypatch.setattr(member, "_decode", failing)
            tap.let(PLENTY)
        failed, *others = [answer.result() for answer in answers]
        assert failed.status_code == 500
        assert "llama.cpp failed with code -3" in failed.json()["error"]["message"]
        assert [text_of(answer) for answer in others] == [expected(alone, asked) for asked in bodies[1:]]
        assert server.metric('replies_total{finish_reason="error"}') == 1
        monkeypatch.undo()
        assert text_of(server.http.post("/v1/chat/completions", json=bodies[0])) == expected(alone, bodies[0])


def test_an_error_of_the_program_ends_what_runs_and_leaks_nothing(
    two_models: Path, alone: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> None:
        raise KeyError("secret prompt")

    bodies = [body(seed) for seed in range(3)]
    with served(two_models, parallel=2) as server:
        tap = Tap(server.ensemble)
        with asking(server, bodies) as answers:
            monkeypatch.setattr(server.keeper.held.worker._making._batching, "step", failing)
            tap.let(PLENTY)
        assert [answer.result().status_code for answer in answers[:2]] == [500, 500]
        assert "secret" not in answers[0].result().text
        assert text_of(answers[2].result()) == expected(alone, bodies[2])
        assert [text_of(server.http.post("/v1/chat/completions", json=asked)) for asked in bodies] == [
            expected(alone, asked) for asked in bodies
        ]


def test_a_prompt_that_is_too_long_is_refused_while_others_run(two_models: Path, alone: Ensemble) -> None:
    with served(two_models, parallel=2) as server:
        tap = Tap(server.ensemble)
        with asking(server, [body(1)]) as [answer], ThreadPoolExecutor(1) as clients:
            refused = clients.submit(server.chat, messages=[{"role": "user", "content": "cat " * 900}])
            tap.let(PLENTY)
            assert refused.result().json()["error"]["code"] == "context_length_exceeded"
        assert text_of(answer.result()) == expected(alone, body(1))


def test_the_queue_begins_where_the_places_end(two_models: Path) -> None:
    with served(two_models, limits=Limits(queue=1), parallel=2) as server:
        tap = Tap(server.ensemble)
        with asking(server, [body(1)] * 3) as answers:
            assert (server.metric("running"), server.metric("queue_length")) == (2, 1)
            refused = server.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            tap.let(PLENTY)
        assert len({text_of(answer.result()) for answer in answers}) == 1


def test_what_runs_at_the_end_is_finished_and_what_waits_is_not_begun(two_models: Path, alone: Ensemble) -> None:
    bodies = [body(seed) for seed in range(4)]
    with served(two_models, parallel=3) as server:
        tap = Tap(server.ensemble)
        with asking(server, bodies) as answers:
            server.server.should_exit = True
            assert answers[3].result().status_code == 503
            tap.let(PLENTY)
        assert [text_of(answer.result()) for answer in answers[:3]] == [expected(alone, asked) for asked in bodies[:3]]


def test_the_end_of_the_grace_time(two_models: Path) -> None:
    with served(two_models, limits=Limits(grace=0.2), parallel=3) as server:
        tap = Tap(server.ensemble)
        with asking(server, [body(seed) for seed in range(4)]) as answers:
            server.server.should_exit = True
            assert [answer.result().status_code for answer in answers] == [503] * 4
            tap.let(PLENTY)


@pytest.mark.slow
def test_a_time_limit_ends_one_request(two_models: Path) -> None:
    with served(two_models, limits=Limits(timeout=0.5), parallel=2) as server:
        tap = Tap(server.ensemble)
        with asking(server, [body(1), body(2)]) as answers:
            assert [answer.result().json()["error"]["code"] for answer in answers] == ["timeout"] * 2
            tap.let(PLENTY)
        server.wait_for("running", 0)
        end = time.monotonic() + 30
        while server.keeper.held.worker._making.busy:  # one that had not been begun is none, the other was cancelled
            assert time.monotonic() < end
            threading.Event().wait(0.01)


def test_conversations_in_turn_do_not_pay_for_their_prompts_again(two_models: Path) -> None:
    long = "the cat sat on the mat and looked at the dog " * 4
    histories = [[{"role": "system", "content": f"{i} {long}"}] for i in range(3)]
    cached = []
    with served(two_models, parallel=3) as server:
        for turn in range(3):
            for history in histories:
                history.append({"role": "user", "content": f"turn {turn}"})
                answer = server.chat(messages=history, max_tokens=8, strategy="ce", seed=turn).json()
                history.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
                usage = answer["usage"]
                cached.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
    assert max(cached[:3]) < 0.2
    assert min(cached[3:]) > 0.6


@pytest.mark.slow
def test_whoever_stays_gets_what_it_gets_alone(two_models: Path, alone: Ensemble) -> None:
    """50 requests of which every third or so goes away: in the queue, before its first piece, or in the middle."""
    chance = random.Random(7)
    bodies = [body(seed, max_tokens=chance.randint(1, 60), stream=chance.random() < 0.5) for seed in range(50)]
    leaves = [chance.random() < 0.35 for _ in bodies]
    texts = [expected(alone, asked) for asked in bodies]
    with served(two_models, limits=Limits(queue=50), parallel=4) as server:
        results = asyncio.run(_ask_and_leave(server.url, bodies, leaves, chance))
        assert server.chat().status_code == 200
        server.wait_for("running", 0)
    stayed = [index for index, result in enumerate(results) if result is not None]
    assert len(stayed) >= 25
    assert set(stayed) >= {index for index, leaving in enumerate(leaves) if not leaving}
    assert [results[index] for index in stayed] == [texts[index] for index in stayed]


async def _ask_and_leave(
    url: str, bodies: Sequence[dict[str, Any]], leaves: Sequence[bool], chance: random.Random
) -> list[str | None]:
    """The texts of the replies; None for those that went away, one whenever another made progress."""
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        tasks: list[asyncio.Task[str]] = []

        def someone_leaves() -> None:
            going = [task for task, leaving in zip(tasks, leaves, strict=True) if leaving and not task.done()]
            if going:
                chance.choice(going).cancel()

        tasks += [asyncio.create_task(_ask(http, asked, someone_leaves)) for asked in bodies]
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        assert isinstance(result, str | asyncio.CancelledError), result
    return [result if isinstance(result, str) else None for result in results]


async def _ask(http: httpx.AsyncClient, asked: dict[str, Any], progress: Any) -> str:
    if not asked["stream"]:
        text = text_of(await http.post("/v1/chat/completions", json=asked))
        progress()
        return text
    text = ""
    async with http.stream("POST", "/v1/chat/completions", json=asked) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line and line != "data: [DONE]":
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
                if len(text) % 7 == 3:
                    progress()
    return text


@pytest.mark.slow
def test_a_signal_lets_all_that_run_finish(two_models: Path) -> None:
    with started(two_models, "--grace", "20", "--parallel", "3") as (process, client):
        stream = client.chat.completions.create(**body(3, max_tokens=400, n=3), stream=True)
        next(stream)
        process.process.send_signal(signal.SIGTERM)
        ends = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices[0].finish_reason]
        assert len(ends) == 3
        assert process.finish() == 0
    assert "Traceback" not in process.log


def test_what_serve_refuses(two_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(number: str) -> str:
        result = CliRunner().invoke(main, ["serve", "--models", str(two_models), "--port", "0", "--parallel", number])
        assert isinstance(result.exception, SystemExit)
        return result.stderr

    for number in ("0", "257", "two"):
        assert "Invalid value for '--parallel'" in refused(number)
    monkeypatch.setattr("me_local.llama.context.available_memory", lambda: 1_000_000)
    message = refused("200").splitlines()[-1]
    assert "not enough memory: 200 contexts of 512 tokens" in message
    assert message.endswith("lower n_ctx or the number of replies at once")
