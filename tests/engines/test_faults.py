"""What goes wrong with a member elsewhere is one line, or a pause: nothing is lost, nothing is doubled.

A real llama-server answers; `between` breaks its answers, or stands for it where it is away.
"""

import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import between as faults
import pytest
from between import LIMIT, Between, between, changed, content, status
from commands import Run, jsonl, one_line, records
from processes import running
from remote import PROGRAM, llama_server

from me_local import Ensemble, LoadError, Overrides, RunError, load
from me_local.decoding.reply import ReplyStream
from me_local.engines import connection

pytestmark = [pytest.mark.llama_server, pytest.mark.slow, pytest.mark.timeout(90)]

OPTIONS = ("-np", "3", "-c", "1536", "-ctk", "f32", "-ctv", "f32", "-fa", "off")
SETTINGS = Overrides(seed=4, max_tokens=12)
PROMPT = "the cat"

OpenFaulty = Callable[..., Ensemble]
WriteFaulty = Callable[..., Path]


@pytest.fixture(scope="module")
def real(tiny: dict[str, Path]) -> Iterator[str]:
    with llama_server(tiny["bpe_c"], *OPTIONS) as url:
        yield url


@pytest.fixture
def server(real: str) -> Iterator[Between]:
    with between(real) as running_server:
        yield running_server


@pytest.fixture
def write_faulty(tiny: dict[str, Path], tmp_path: Path) -> WriteFaulty:
    """A models.toml of a member behind an address, and one here."""

    def write(url: str, member: str = "", top: str = "") -> Path:
        path = tmp_path / "faulty.toml"
        path.write_text(
            f'{top}\n[[members]]\nname = "there"\npath = "{tiny["bpe_c"]}"\nurl = "{url}"\n{member}\n'
            f'[[members]]\nname = "here"\npath = "{tiny["spm"]}"\nn_threads = 1\nn_ctx = 512\n'
        )
        return path

    return write


@pytest.fixture
def open_faulty(write_faulty: WriteFaulty, server: Between) -> Iterator[OpenFaulty]:
    with ExitStack() as stack:
        yield lambda member="", batch=1: stack.enter_context(load(write_faulty(server.url, member), batch=batch))


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 10.0)
    monkeypatch.setattr(connection, "_PAUSE", 0.05)


def broken(stream: ReplyStream, *begun: bytes) -> str:
    """The error in which a reply ends; what was written before is still there."""
    pieces = list(begun)
    with pytest.raises(RunError) as error:  # noqa: PT012
        for step in stream:
            pieces.append(step.piece)
    assert stream.reply.finish_reason == "error"
    assert [step.piece for step in stream.reply.steps] == pieces
    return str(error.value)


def told(ensemble: Ensemble, **settings: Any) -> tuple[Any, ...]:
    """The pieces of a reply with what each was drawn from, and the predictions that were made for them."""
    reply = ensemble.generate(PROMPT, Overrides(seed=4, max_tokens=20, **settings), raw=True)
    steps = [(step.piece, step.member, round(step.probability, 4)) for step in reply.steps]
    return steps, [usage.calls for usage in reply.usage]


# Gone in mid-reply


@pytest.mark.parametrize("strategy", ["me", "ce"])
@pytest.mark.parametrize(
    "fault",
    [
        faults.dropped,
        faults.cut,
        faults.endless_headers,
        content(b'{"completion_probabilities": ['),
        content(b"not JSON"),
        status(429, b'{"error": {"message": "too many"}}', Retry_After="0"),
        status(503, b'{"error": {"message": "Loading model"}}'),
        status(502, b"<html>Bad gateway</html>", Retry_After="Fri, 01 Jan 2100 00:00:00 GMT"),
    ],
    ids=["lost", "cut", "headers", "truncated", "no JSON", "429", "503", "502"],
)
def test_a_reply_goes_on_as_if_nothing_had_been(
    open_faulty: OpenFaulty, server: Between, fault: faults.Fault, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = told(open_faulty(), strategy=strategy)
    ensemble = open_faulty()
    server.reached.clear()
    server.faults = [None, fault, fault]
    assert told(ensemble, strategy=strategy) == undisturbed
    assert server.reached.is_set()
    assert not server.faults


def test_a_server_that_is_back_in_time(
    tiny: dict[str, Path], write_faulty: WriteFaulty, open_faulty: OpenFaulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = told(open_faulty())
    with ExitStack() as stack:
        first = stack.enter_context(started(tiny["bpe_c"]))
        ensemble = stack.enter_context(load(write_faulty(first.url)))
        stream = ensemble.stream(PROMPT, Overrides(seed=4, max_tokens=20), raw=True)
        pieces = [next(stream).piece for _ in range(3)]
        first.stop()
        back = threading.Timer(0.5, lambda: stack.enter_context(started(tiny["bpe_c"], first.port)))
        back.start()
        pieces += [step.piece for step in stream]
        back.join(LIMIT)
        assert pieces == [piece for piece, *_ in undisturbed[0]]
        assert [usage.calls for usage in stream.reply.usage] == undisturbed[1]  # nothing is asked twice


def test_a_server_that_runs_another_model_when_it_is_back(
    tiny: dict[str, Path], write_faulty: WriteFaulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other, problem in (
        ("spm", "a model with another vocabulary"),
        ("bpe_c_too", "another model than before: load"),
    ):
        with started(tiny["bpe_c"]) as first, load(write_faulty(first.url)) as ensemble:
            stream = ensemble.stream(PROMPT, SETTINGS, raw=True)
            pieces = [next(stream).piece for _ in range(3)]
            first.stop()
            with started(other_weights(tiny) if other == "bpe_c_too" else tiny[other], first.port):
                error = broken(stream, *pieces)
            assert re.match(rf'member "there": http://\S+: runs {problem}', error), error


def other_weights(tiny: dict[str, Path]) -> Path:
    """A model of the same vocabulary and the same name as bpe_c, which therefore differs by its numbers alone."""
    import make_tiny_models
    from make_tiny_models import MODELS

    recipe = MODELS["bpe_c"]
    folder = tiny["bpe_c"].parent / "other"
    folder.mkdir(exist_ok=True)
    path, vocab = folder / "bpe_c.gguf", recipe.vocab()
    make_tiny_models.write_model(path, vocab=vocab, model=recipe.weights(vocab, 99), chat_template=recipe.chat_template)
    return path


class Started:
    """A llama-server that may be stopped before its block ends."""

    def __init__(self, url: str, stop: Callable[[], None]) -> None:
        self.url, self.stop = url, stop
        self.port = int(url.rpartition(":")[2])


@contextmanager
def started(model: Path, port: int = 0) -> Iterator[Started]:
    options = ["--host", "127.0.0.1", "--port", port, "-np", "1", "-c", "512", "--threads", "1", "--no-warmup"]
    options += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    with running([PROGRAM, "--model", str(model), *map(str, options)]) as process:
        url = process.expect(r"listening on (http://\S+)")[1]

        def stop() -> None:
            process.process.kill()
            process.process.wait(LIMIT)

        yield Started(url, stop)


def test_a_server_that_does_not_come_back(
    open_faulty: OpenFaulty, server: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    ensemble = open_faulty()
    stream = ensemble.stream(PROMPT, SETTINGS, raw=True)
    pieces = [next(stream).piece for _ in range(2)]
    server.always = faults.dropped
    error = broken(stream, *pieces)
    assert re.fullmatch(r'member "there": http://\S+: cannot be reached: .* was not back within 0 s', error), error
    server.always = None
    assert ensemble.generate(PROMPT, SETTINGS, raw=True).finish_reason in ("length", "stop")  # and is there again


def test_in_a_batch_the_others_go_on(open_faulty: OpenFaulty, server: Between) -> None:
    ensemble = open_faulty(batch=3)
    server.faults = [None] * 4 + [changed(lambda answer: answer.pop("completion_probabilities") and None)]
    found = list(ensemble.generate_many([PROMPT] * 5, SETTINGS, raw=True))
    assert sorted(one.index for one in found) == list(range(5))
    errors = [str(one.error) for one in found if one.error]
    assert len(errors) == 1
    assert "gives no probabilities" in errors[0]


# Away, slow, or in the way, when it is asked for the first time


def test_nobody_is_there(write_faulty: WriteFaulty, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    one_line(
        run("generate", "Hi", models=write_faulty(url)), 2, f'member "there": {url}: cannot be reached:', "refused"
    )


def test_a_name_that_nobody_has(write_faulty: WriteFaulty) -> None:
    with pytest.raises(LoadError, match=r'^member "there": http://no-such\.invalid:1: cannot be reached: '):
        load(write_faulty("http://no-such.invalid:1"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://127.0.0.1:port", "http://[::1"])
def test_addresses_that_are_none(write_faulty: WriteFaulty, url: str) -> None:
    with pytest.raises(LoadError, match=r'^member "there": http://\S+: url: ') as error:
        load(write_faulty(url))
    assert "\n" not in str(error.value)


def test_a_listener_that_never_answers(write_faulty: WriteFaulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(LoadError, match=r"/props took more than 0 s$"):
            load(write_faulty(url))


@pytest.mark.parametrize("fault", [faults.hanging, faults.dripping])
def test_a_step_that_takes_too_long(
    open_faulty: OpenFaulty, server: Between, monkeypatch: pytest.MonkeyPatch, fault: faults.Fault
) -> None:
    ensemble = open_faulty()
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.4)
    server.faults = [None, fault]
    with pytest.raises(RunError, match=r'^member "there": http://\S+: /completion took more than 0 s$'):
        ensemble.generate(PROMPT, SETTINGS, raw=True)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (status(404), "has no /props: is the engine what `engine` says it is?"),
        (status(302, Location="http://127.0.0.1:1/"), "/props answers with a redirect, which is not followed"),
        (status(500, b'{"error": {"message": "out of\x1b[31m order"}}'), "/props answers with status 500: "),
        (status(503, b'{"error": {"message": "Loading model"}}'), "is busy (status 503: Loading model)"),
        (status(204), "/props answers with status 204"),
        (content(b"[]"), "/props answers with something else than an object"),
        (content(b"[" * 100_000), "/props answers with something that is not JSON"),
        (content(b"\xff\xfe"), "/props answers with something that is not JSON"),
        (content(b"{}"), "/props gives something else than this engine does"),
        (content(b'{"role": "router", "model_path": "none"}'), "has several models: name one by model"),
        (
            changed(lambda answer: answer["default_generation_settings"].update(n_ctx=0)),
            "/props does not say how large",
        ),
        (changed(lambda answer: answer.update(total_slots=True)), "/props does not say how large"),
        (changed(lambda answer: answer.update(total_slots=1e9)), "/props does not say how large"),
        (faults.huge, "answers with more than 32 MB"),
    ],
)
def test_what_is_no_llama_server_is_one_line(
    write_faulty: WriteFaulty, server: Between, fault: faults.Fault, problem: str
) -> None:
    server.path, server.always = "/props", fault
    with pytest.raises(LoadError) as error:
        load(write_faulty(server.url))
    message = str(error.value)
    assert message.startswith(f'member "there": {server.url}: {problem}')
    assert message.isprintable()


# Wrong answers


def first(answer: Any) -> Any:
    return answer["completion_probabilities"][0]["top_logprobs"]


def bad_number(value: object) -> Callable[[Any], None]:
    return lambda answer: first(answer)[1].update(logprob=value)


def bad_id(value: object) -> Callable[[Any], None]:
    return lambda answer: first(answer)[0].update(id=value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (bad_number(float("nan")), "gives NaN, or a number that is no log-probability"),
        (bad_number(None), "gives NaN"),
        (bad_number(0.5), "gives NaN"),
        (bad_number(float("inf")), "gives NaN"),
        (bad_number("-1"), "gives NaN"),
        (bad_number(10**400), "gives NaN"),
        (bad_id(-1), "gives something that is not an id"),
        (bad_id(1 << 40), "gives something that is not an id"),
        (bad_id(5.0), "gives something that is not an id"),
        (bad_id("5"), "gives something that is not an id"),
        (bad_id(True), "gives something that is not an id"),
        (lambda answer: first(answer).pop(), "log-probabilities where"),
        (lambda answer: first(answer).__setitem__(0, first(answer)[1]), "log-probabilities where"),
        (lambda answer: first(answer).clear(), "gives 0 log-probabilities"),
        (lambda answer: first(answer).__setitem__(0, 7), "gives something else than this engine does"),
        (lambda answer: answer["completion_probabilities"][0].update(top_logprobs=5), "gives no probabilities"),
        (lambda answer: answer["completion_probabilities"].clear(), "gives no probabilities"),
        (lambda answer: answer.update(completion_probabilities={"a": 1}), "gives no probabilities"),
        (lambda answer: answer.update(timings=[]), "gives something else than this engine does"),
    ],
)
def test_an_answer_that_is_none_ends_the_reply_in_one_line(
    open_faulty: OpenFaulty, server: Between, change: Callable[[Any], object], problem: str
) -> None:
    ensemble = open_faulty()
    server.faults = [None, None, changed(lambda answer: change(answer) and None)]
    error = broken(ensemble.stream(PROMPT, SETTINGS, raw=True))
    assert error.startswith(f'member "there": {server.url}: /completion ')
    assert problem in error


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer["timings"].update(prompt_ms=float("nan"), prompt_n=10**30),
        lambda answer: answer["timings"].update(prompt_ms=-5, prompt_n=-5),
        lambda answer: answer.pop("timings"),
        lambda answer: answer.pop("model"),
    ],
)
def test_what_an_answer_need_not_say(open_faulty: OpenFaulty, server: Between, change: Callable[[Any], object]) -> None:
    undisturbed = told(open_faulty())
    ensemble = open_faulty()
    server.always = changed(lambda answer: change(answer) and None)
    if "model" in change.__code__.co_consts:
        server.always = None
        server.faults = [None, None, changed(lambda answer: change(answer) and None)]
    assert told(ensemble)[0] == undisturbed[0]
    member = ensemble.members[0]
    assert 0 <= member.wire_seconds < LIMIT


def test_ids_behind_the_vocabulary_are_none(open_faulty: OpenFaulty, server: Between) -> None:
    """A model may have more logits than its vocabulary has tokens."""
    undisturbed = told(open_faulty())
    server.always = changed(lambda answer: first(answer).append({"id": 1 << 20, "logprob": -9.5}))
    assert told(open_faulty())[0] == undisturbed[0]


def test_ids_without_probability_are_none(open_faulty: OpenFaulty, server: Between) -> None:
    """llama-server writes the lowest number there is for a probability of 0: where few are left, these are all."""

    def peaked(answer: Any) -> None:
        for number, entry in enumerate(first(answer)):
            entry["logprob"] = -0.6931 if number < 2 else -3.4028234663852886e38

    ensemble = open_faulty()
    server.always = changed(peaked)
    reply = ensemble.generate(PROMPT, Overrides(seed=4, max_tokens=6, weights={"there": 1, "here": 0}), raw=True)
    assert all(step.probability == pytest.approx(0.5, abs=1e-3) for step in reply.steps)


def test_a_context_that_is_exceeded(tiny: dict[str, Path], write_faulty: WriteFaulty) -> None:
    """The server has less room than it said."""
    with llama_server(tiny["bpe_c"], *OPTIONS) as url, between(url) as server:
        server.path = "/props"
        server.always = changed(lambda answer: answer["default_generation_settings"].update(n_ctx=9999))
        with load(write_faulty(server.url)) as ensemble:
            weights = {"there": 1.0, "here": 0.0}
            with pytest.raises(RunError, match=r"answers with status 400: request \(\d+ tokens\) exceeds"):
                ensemble.generate("the cat " * 400, Overrides(seed=1, max_tokens=3, weights=weights), raw=True)


# Keys, proxies, names, TLS


def test_keys(
    tiny: dict[str, Path], write_faulty: WriteFaulty, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-very-secret-7"
    caplog.set_level(logging.DEBUG)
    for name in ("me_local", "httpx", "httpcore", "httpcore.http11", "httpcore.connection"):
        caplog.set_level(logging.DEBUG, logger=name)
    messages = []
    with llama_server(tiny["bpe_c"], *OPTIONS, "--api-key", key) as url:
        with pytest.raises(LoadError, match=r"it wants a key: set api_key_env \(status 401\)"):
            load(write_faulty(url))
        keyed = write_faulty(url, 'api_key_env = "THEIR_KEY"')
        monkeypatch.delenv("THEIR_KEY", raising=False)
        with pytest.raises(LoadError, match="the environment has no usable THEIR_KEY"):
            load(keyed)
        monkeypatch.setenv("THEIR_KEY", "sk-very-secret-8")
        with pytest.raises(LoadError, match=r"the key in THEIR_KEY is not taken \(status 401\)") as error:
            load(keyed)
        messages.append(str(error.value))
        monkeypatch.setenv("THEIR_KEY", key)
        with load(keyed) as ensemble, between(url) as server:
            assert ensemble.generate(PROMPT, SETTINGS, raw=True).steps
            messages += ensemble.notices + [member.summary for member in ensemble.members]
            # What comes back may have the key in it.
            server.path, server.always = "/props", status(500, f"you sent {key}".encode(), X_Sent="nothing")
            with pytest.raises(LoadError, match=r"status 500: you sent \*\*\*$") as error:
                load(write_faulty(server.url, 'api_key_env = "THEIR_KEY"'))
            messages.append(str(error.value))
            assert server.headers[0]["Authorization"] == f"Bearer {key}"
    assert "very-secret" not in "\n".join(messages)
    assert "very-secret" not in caplog.text
    assert caplog.records


def test_a_proxy_is_not_asked_for_this_machine(open_faulty: OpenFaulty, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert told(open_faulty())


def test_a_proxy_is_asked_for_others(
    write_faulty: WriteFaulty, server: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("http://", "http://user:secret@"))
    server.path, server.always = "http://elsewhere.invalid/props", status(418)
    with pytest.raises(LoadError, match="status 418"):
        load(write_faulty("http://elsewhere.invalid"))
    assert server.headers[0]["Proxy-Authorization"].startswith("Basic ")
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(LoadError, match="a proxy by socks5, and only those by HTTP can be used"):
        load(write_faulty("http://elsewhere.invalid"))


def test_names_are_printed_safely(open_faulty: OpenFaulty, server: Between) -> None:
    server.path = "/props"
    server.always = changed(lambda answer: answer.update(model_path="\x1b[2J" + "evil\n\u202e" * 1000))
    summary = open_faulty().members[0].summary
    assert summary.isprintable()
    assert len(summary) < 400


@pytest.mark.parametrize("path", ["/some/prefix", "/some/prefix/", "/"])
def test_an_address_with_a_path(write_faulty: WriteFaulty, server: Between, path: str) -> None:
    server.path, server.always = f"{path.rstrip('/')}/props", status(418)
    with pytest.raises(LoadError, match="status 418"):
        load(write_faulty(server.url + path))


def test_an_address_of_version_6(tiny: dict[str, Path], write_faulty: WriteFaulty) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return  # this machine has none
    with llama_server(tiny["bpe_c"], *OPTIONS) as url:
        port = int(url.rpartition(":")[2])
        with forwarding(port) as six, load(write_faulty(f"http://[::1]:{six}")) as ensemble:
            assert ensemble.generate(PROMPT, SETTINGS, raw=True).steps


@contextmanager
def forwarding(port: int, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A port of [::1], or with a context one that speaks TLS, whose connections go on to another port."""
    family, host = (socket.AF_INET6, "::1") if context is None else (socket.AF_INET, "127.0.0.1")
    with socket.create_server((host, 0), family=family) as listener:
        threading.Thread(target=_forward, args=(listener, port, context), daemon=True).start()
        yield listener.getsockname()[1]


def _forward(listener: socket.socket, port: int, context: ssl.SSLContext | None) -> None:
    while True:
        try:
            near, _ = listener.accept()
            near = near if context is None else context.wrap_socket(near, server_side=True)
        except ssl.SSLError:
            continue
        except OSError:
            return
        far = socket.create_connection(("127.0.0.1", port), LIMIT)
        for source, target in ((near, far), (far, near)):
            threading.Thread(target=_copy, args=(source, target), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while part := source.recv(1 << 16):
            target.sendall(part)
    except OSError:
        pass
    finally:
        target.close()


def test_tls(real: str, tmp_path: Path, write_faulty: WriteFaulty, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with forwarding(int(real.rpartition(":")[2]), context) as port:
        models = write_faulty(f"https://localhost:{port}")
        with pytest.raises(LoadError, match=r"no safe connection: .*CERTIFICATE_VERIFY_FAILED"):
            load(models)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with load(models) as ensemble:
            assert ensemble.generate(PROMPT, SETTINGS, raw=True).steps


# Ends of our own


@pytest.mark.parametrize("strategy", ["me", "ce"])
@pytest.mark.parametrize("fault", [faults.dropped, faults.hanging])
def test_a_reply_is_cancelled_while_an_engine_is_away(
    open_faulty: OpenFaulty, server: Between, fault: faults.Fault, strategy: Any
) -> None:
    ensemble = open_faulty()
    stream = ensemble.stream(PROMPT, Overrides(seed=4, max_tokens=12, strategy=strategy), raw=True)
    pieces = [next(stream).piece]
    server.reached.clear()
    server.always = fault
    cancel = threading.Thread(target=lambda: server.reached.wait(LIMIT) and stream.cancel())
    cancel.start()
    pieces += [step.piece for step in stream]
    cancel.join(LIMIT)
    assert stream.reply.finish_reason == "cancelled"
    assert [step.piece for step in stream.reply.steps] == pieces


@pytest.mark.parametrize("strategy", ["me", "ce"])
@pytest.mark.parametrize("batch", [1, 3])
def test_ctrl_c_ends_a_batch_while_an_engine_is_away(
    open_faulty: OpenFaulty, server: Between, strategy: Any, batch: int
) -> None:
    """It is given again, as a user would: where Python is about to throw an object away, it is lost."""
    ensemble = open_faulty(batch=batch)
    finished = ensemble.generate_many([PROMPT] * 9, Overrides(seed=4, max_tokens=4, strategy=strategy), raw=True)
    next(finished)
    server.reached.clear()
    server.always = faults.hanging
    ended = threading.Event()

    def interrupt(*_: object) -> None:
        if not ended.is_set():
            raise KeyboardInterrupt

    def press() -> None:
        assert server.reached.wait(LIMIT)
        while not ended.wait(1):
            os.kill(os.getpid(), signal.SIGINT)

    before, keys = signal.signal(signal.SIGINT, interrupt), threading.Thread(target=press)
    began = time.monotonic()
    try:
        keys.start()
        with pytest.raises(KeyboardInterrupt):
            list(finished)
    finally:
        ended.set()
        keys.join(LIMIT)
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < LIMIT / 3  # it hangs for longer
    server.always = None
    server.release.set()
    assert ensemble.generate(PROMPT, SETTINGS, raw=True).steps


@pytest.mark.parametrize("fault", [faults.dropped, faults.hanging])
def test_an_ensemble_is_closed_while_an_engine_is_away(
    open_faulty: OpenFaulty, server: Between, fault: faults.Fault
) -> None:
    ensemble = open_faulty()
    stream = ensemble.stream(PROMPT, SETTINGS, raw=True)
    next(stream)
    server.reached.clear()
    server.always = fault
    errors: list[str] = []

    def read() -> None:
        try:
            list(stream)
        except RunError as error:
            errors.append(str(error))

    reading = threading.Thread(target=read)
    reading.start()
    assert server.reached.wait(LIMIT)
    ensemble.close()
    reading.join(LIMIT / 3)
    assert not reading.is_alive()
    assert errors == ["the ensemble is closed"]
    with pytest.raises(RunError, match="the ensemble is closed"):
        ensemble.members[0].prepare(ensemble.members[0]._probe)  # type: ignore[attr-defined]


def test_a_fork_leaves_the_connections_alone(open_faulty: OpenFaulty) -> None:
    ensemble = open_faulty()
    undisturbed = told(ensemble)
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            ensemble.members[0].sync(ensemble.members[0]._probe)  # type: ignore[attr-defined]
        except RunError as error:
            ensemble.close()
            os._exit(0 if "forked off" in str(error) else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + LIMIT
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        assert time.monotonic() < end
        threading.Event().wait(0.01)
    assert os.waitstatus_to_exitcode(found[1]) == 0
    assert told(ensemble) == undisturbed


def test_what_was_written_stays_where_an_engine_goes_away(
    run: Run, write_faulty: WriteFaulty, server: Between, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    prompts, out = jsonl(tmp_path / "in.jsonl", *({"prompt": "the cat"} for _ in range(4))), tmp_path / "out.jsonl"
    server.faults = [None] * 7  # of which loading takes four
    server.always = faults.dropped
    result = run(
        "generate", "--seed", 1, "--max-tokens", 4, "--input", prompts, "--output", out, models=write_faulty(server.url)
    )
    assert result.exit_code == 1, result.output
    found = records(out)
    assert len(found) == 4
    assert sum("error" in record for record in found) in (1, 2, 3)
    assert not re.search("Traceback", result.output)
    assert json.dumps(found)
