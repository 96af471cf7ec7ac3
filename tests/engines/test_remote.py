"""Members behind a real llama-server: with them an ensemble is what it is without, reply by reply.

Servers and members here compute with full precision, so that numbers differ in their low bits alone, by the size of
batches. Replies are compared with `_reference` as in test_reference.py, which tells such close calls. The exact tests
are those of test_exact_replies.py, and have the same odds of a false alarm, 1e-6 for each over the choice of seeds.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_exact_replies
import test_reference
from commands import Run, jsonl, one_line, records
from remote import llama_server
from selection import MODELS, slow_but
from served import served
from test_exact_replies import OpenAll, Remembered, Tree, check, draw, open_all, remembered_top_k
from test_reference import Calls, Comparison, LoadReference, calls, compare_replies, load_reference, replies, tiny

from me_local import Chat, ConfigError, Ensemble, InputError, LoadError, Overrides, RunError, _reference, ensemble, load
from me_local.arrays import IntArray
from me_local.asking import Ask
from me_local.decoding.engine import Engine
from me_local.engines.llama_server import LlamaServer
from me_local.engines.remote import RemoteModel
from me_local.errors import MeLocalError
from me_local.measuring.verify import verify
from me_local.mixture.alignment import sufficient
from me_local.mixture.routing import constant
from me_local.model import Evaluated, Row
from me_local.sampling import Sampling

__all__ = ["calls", "load_reference", "open_all", "tiny"]

pytestmark = pytest.mark.llama_server
PLACES = 3
OPTIONS = ("-np", str(PLACES), "-c", str(512 * PLACES), "-ctk", "f32", "-ctv", "f32", "-fa", "off")
HERE = 'n_ctx = 512\nn_threads = 1\ntype_k = "f32"\ntype_v = "f32"'


def encoded(member: Any, text: bytes) -> IntArray:
    return np.array(member.vocabulary.encode(text), dtype=np.int32)


Serve = Callable[[str], str]
WriteMixed = Callable[..., Path]


@pytest.fixture(scope="module")
def serve(tiny: dict[str, Path]) -> Iterator[Serve]:
    """The address of a server that runs a tiny model; each is started once."""
    urls: dict[str, str] = {}
    with ExitStack() as stack:

        def start(name: str) -> str:
            if name not in urls:
                urls[name] = stack.enter_context(llama_server(tiny[name], *OPTIONS))
            return urls[name]

        yield start


@pytest.fixture
def elsewhere(serve: Serve) -> Callable[[str], str]:
    """What stands in models.toml of a tiny model that runs behind a server."""
    return lambda name: f'url = "{serve(name)}"'


@pytest.fixture
def write_mixed(tiny: dict[str, Path], elsewhere: Callable[[str], str], tmp_path: Path) -> WriteMixed:
    """Writes a models.toml of tiny models, those whose name begins with "@" behind a server."""

    def write(*names: str, weights: tuple[float, ...] = (), top: str = "") -> Path:
        lines = [top]
        for i, name in enumerate(names):
            bare = name.removeprefix("@")
            lines.append(f'[[members]]\nname = "{bare}"\npath = "{tiny[bare]}"')
            lines.append(f"weight = {weights[i] if weights else 1.0}")
            lines.append(elsewhere(bare) if name != bare else HERE)
        path = tmp_path / "mixed.toml"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture
def open_mixed(write_mixed: WriteMixed) -> Iterator[Callable[..., Ensemble]]:
    """Loads such an ensemble; `batch` replies at once."""
    with ExitStack() as stack:
        yield lambda *names, batch=1, **settings: stack.enter_context(
            load(write_mixed(*names, **settings), batch=batch)
        )


OpenMixed = Callable[..., Ensemble]


CASES = {
    "one here and one there": ("bpe_c", "@spm"),
    "one there and one here": ("@bpe_c", "spm"),
    "both there": ("@bpe_c", "@spm"),
    "one vocabulary": ("bpe_a", "@bpe_b"),
    "other memories": ("@swa", "@recurrent", "hybrid"),
    "cut characters": ("bpe_c", "@lacking"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "a reply": {},
    "a conversation": {"raw": False},
    "temperature 0": {"sampling": "temperature = 0.0"},
    "top-p and min-p": {"sampling": "top_k = 40\ntop_p = 0.8\nmin_p = 0.02\ntemperature = 1.5"},
    "several at once": {"batch": PLACES},
}


def compared(
    names: tuple[str, ...], settings: dict[str, Any], open_mixed: OpenMixed, load_reference: LoadReference, calls: Calls
) -> Comparison:
    """The replies of an ensemble to some seeds, compared with those of the reference."""
    bare = tuple(name.removeprefix("@") for name in names)
    this = test_reference.Case(bare, prompt="é" if "lacking" in bare else test_reference.PROMPT, **settings)
    found = Comparison()
    ensemble = open_mixed(*names, batch=this.batch, top=f'[ensemble]\nroute = "own"\n[sampling]\n{this.sampling}')
    head, prompts, _ = ensemble.prompter.asked(this.prompt, ensemble.config, raw=this.raw)
    loaded = [load_reference(replace(config, n_ctx=512, url=None)) for config in ensemble.config.members]
    members = [replace(m, prompt=ids.tolist()) for m, ids in zip(loaded, prompts, strict=True)]
    for strategy in ("me", "ce"):
        for fast in replies(ensemble, this, strategy, range(4)):
            options: Any = {"strategy": strategy, "max_tokens": this.max_tokens}
            slow = _reference.reply(members, head, seed=fast.seed, **options)
            compare_replies(found, fast, slow, ensemble.engine.unified.pieces, calls)
    return found


@pytest.mark.parametrize("settings", slow_but(SETTINGS, "a reply", "several at once"))
@pytest.mark.parametrize("name", slow_but(CASES, "one here and one there"))
def test_replies_are_those_of_the_reference(
    open_mixed: OpenMixed, load_reference: LoadReference, calls: Calls, name: str, settings: str
) -> None:
    found = compared(CASES[name], SETTINGS[settings], open_mixed, load_reference, calls)
    assert found.differences == []
    assert found.close <= 1
    assert found.steps >= 30


def test_a_server_that_is_a_little_off_is_found_out(
    open_mixed: OpenMixed, load_reference: LoadReference, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = RemoteModel.predict

    def warmer(self: RemoteModel, *args: Any) -> Any:
        row, evaluated = predict(self, *args)
        return row._replace(logits=row.logits * 0.99), evaluated

    monkeypatch.setattr(RemoteModel, "predict", warmer)
    assert compared(("bpe_c", "@spm"), {}, open_mixed, load_reference, calls).differences


class RememberedRemote(Remembered):
    """A member elsewhere that is asked once for each context, for the `most` likeliest ids."""

    def __init__(self, member: RemoteModel, most: int) -> None:
        super().__init__(member)  # type: ignore[arg-type]
        self._remote, self._most = member, most
        self._rows: dict[bytes, Row] = {}

    def sync(self, ids: IntArray, interrupted: Callable[[], bool], *, final: int) -> Evaluated:
        self._last = ids.tobytes()
        if self._last not in self._rows:
            self._remote.sync(ids)
            self._rows[self._last] = self._remote.logits()
        return Evaluated(0, 0.0)

    def logits(self) -> Row:  # type: ignore[override]
        return self._rows[self._last]

    def shorten(self, count: int, numbers: IntArray) -> None:
        self._remote.shorten(self._most, numbers)  # the alignment that remembers is none that is known


def remembering_mixed(members: Sequence[Any], this: test_exact_replies.Case) -> Engine:
    """The members of a case, here and elsewhere, each asked once for each context."""
    models = [
        Remembered(member) if member.local else RememberedRemote(member, sufficient(sampling))
        for member, sampling in zip(members, this.sampling, strict=True)
    ]
    return Engine(models, this.router, remembered_top_k())


EXACT_CASES = {
    "one vocabulary": ("bpe_a", "bpe_b"),
    "BPE and SPM, temperature 1.3": ("bpe_c", "spm"),
    "each its own": ("bpe_a", "spm"),
    "lacking bytes": ("bpe_c", "lacking"),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["me", "ce"])
@pytest.mark.parametrize("name", EXACT_CASES)
def test_replies_have_the_probabilities_of_the_definition(
    open_mixed: OpenMixed, open_all: OpenAll, name: str, strategy: str
) -> None:
    this = test_exact_replies.CASES[name]
    first, second = EXACT_CASES[name]
    engine = remembering_mixed(open_mixed(first, f"@{second}").members, this)
    check(draw(engine, this, strategy), Tree(open_all(this), this))


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("me_local.measuring.verify.DRAWS", 300)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("bpe_c", "@spm"), ("@bpe_a", "@bpe_b"), ("@recurrent", "swa")], ids="+".join)
def test_verify_passes(open_mixed: OpenMixed, few_draws: None, names: tuple[str, ...]) -> None:
    ensemble = open_mixed(*names, top="[sampling]\ntemperature = 0.7")
    with ExitStack() as stack:
        twins = [member.twin() for member in ensemble.members]
        for twin in twins:
            stack.callback(twin.close)
        report = verify(ensemble, twins, 0, lambda: None)
    assert report.passed, report
    assert max(fidelity.largest for fidelity in report.fidelity) < 1e-3


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize("there", [0])  # with 1 it passes, too, and takes as long again
def test_verify_passes_on_the_demo_ensemble(run: Run, tmp_path: Path, there: int) -> None:
    files = ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"]
    with llama_server(MODELS / files[there], "-c", "2048", "-ctk", "f16", "--swa-full") as url:
        lines = ["[sampling]\ntemperature = 0.7"]
        for i, file in enumerate(files):
            lines.append(f'[[members]]\nname = "m{i}"\npath = "{MODELS / file}"')
            lines.append(f'url = "{url}"' if i == there else "n_threads = 1\nn_ctx = 2048")
        models = tmp_path / "demo.toml"
        models.write_text("\n".join(lines))
        result = run("verify", models=models)
    assert result.exit_code == 0, result.output


def test_a_batch_is_made_with_places(run: Run, write_mixed: WriteMixed, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", *({"prompt": text} for text in ["the cat", "the cat", "a dog", "the cat"]))
    models = write_mixed("bpe_c", "@spm")
    for batch in (1, PLACES):
        out = tmp_path / f"{batch}.jsonl"
        options = [
            "--seed",
            1,
            "--max-tokens",
            8,
            "--batch",
            batch,
            "--route",
            "own",
            "--input",
            prompts,
            "--output",
            out,
        ]
        result = run("generate", *options, models=models)
        assert result.exit_code == 0, result.output
    one, many = (sorted(records(tmp_path / f"{n}.jsonl"), key=lambda r: r["id"]) for n in (1, PLACES))
    assert [record["text"] for record in many] == [record["text"] for record in one]
    assert len(one) == 4


@pytest.mark.timeout(60)
def test_a_prompt_that_is_there_already_is_not_waited_for(open_mixed: OpenMixed) -> None:
    ensemble = open_mixed("@bpe_c", "@spm", batch=2)
    found = list(ensemble.generate_many(["the cat"] * 6, Overrides(seed=1, max_tokens=4), raw=True))
    assert [one.error for one in found] == [None] * 6


def test_long_prompts_go_in_parts(open_mixed: OpenMixed, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, settings = "the cat sat on the mat " * 12, Overrides(seed=3, max_tokens=10)
    whole = open_mixed("@bpe_c").generate(prompt, settings, raw=True)
    monkeypatch.setattr("me_local.engines.remote._PART", 10)
    parts = open_mixed("@bpe_c").generate(prompt, settings, raw=True)
    assert parts.text == whole.text
    assert parts.usage[0].prompt_length == whole.usage[0].prompt_length > 50


def test_the_context_is_used_up_to_its_last_token(open_mixed: OpenMixed) -> None:
    ensemble = open_mixed("@bpe_c")
    (member,) = ensemble.members
    assert member.n_ctx == 511  # the server keeps one for the token that it samples
    reply = ensemble.generate("the cat " * 100, Overrides(seed=3, max_tokens=1000, temperature=2.0), raw=True)
    assert reply.finish_reason in ("length", "stop")
    ids = encoded(member, b"the " * 600)
    member.sync(ids[:511])  # the most that there is room for
    with pytest.raises(MeLocalError, match=r"exceeds the available context size"):
        member.sync(ids[:512])


def test_a_conversation_goes_on(open_mixed: OpenMixed) -> None:
    chats = [Chat(open_mixed(*names, top="[ensemble]\nseed = 5")) for names in (("bpe_a", "spm"), ("@bpe_a", "@spm"))]
    for chat in chats:
        for text in ("Hello", "the cat sat"):
            turn = chat.say(text)
            for _ in turn:
                pass
    assert chats[0].messages == chats[1].messages
    assert len(chats[0].messages) == 4


def test_a_server_in_front_of_servers(write_mixed: WriteMixed) -> None:
    with served(write_mixed("bpe_c", "@spm", top="[ensemble]\nseed = 1"), parallel=2) as running:
        answers = [running.chat(max_tokens=6, seed=4) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_inspect_shows_where_it_runs(run: Run, write_mixed: WriteMixed, serve: Serve) -> None:
    models = write_mixed("bpe_c", "@spm")
    text = run("inspect", models=models).stdout
    assert re.search(rf"engine +llama-server at {re.escape(serve('spm'))}", text)
    assert re.search(rf"slots +{PLACES}\n", re.sub(" +\n", "\n", text))
    assert re.search(r"a step +\d+\.\d ms", text)
    assert re.search(r"prefix cache +on", text)
    there = json.loads(run("inspect", "--json", models=models).stdout)["members"][1]
    assert there["address"] == serve("spm")
    assert there["slots"] == PLACES
    assert 0 < there["step_seconds"] < 5
    assert there["prefix_cache"] is True


def test_members_shows_where_they_run(run: Run, write_mixed: WriteMixed, serve: Serve) -> None:
    result = run("chat", models=write_mixed("bpe_c", "@spm"), stdin="/members\n")
    assert f"llama-server at {serve('spm')}" in re.sub(r"\s+", " ", result.output)


@pytest.mark.slow
def test_bench_says_what_is_spent_on_the_wire(
    run: Run, write_mixed: WriteMixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("me_local.measuring.bench.STEPS", 24)
    result = run("bench", models=write_mixed("bpe_c", "@spm"))
    assert result.exit_code == 0, result.output
    assert "on the wire" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["generate", "Hi", "--unit", "word"], ['member "spm"', 'unit = "word"', "llama-server"]),
        (["generate", "Hi", "--strategy", "union"], ['member "spm"', 'strategy = "union"', "llama-server"]),
        (["generate", "Hi", "--top-k", 0], ['member "spm"', "top_k = 0", "llama-server"]),
        (["generate", "Hi", "--repeat-penalty", 1.1], ['member "spm"', "repeat_penalty = 1.1", "llama-server"]),
        (["generate", "Hi", "--top-n-sigma", 1], ['member "spm"', "top_n_sigma = 1", "llama-server"]),
        (["generate", "Hi", "--batch", "auto", "-n", 4], ["--batch auto", "elsewhere"]),
        (["bench", "--batch", "1,2"], ["--batch", 'member "spm"', "elsewhere"]),
        (["generate", "Hi", "--batch", PLACES + 1, "-n", 9], ['member "spm"', f"has {PLACES} slots", "--parallel 4"]),
        pytest.param(
            ["score", __file__], ['member "spm"', "does not score texts", "llama-server"], marks=pytest.mark.slow
        ),
    ],
)
def test_what_an_engine_cannot_do_is_one_line(
    run: Run, write_mixed: WriteMixed, arguments: list[object], parts: list[str]
) -> None:
    command, *rest = arguments
    one_line(run(command, *rest, models=write_mixed("bpe_c", "@spm")), 2, *parts)


SHAPED = """[sampling]
top_k = 4
presence_penalty = 0.5
frequency_penalty = 0.3
dry_multiplier = 2.0
dry_allowed_length = 1
dry_penalty_last_n = 20
logit_bias = {e = -2.0}
min_tokens = 5"""


def test_enough_is_asked_for_where_penalties_reorder(open_mixed: OpenMixed) -> None:
    [here, there] = (open_mixed("bpe_c", name, top=SHAPED) for name in ("spm", "@spm"))
    same = 0
    for seed in range(8):
        asked = Overrides(seed=seed, max_tokens=12)
        same += here.generate("The the cat", asked).text == there.generate("The the cat", asked).text
    assert same >= 7  # a draw in a thousand may be a close call


def test_an_alignment_of_another_package_is_refused(write_mixed: WriteMixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "find", lambda group, name, place: object() if "align" in group else constant)
    models = write_mixed("bpe_c", "@spm", top='[ensemble]\nalignment = "theirs"')
    with pytest.raises(ConfigError, match='member "spm": alignment = "theirs" needs all logits'):
        load(models)


def test_likelihoods_are_refused(open_mixed: OpenMixed) -> None:
    with pytest.raises(InputError, match='member "spm": its engine'):
        open_mixed("bpe_c", "@spm").score("the", " cat", raw=True)


def test_another_vocabulary_is_one_line(write_mixed: WriteMixed, serve: Serve) -> None:
    models = write_mixed("bpe_c", "@spm")
    models.write_text(models.read_text().replace(serve("spm"), serve("bpe_a")))
    with pytest.raises(LoadError, match=r'member "spm": .*runs a model with another vocabulary'):
        load(models)


# Options of a server that would change numbers, or leave them out, if requests did not say what they want.
SERVERS = {
    "shared chunks of contexts": ["--cache-reuse", "1"],
    "no cache": ["--no-cache-prompt"],
    "sampling": ["--temp", "0.1", "--top-k", "2", "--mirostat", "2", "--logit-bias", "70+5", "--repeat-penalty", "1.5"],
    "stops": ["--reverse-prompt", "a", "--ignore-eos"],
    "one token at most": ["--predict", "0"],
    "shifts": ["--context-shift", "--no-slots"],
    "one cache for all": ["--kv-unified", "-np", "2"],
    "small batches": ["-b", "32", "-ub", "8"],
}


@pytest.mark.parametrize("name", slow_but(SERVERS, "shared chunks of contexts", "stops"))
def test_options_of_a_server_change_nothing(
    tiny: dict[str, Path], open_mixed: OpenMixed, write_mixed: WriteMixed, serve: Serve, name: str
) -> None:
    """Its own defaults are for others, who ask it for texts."""
    rows = []
    with llama_server(tiny["bpe_c"], *OPTIONS, *SERVERS[name]) as url, ExitStack() as stack:
        models = write_mixed("@bpe_c")
        ensembles = [stack.enter_context(load(models))]
        models.write_text(models.read_text().replace(serve("bpe_c"), url))
        ensembles.append(stack.enter_context(load(models)))
        for ensemble in ensembles:
            (member,) = ensemble.members
            ids = encoded(member, b"the cat sat on the mat and the dog sat on the log " * 3)
            member.shorten(10, ensemble.engine.unified.numbers[0])
            found = []
            for end in (40, 41, 30, 35):  # with what is left of others in the cache
                member.sync(ids[:end] if end != 35 else ids[12 : 12 + end])
                row = member.logits()
                found.append(dict(zip(row.ids.tolist(), row.logits.tolist(), strict=True)))  # type: ignore[union-attr]
            rows.append(found)
    for plain, special in zip(*rows, strict=True):
        assert special == pytest.approx(plain, abs=1e-4)


def test_whatever_a_server_samples_it_says_how_probable_all_was(open_mixed: OpenMixed, serve: Serve) -> None:
    """A sampled byte that is a part of a character comes without probabilities, and these models sample many."""
    (member,) = open_mixed("@bpe_c").members
    ids = encoded(member, b"the cat")
    member.shorten(5, np.arange(member.vocabulary.size, dtype=np.int32))
    for _ in range(60):
        member.sync(ids)
        assert len(member.logits().ids) >= 5  # type: ignore[union-attr]


@pytest.mark.parametrize("most", slow_but([5, 12, 20, 301], 12))
def test_what_an_engine_gives_at_most_is_found_and_used(
    open_mixed: OpenMixed, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    predict = LlamaServer.predict

    def limited(self: LlamaServer, ids: Sequence[int], count: int, *args: Any) -> Any:
        if count > most:
            raise RunError(f"{count} are too many")
        return predict(self, ids, count, *args)

    monkeypatch.setattr(LlamaServer, "predict", limited)
    with pytest.raises(ConfigError, match=rf"top_k = {most - 3} needs {most + 1} logits, .* gives the {most} largest"):
        open_mixed("@bpe_c", top=f"[sampling]\ntop_k = {most - 3}")
    assert open_mixed("@bpe_c", top=f"[sampling]\ntop_k = {most - 4}").generate("the cat", raw=True).steps


def test_some_of_the_likeliest_may_never_be_sampled(open_mixed: OpenMixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14 that are the most there are, ten have to be left."""
    monkeypatch.setattr("me_local.engines.remote._MOST", 14)
    (member,) = open_mixed("@bpe_c").members
    ids, numbers = encoded(member, b"the cat"), np.arange(member.vocabulary.size, dtype=np.int32)
    member.shorten(14, numbers)
    member.sync(ids)
    likeliest = member.logits().ids  # type: ignore[union-attr]
    numbers[likeliest[:4]] = -1
    member.sync(ids)
    numbers[likeliest[4]] = -1
    with pytest.raises(RunError, match="gives the 14 likeliest tokens at most, of which 9 can be sampled, and 10 are"):
        member.sync(ids)


def test_names_and_numbers_of_a_seed_with_top(open_mixed: OpenMixed) -> None:
    ensemble = open_mixed("@bpe_c", "@spm", batch=2)
    asks = [Ask("the cat", Overrides(seed=seed), top=3) for seed in (1, 1)]
    first, second = (one.reply for one in ensemble.generate_many(asks, Overrides(max_tokens=5, route="own"), raw=True))
    assert first
    assert second
    assert first.text == second.text
    assert all(len(step.top) == 3 for step in first.steps)


def test_sampling_of_its_own(open_mixed: OpenMixed) -> None:
    ensemble = open_mixed("@bpe_c", "@spm", top="[sampling]\ntop_k = 250\ntemperature = 1.5")
    assert ensemble.config.members[0].sampling == Sampling(1.5, 250)
    assert ensemble.generate("the cat", Overrides(seed=1, max_tokens=5), raw=True).finish_reason in ("length", "stop")
