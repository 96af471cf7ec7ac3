"""Models that are unloaded while nobody asks, and others that take their place: nobody's reply is cut by it."""

import asyncio
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import processes
import pytest
from click.testing import CliRunner
from conftest import WriteModels
from served import MESSAGES, Served, Tap, served
from terminals import spawn

from me_local.cli.program import main
from me_local.errors import LoadError
from me_local.server.app import Access
from me_local.server.keeping import Limits

SOON = Limits(idle=0.1)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it does not come to that"


def health(server: Served) -> dict[str, str]:
    return server.http.get("/health").raise_for_status().json()


def models_of(server: Served) -> list[str]:
    return [model["id"] for model in server.http.get("/v1/models").json()["data"]]


def test_after_so_long_models_are_unloaded_and_loaded_by_the_next_request(two_models: Path) -> None:
    with served(two_models, limits=SOON) as server:
        before = server.chat(seed=1).json()
        until(lambda: health(server) == {"status": "ok", "models": "unloaded"})
        server.wait_for("loaded", 0)
        assert models_of(server) == ["me-local", "me-local/bpe_a", "me-local/spm"]
        assert len(server.http.get("/slots").json()) == server.http.get("/props").json()["total_slots"] == 1
        assert server.metric("loaded") == 0  # nobody has asked for a reply
        after = server.chat(seed=1).json()
        assert after["choices"][0]["message"] == before["choices"][0]["message"]
        assert after["system_fingerprint"] == before["system_fingerprint"]
        until(lambda: server.metric("loaded") == 0)
        tokens = server.http.post("/tokenize", json={"model": "me-local/spm", "content": "the cat"})
        assert tokens.json()["tokens"]
        assert server.told[:2] == [
            "unloaded after 0.1 s without a request; the next one loads the models again",
            "loaded again: bpe_a + spm",
        ]


def unload(server: Served) -> str:
    """Unload as if the time were over; how it is then."""
    keeper = server.keeper
    if keeper.held:
        asyncio.run_coroutine_threadsafe(keeper._unload(keeper.held), keeper._loop).result(30)
    return keeper.state


def test_a_reply_that_runs_keeps_its_models(two_models: Path) -> None:
    """Also between the choices of a request, and while a slow client reads."""
    with served(two_models) as server:
        tap = Tap(server.ensemble)
        tap.let(1)
        body = {"model": "me-local", "messages": MESSAGES, "max_tokens": 3, "stream": True, "n": 2, "ignore_eos": True}
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert unload(server) == "loaded"
            tap.let(100)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum('"finish_reason":"length"' in line for line in rest) == 2
        until(lambda: unload(server) == "unloaded")


def test_nothing_of_what_was_unloaded_is_kept(two_models: Path) -> None:
    """Vocabularies and kept states are in Python's memory, which nobody frees but by letting go of them."""
    with served(two_models) as server:
        assert unload(server) == "unloaded"
        assert server.chat().status_code == 200
        held = server.keeper.held
        assert held
        kept = [weakref.ref(each) for each in (held.ensemble, held.worker.states, held.ensemble.members[0])]
        del held
        until(lambda: unload(server) == "unloaded")
        until(lambda: [ref() for ref in kept] == [None] * 3)


def test_all_that_come_meanwhile_wait_for_one_loading(two_models: Path) -> None:
    with served(two_models, limits=SOON) as server, ThreadPoolExecutor(4) as clients:
        until(lambda: health(server).get("models") == "unloaded")
        answers = list(clients.map(lambda seed: server.chat(seed=seed), range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
        assert server.told.count("loaded again: bpe_a + spm") == 1


def test_models_that_cannot_be_loaded_again_are_an_error_each_time(
    two_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(two_models, limits=SOON) as server:
        until(lambda: health(server).get("models") == "unloaded")
        with monkeypatch.context() as patch:
            patch.setattr("me_local.engines.loading.Member", _gone)
            for _ in range(2):
                answer = server.chat()
                assert (answer.status_code, answer.json()["error"]["message"]) == (500, "it is gone")
        assert server.chat().status_code == 200


def _gone(*_: object, **__: object) -> None:
    raise LoadError("it is gone")


def test_a_reload_takes_what_the_file_says_and_lets_replies_finish(write_models: WriteModels) -> None:
    with served(write_models("bpe_a", "spm"), Access("sesame")) as server, ThreadPoolExecutor(1) as client:
        server.http.headers["x-api-key"] = "sesame"
        tap = Tap(server.ensemble)
        first = client.submit(server.chat, max_tokens=4, seed=1, stream=True)
        assert tap.begun.wait(30)
        write_models("spm", "bpe_b")
        answer = server.http.post("/admin/reload")
        assert answer.json() == {"status": "reloaded", "members": ["spm", "bpe_b"]}
        assert server.metric("loaded") == 2
        assert models_of(server) == ["me-local", "me-local/spm", "me-local/bpe_b"]
        assert server.chat().status_code == 200  # while the reply from before goes on
        tap.let(100)
        assert '"member":"bpe_a"' in first.result().text
        until(lambda: server.metric("loaded") == 1)
        assert server.told == ["reloaded: serving spm + bpe_b"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace("weight", "wieght"), '.wieght: unknown key; did you mean "weight"?'),
        (lambda text: text.replace("spm.gguf", "nowhere.gguf"), "nowhere.gguf: there is no such file"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(
    write_models: WriteModels, change: Callable[[str], str], problem: str
) -> None:
    models = write_models("bpe_a", "spm")
    with served(models, Access("sesame")) as server:
        server.http.headers["x-api-key"] = "sesame"
        models.write_text(change(models.read_text()))
        answer = server.http.post("/admin/reload")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "not_reloaded")
        assert error["message"].endswith(problem)
        assert server.told == [f"not reloaded, the models stay as they were: {error['message']}"]
        assert server.metric("loaded") == 1
        assert server.chat().status_code == 200


def test_a_reload_of_what_is_unloaded_loads_it(write_models: WriteModels) -> None:
    with served(write_models("bpe_a", "spm"), limits=SOON) as server:
        until(lambda: health(server).get("models") == "unloaded")
        write_models("spm")
        server.server._hang_up()  # as by a signal, which a thread does not get
        until(lambda: "reloaded: serving spm" in server.told)
        assert server.chat().status_code == 200


def test_a_reload_takes_a_key(two_models: Path) -> None:
    with served(two_models) as server:
        answer = server.http.post("/admin/reload")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_key")
        assert "SIGHUP" in answer.json()["error"]["message"]
    with served(two_models, Access("sesame")) as server:
        assert server.http.post("/admin/reload").status_code == 401
        assert server.told == []


def test_an_end_while_models_are_loaded(two_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for them is told, and what was loaded meanwhile is closed."""
    with served(two_models, limits=SOON) as server, ThreadPoolExecutor(1) as client:
        until(lambda: health(server).get("models") == "unloaded")
        made = server.keeper._make
        made_them: list[object] = []

        def slow(config: object) -> object:
            server.server.should_exit = True
            until(lambda: server.keeper.draining)
            made_them.append(made(config))  # type: ignore[arg-type]
            return made_them[0]

        monkeypatch.setattr(server.keeper, "_make", slow)
        answer = client.submit(server.chat).result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert server.keeper._open == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("0", "'0' is no time: it looks like 90s, 10m or 1h"),
        ("ten", "'ten' is no time"),
        ("-1m", "'-1m' is no time"),
        ("1 m", "'1 m' is no time"),
    ],
)
def test_times_that_are_none(two_models: Path, given: str, told: str) -> None:
    result = CliRunner().invoke(main, ["serve", "--models", str(two_models), "--idle", given])
    assert result.exit_code == 2
    assert told in result.stderr


@pytest.mark.slow
def test_a_process_unloads_and_reloads_by_a_signal(write_models: WriteModels) -> None:
    models = write_models("bpe_a", "spm")
    code = "from me_local.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--models", str(models), "--port", "0", "--idle", "0.2s"]
    with processes.running(command, start_new_session=True, env=os.environ | {"ME_LOCAL_WEIGHTS": "spm=3"}) as process:
        url = process.expect(r"serving bpe_a \+ spm at (\S+)")[1]
        process.expect("unloaded after 0.2 s without a request")
        body = {"messages": MESSAGES, "max_tokens": 3}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        process.expect(r"loaded again: bpe_a \+ spm")
        write_models("bpe_a")  # the weight of a member that is gone
        process.process.send_signal(signal.SIGHUP)
        process.expect(r'not reloaded, the models stay as they were: --weights: unknown member "spm"')
        write_models("spm", "bpe_b")
        process.process.send_signal(signal.SIGHUP)
        process.expect(r"reloaded: serving spm \+ bpe_b")
        told = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["members"]
        assert [member["weight"] for member in told] == pytest.approx([6 / 7, 1 / 7])
        process.process.send_signal(signal.SIGTERM)
        assert process.finish() == 0
    assert "Traceback" not in process.log


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_the_server(two_models: Path, tmp_path: Path) -> None:
    """The signal is the one that asks for a reload; a server that nobody sees would keep its memory for ever."""
    child = spawn(["serve", "--models", str(two_models), "--port", "0"], tmp_path)
    child.expect(r"serving bpe_a \+ spm at ")
    child.kill(signal.SIGHUP)
    child.expect(r"reloaded: serving bpe_a \+ spm")
    os.close(child.child_fd)
    until(lambda: os.waitpid(child.pid, os.WNOHANG)[0])
