"""Members behind a real vLLM: with them an ensemble is what it is without, and a fault is one line, or a pause.

Too heavy to run by itself: `scripts/try_vllm.py` runs it (`--vllm`). All members compute in 32 bits. The exact tests
are those of test_exact_replies.py, with the same odds of a false alarm, and `say` tells what was seen.
"""

import json
import re
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import vllm_models
from commands import Run, one_line
from conftest import OpenMember, logits_of
from selection import DEMO_FILES
from served import Served, served
from test_exact_replies import COUNT, SETTINGS, OpenAll, Reply, Tree, case, check, draw, g_test, open_all, write_lacking
from test_faults import broken
from test_reference import Calls, LoadReference, calls, load_reference
from test_remote import OpenMixed, WriteMixed, compared, encoded, open_mixed, remembering_mixed, write_mixed
from vllm_serving import Vllm

from me_local import Chat, ConfigError, LoadError, MeLocalError, Overrides, RunError, load
from me_local.config import Sampling
from me_local.engines import connection
from me_local.engines.remote import RemoteModel

__all__ = ["calls", "load_reference", "open_all", "open_mixed", "write_mixed"]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

THERE = "there"
KEY = "sk-tiny-engine"
MEMBER = 'engine = "vllm"\napi_key_env = "ENGINE_KEY"\n'
TEXT = "Anna stood on the wall, doesn't she? Größe 1,234 ... café 😀\n\n  def f(x):\n\treturn x**2"
LONG = "the cat sat on the mat and the dog sat on the log. " * 14  # some blocks of its cache
PLACES = 4
K = 14
LIMIT = 120.0  # seconds
WARMER = 0.9  # what logits are multiplied by

Say = Callable[[str], None]
Write = Callable[..., Path]


@pytest.fixture
def say(record_property: Callable[[str, object], None]) -> Say:
    """Tells what was seen, in the line of the test."""
    return lambda text: record_property("seen", text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A model, and one of the same vocabulary with other weights: the GGUF file, and what vLLM reads."""
    folder = tmp_path_factory.mktemp("vllm")
    return {name: vllm_models.write_models(folder, name, seed) for name, seed in ((THERE, 11), ("other", 12))}


@pytest.fixture(scope="module")
def tiny(
    tiny: dict[str, Path], folders: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The tiny models, one that lacks bytes, and the one that vLLM serves."""
    lacking = write_lacking(tmp_path_factory.mktemp("lacking") / "lacking.gguf")
    return tiny | {"lacking": lacking, THERE: folders[THERE][0]}


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 of the demo ensemble, as vLLM reads it."""
    folder = tmp_path_factory.mktemp("demo") / "smollm"
    vllm_models.convert(DEMO_FILES[0], folder)
    return folder


class Engine:
    """The vLLM of these tests, whose models have names."""

    def __init__(self, vllm: Vllm, folders: dict[str, tuple[Path, Path]]) -> None:
        self._vllm, self._folders = vllm, folders
        self.url, self.stop = vllm.url, vllm.stop

    @property
    def seconds(self) -> float:
        """What its last start took."""
        return self._vllm.seconds

    def run(self, name: str = THERE, *options: str) -> None:
        self.serve(self._folders[name][1], *options)

    def serve(self, folder: Path, *options: str) -> None:
        self._vllm.run(folder, "--api-key", KEY, *options)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What it answers to plain HTTP."""
        headers = {"Authorization": f"Bearer {KEY}"}
        method = "GET" if body is None else "POST"
        answer = httpx.request(method, self.url + path, json=body, headers=headers, timeout=120)
        return answer.raise_for_status().json()

    def metric(self, name: str) -> float:
        """One of its own figures."""
        text = httpx.get(f"{self.url}/metrics", timeout=120).text
        return sum(map(float, re.findall(rf"^vllm:{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)))


@pytest.fixture(scope="module")
def started(folders: dict[str, tuple[Path, Path]]) -> Iterator[Engine]:
    vllm = Vllm("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_KEY", KEY)
        try:
            yield Engine(vllm, folders)
        finally:
            vllm.stop()


@pytest.fixture
def engine(started: Engine) -> Engine:
    """It runs, with the model and the options that most tests are about."""
    started.run()
    return started


@pytest.fixture
def elsewhere(engine: Engine) -> Callable[[str], str]:
    return lambda name: f'url = "{engine.url}"\n{MEMBER}'


@pytest.fixture
def write(tiny: dict[str, Path], started: Engine, tmp_path: Path) -> Write:
    """Writes a models.toml of one member elsewhere and one here, after `top`."""

    def write_it(url: str = "", member: str = MEMBER, top: str = "") -> Path:
        path = tmp_path / "models.toml"
        path.write_text(
            f'{top}\n[[members]]\nname = "{THERE}"\npath = "{tiny[THERE]}"\nurl = "{url or started.url}"\n{member}\n'
            f'[[members]]\nname = "here"\npath = "{tiny["spm"]}"\nn_threads = 1\nn_ctx = 512\n'
        )
        return path

    return write_it


# Numbers


def test_ids_are_the_same(engine: Engine, open_member: OpenMember, say: Say) -> None:
    here = open_member(THERE).vocabulary.encode(TEXT.encode())
    there = engine.ask("/tokenize", {"model": "tiny", "prompt": TEXT, "add_special_tokens": False})["tokens"]
    version = engine.ask("/version")["version"]
    say(f"vLLM {version}, up after {engine.seconds:.0f} s; {len(here)} ids of {len(TEXT)} characters")
    assert here == there


def test_log_probabilities_are_those_of_llama_cpp(open_mixed: OpenMixed, open_member: OpenMember, say: Say) -> None:
    (there,) = open_mixed(f"@{THERE}").members
    here = open_member(THERE, **SETTINGS)
    ids = encoded(here, TEXT.encode())
    there.shorten(K, np.arange(here.vocabulary.size, dtype=np.int32))
    far = []
    for length in range(1, len(ids), 5):
        there.sync(ids[:length])
        found: Any = there.logits()
        logits = np.asarray(logits_of(here, ids[:length]), np.float64)
        expected = logits - np.logaddexp.reduce(logits)
        assert {*np.argsort(-expected)[:K].tolist()} <= {*found.ids.tolist()}
        far.append(float(np.abs(expected[found.ids] - found.logits).max()))
    say(f"the {K} likeliest after {len(far)} texts are {max(far):.2g} apart at most")
    assert max(far) < 1e-4


def test_numbers_that_depend_on_batch_and_cache(engine: Engine, open_mixed: OpenMixed, say: Say) -> None:
    """The same context alone, again, among five others, and with the beginning in its cache or not."""
    (there,) = open_mixed(f"@{THERE}").members
    ids = encoded(there, LONG.encode())
    body = {"model": "tiny", "max_tokens": 1, "logprobs": K, "temperature": 1, "return_tokens_as_token_ids": True}

    def predict(length: int, salt: str) -> tuple[dict[str, float], int]:
        answer = engine.ask("/v1/completions", body | {"prompt": ids[:length].tolist(), "cache_salt": salt})
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        likeliest = sorted(top, key=top.get, reverse=True)[:K]
        return {id_: top[id_] for id_ in likeliest}, answer["usage"]["prompt_tokens_details"]["cached_tokens"] or 0

    (alone, fresh), (again, cached) = predict(len(ids), "a"), predict(len(ids), "a")
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(predict, len(ids) - 9 * i, f"b{i}") for i in range(6)]
        among = others[0].result()[0]
    predict(200, "c")
    behind, partly = predict(len(ids), "c")

    def apart(other: dict[str, float]) -> float:
        assert alone.keys() == other.keys()
        return max(abs(value - other[id_]) for id_, value in alone.items())

    say(
        f"{len(ids)} ids: again, {cached} of them in its cache: {apart(again):.2g} apart; among five others "
        f"{apart(among):.2g}; behind {partly} from another prompt {apart(behind):.2g}"
    )
    assert fresh == 0
    assert 0 < partly <= 200
    assert max(map(apart, (again, among, behind))) < 1e-4


def test_a_step(open_mixed: OpenMixed, run: Run, write_mixed: WriteMixed, say: Say) -> None:
    report = json.loads(run("inspect", "--json", models=write_mixed("bpe_c", f"@{THERE}")).stdout)["members"][1]
    (there,) = open_mixed(f"@{THERE}").members
    ids = encoded(there, LONG.encode())
    there.sync(ids[:300])
    seconds = [there.sync(ids[:length]).seconds for length in range(301, 341)]
    tokens = there.sync(ids[:341]).tokens
    say(
        f"{1000 * report['step_seconds']:.1f} ms in a short text (inspect, median of 20), "
        f"{1000 * statistics.median(seconds):.1f} ms behind 300 ids, of which it evaluates {tokens}"
    )
    assert report["prefix_cache"] is not False
    assert tokens < 301


# Exactness

EXACT = {
    "one vocabulary": case("bpe_b", THERE),
    "BPE and BPE, temperature 0.5": case("bpe_c", THERE, temperature=0.5),
    "each its own": case(
        "spm", THERE, weights=(0.3, 0.7), sampling=(Sampling(0.5), Sampling(1.3, top_p=0.8)), length=2
    ),
    "lacking bytes": case("lacking", THERE, head="é".encode()),
    "a long text": case("bpe_c", THERE, temperature=1.3, top_k=5, head=LONG.encode()),
}
USERS = case("bpe_c", THERE, weights=(0.4, 0.6), length=2, head=LONG.encode())
USERS_COUNT = 2500


@pytest.mark.parametrize("strategy", ["me", "ce"])
@pytest.mark.parametrize("name", EXACT)
def test_replies_have_the_probabilities_of_the_definition(
    open_mixed: OpenMixed, open_all: OpenAll, say: Say, name: str, strategy: str
) -> None:
    this, tree = EXACT[name], Tree(open_all(EXACT[name]), EXACT[name])
    members = remembering_mixed(open_mixed(this.names[0], f"@{THERE}").members, this)
    drawn = draw(members, this, strategy)
    cells = tree.cells()
    say(f"{COUNT:,} replies in {len(cells)} cells, p = {g_test(drawn, cells):.2g}")
    check(drawn, tree)


@pytest.mark.parametrize("fault", ["logits times 0.9", "weights off by a twentieth"])
def test_an_ensemble_that_is_a_little_off_is_found_out(
    open_mixed: OpenMixed, open_all: OpenAll, say: Say, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = EXACT["BPE and BPE, temperature 0.5"]
    asked = this if "logits" in fault else replace(this, weights=(0.55, 0.45))
    if asked is this:
        predict = RemoteModel.predict

        def warmer(self: RemoteModel, *args: Any) -> Any:
            row, evaluated = predict(self, *args)
            return row._replace(logits=row.logits * np.float32(WARMER)), evaluated

        monkeypatch.setattr(RemoteModel, "predict", warmer)
    members = remembering_mixed(open_mixed(this.names[0], f"@{THERE}").members, this)
    drawn = draw(members, asked, "me")
    p = g_test(drawn, Tree(open_all(this), this).cells())
    say(f"p = {p:.2g}")
    assert p < 5e-7


@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_replies_of_an_ensemble_as_users_run_it(
    engine: Engine, open_mixed: OpenMixed, open_all: OpenAll, say: Say, strategy: Any
) -> None:
    """Nothing is remembered: several at once, each with a route of its own, on what its cache holds of a long text."""
    this, tree = USERS, Tree(open_all(USERS), USERS)
    asked, hits = engine.metric("request_success_total"), engine.metric("prefix_cache_hits_total")
    ensemble = open_mixed("bpe_c", f"@{THERE}", weights=this.weights, batch=PLACES)
    settings = Overrides(seed=0, max_tokens=this.length, strategy=strategy, route="own")
    drawn: Counter[Reply] = Counter()
    began = time.monotonic()
    for finished in ensemble.generate_many([this.head.decode()] * USERS_COUNT, settings, raw=True):
        assert finished.reply, finished.error
        end = (None,) if finished.reply.finish_reason == "stop" else ()
        drawn[tuple(step.piece for step in finished.reply.steps) + end] += 1
    seconds = time.monotonic() - began
    cells = tree.cells(USERS_COUNT)
    p = g_test(drawn, cells)
    requests = engine.metric("request_success_total") - asked
    found = engine.metric("prefix_cache_hits_total") - hits
    say(
        f"{USERS_COUNT:,} replies of {this.length} pieces, {PLACES} at once, in {seconds:.0f} s: {requests:.0f} "
        f"requests found {found / requests:.0f} ids each in its cache; {len(cells)} cells, p = {p:.2g}"
    )
    assert [reply for reply in drawn if not tree.possible(reply)] == []
    assert p > 5e-7


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (("bpe_c", f"@{THERE}"), {}),
        ((f"@{THERE}", "spm"), {"raw": False}),
        (("bpe_b", f"@{THERE}"), {"sampling": "temperature = 0.0"}),
        (("lacking", f"@{THERE}"), {"batch": PLACES}),
        (("bpe_c", f"@{THERE}"), {"sampling": "top_k = 16\ntop_p = 0.8\nmin_p = 0.02\ntemperature = 1.5"}),
    ],
    ids=["a reply", "a conversation", "temperature 0", "several at once", "top-p and min-p"],
)
def test_replies_are_those_of_the_reference(
    open_mixed: OpenMixed,
    load_reference: LoadReference,
    calls: Calls,
    say: Say,
    names: tuple[str, ...],
    settings: dict[str, Any],
) -> None:
    found = compared(names, settings, open_mixed, load_reference, calls)
    say(f"{found.steps} steps, {len(found.differences)} differences, {found.close} close calls")
    assert found.differences == []
    assert found.close <= 1
    assert found.steps >= 30


# Commands


def test_verify_passes(run: Run, write_mixed: WriteMixed, say: Say) -> None:
    models = write_mixed("bpe_c", f"@{THERE}", top="[sampling]\ntemperature = 0.7")
    result = run("verify", models=models)
    say("\n" + result.stdout.partition("\n\n")[0])
    assert result.exit_code == 0, result.output


def texts(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_a_server_in_front_of_it(write_mixed: WriteMixed, engine: Engine, say: Say) -> None:
    """A request, a stream, several at once, and one that is left: all as if both members were here."""
    with served(write_mixed("bpe_c", THERE), parallel=PLACES) as running:
        expected = [texts(running.chat(seed=seed, max_tokens=20)) for seed in range(6)]
    with served(write_mixed("bpe_c", f"@{THERE}"), parallel=PLACES) as running:
        assert texts(running.chat(seed=0, max_tokens=20)) == expected[0]
        assert streamed(running, seed=1, max_tokens=20) == expected[1]
        with ThreadPoolExecutor(6) as pool:
            several = pool.map(lambda seed: texts(running.chat(seed=seed, max_tokens=20)), range(6))
            assert list(several) == expected
        leave_after_a_piece(running)
        running.wait_for('replies_total{finish_reason="cancelled"}', 1)
        await_idle(engine)
        assert texts(running.chat(seed=2, max_tokens=20)) == expected[2]
    say(f"{len(expected)} texts, of {sum(map(len, expected))} characters, as with both here; one left behind")


def streamed(running: Served, **fields: Any) -> str:
    messages: Any = [{"role": "user", "content": "the cat sat on the mat"}]
    chunks = running.openai.chat.completions.create(model="me-local", messages=messages, stream=True, **fields)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def leave_after_a_piece(running: Served) -> None:
    # Without the members' ends of generation it goes on for long.
    messages = [{"role": "user", "content": "the cat sat on the mat"}]
    body = {"model": "me-local", "messages": messages, "max_tokens": 400, "temperature": 1.9, "stream": True, "seed": 3}
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert any('"content"' in line for line in response.iter_lines())


def await_idle(engine: Engine) -> None:
    end = time.monotonic() + 30
    while engine.metric("num_requests_running") + engine.metric("num_requests_waiting"):
        assert time.monotonic() < end, "it still works for one who left"


def test_a_chat(open_mixed: OpenMixed, run: Run, write_mixed: WriteMixed, say: Say) -> None:
    chats = [Chat(open_mixed("bpe_c", name, top="[ensemble]\nseed = 5")) for name in (THERE, f"@{THERE}")]
    for chat in chats:
        for text in ("Hello", "the cat sat"):
            for _ in chat.say(text):
                pass
    assert chats[0].messages == chats[1].messages
    models = write_mixed("bpe_c", f"@{THERE}", top="[ensemble]\nseed = 5")
    result = run("chat", "--max-tokens", 12, models=models, stdin="Hello\nthe cat sat\n/members\n")
    say(f"{len(chats[0].messages)} messages as with both here")
    assert result.exit_code == 0, result.output
    assert f"vllm at {re.findall('http://[0-9.:]+', models.read_text())[0]}" in re.sub(r"\s+", " ", result.output)


# Faults


def test_nobody_is_there(write: Write, run: Run, say: Say) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    result = run("generate", "Hi", models=write(url))
    say(result.stderr.strip())
    one_line(result, 2, f'member "{THERE}": {url}: cannot be reached:', "refused")


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        (MEMBER + 'model = "llama-70b"', r'has no model "llama-70b"; there are: tiny$'),
        ('api_key_env = "ENGINE_KEY"', r"has no /props.*: is the engine what `engine` says it is\?$"),
        ('engine = "vllm"', r"it wants a key: set api_key_env \(status 401\)$"),
        ('engine = "vllm"\napi_key_env = "OTHER_KEY"', r"the key in OTHER_KEY is not taken \(status 401\)$"),
    ],
    ids=["no such model", "a llama-server, it says", "no key", "a wrong key"],
)
def test_what_models_toml_says_wrongly_is_one_line(
    engine: Engine, write: Write, say: Say, member: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", "sk-very-secret")
    with pytest.raises(LoadError, match=problem) as error:
        load(write(member=member))
    say(told(error.value))
    assert "secret" not in str(error.value)


def told(error: BaseException) -> str:
    """An error's one line, for any port."""
    line = str(error)
    assert line.isprintable()
    assert line.startswith(f'member "{THERE}": ')
    return re.sub(r"127\.0\.0\.1:\d+", "HOST", line)


def test_a_context_that_is_exceeded(open_mixed: OpenMixed, say: Say) -> None:
    ensemble = open_mixed(f"@{THERE}")
    (there,) = ensemble.members
    ids = encoded(there, LONG.encode() * 3)
    assert there.n_ctx == 511  # it keeps one for the token that it samples
    there.sync(ids[:511])
    with pytest.raises(MeLocalError, match="status 400") as error:
        there.sync(ids[:512])
    prompt = there.vocabulary.joined(ids[:505].tolist()).decode()
    reply = ensemble.generate(prompt, Overrides(seed=3, max_tokens=1000), raw=True)
    say(f"511 ids are taken; of 512: {told(error.value)}")
    say(f"a reply behind {reply.usage[0].prompt_length} ids ends with {reply.finish_reason} after {len(reply.steps)}")
    assert reply.finish_reason == "length"


# Started again in mid-reply

REPLY = Overrides(seed=11, max_tokens=24, temperature=1.5)
FEW = ("--served-model-name", "renamed", "--max-logprobs", "12")


@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_a_reply_goes_on_where_it_is_back(
    engine: Engine, write: Write, say: Say, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 300.0)
    settings = replace(REPLY, strategy=strategy)
    with load(write()) as ensemble:
        undisturbed = ensemble.generate("the cat", settings, raw=True)
    with load(write()) as ensemble:
        stream = ensemble.stream("the cat", settings, raw=True)
        for _ in range(3):
            next(stream)
        engine.stop()
        back = threading.Thread(target=engine.run)
        back.start()
        found = stream.finish()
        back.join(LIMIT)
    say(f"back after {engine.seconds:.0f} s; {len(found.steps)} pieces, all as without, after as many predictions")
    assert [step.piece for step in found.steps] == [step.piece for step in undisturbed.steps]
    assert [step.member for step in found.steps] == [step.member for step in undisturbed.steps]
    assert [usage.calls for usage in found.usage] == [usage.calls for usage in undisturbed.usage]


def test_a_reply_ends_where_something_else_is_back(
    engine: Engine, write: Write, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the place of the one before it."""
    monkeypatch.setattr(connection, "PATIENCE", 300.0)
    for model, options, problem in (
        ("other", (), "runs another model than before: load the ensemble again"),
        (THERE, ("--max-model-len", "256"), "was started again with less room: load the ensemble again"),
        (THERE, ("--served-model-name", "renamed"), "The model `tiny` does not exist"),
        (THERE, FEW, "logprobs of 14, which is greater than max allowed: 12"),
    ):
        with load(write()) as ensemble:
            stream = ensemble.stream("the cat", REPLY, raw=True)
            pieces = [next(stream).piece for _ in range(3)]
            engine.stop()
            engine.run(model, *options)
            error = broken(stream, *pieces)
        say(told(RunError(error)))
        assert problem in error


def test_fewer_candidates_than_are_wanted(started: Engine, write: Write, say: Say) -> None:
    started.run(THERE, *FEW)
    with pytest.raises(
        ConfigError, match=f'member "{THERE}": top_k = 10 needs 14 logits, .* gives the 12 largest'
    ) as error:
        load(write())
    say(told(error.value))
    with load(write(top="[sampling]\ntop_k = 8")) as ensemble:
        assert ensemble.generate("the cat", Overrides(seed=1, max_tokens=5), raw=True).steps


# Real models


@pytest.mark.demo
def test_verify_passes_on_the_demo_ensemble(
    started: Engine, smollm: Path, run: Run, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("me_local.measuring.verify.DRAWS", 200)
    started.serve(smollm, "--block-size", "32")
    models = tmp_path / "demo.toml"
    models.write_text(
        f'[sampling]\ntemperature = 0.7\n[[members]]\nname = "smollm"\npath = "{DEMO_FILES[0]}"\n'
        f'url = "{started.url}"\n{MEMBER}[[members]]\nname = "gemma"\npath = "{DEMO_FILES[1]}"\nn_ctx = 2048\n'
    )
    result = run("verify", models=models)
    say(f"up after {started.seconds:.0f} s\n" + result.stdout.partition("\n\n")[0])
    assert result.exit_code == 0, result.output
