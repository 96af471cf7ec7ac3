"""Loaded ensembles on tiny models: prompts, lengths, notices, and what a caller gets back."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import me_local
from me_local import ConfigError, Ensemble, InputError, LoadError, Message, Overrides, RunError
from me_local.asking import Ask, Tokens
from me_local.config import Constraint, override

OpenEnsemble = Callable[..., Ensemble]
WriteModels = Callable[..., Path]


def test_three_lines_from_import_to_reply(write_models: WriteModels) -> None:
    with me_local.load(write_models("bpe_a", "spm")) as ensemble:
        reply = ensemble.generate("Hello", Overrides(seed=1, max_tokens=20))
    assert reply.text == "".join(step.text for step in reply.steps)
    assert reply.finish_reason in ("stop", "length")
    assert {step.member for step in reply.steps} == {"bpe_a", "spm"}


@pytest.mark.parametrize("strategy", ["me", "ce"])
@pytest.mark.parametrize("names", [("bpe_a", "bpe_b"), ("bpe_a", "spm"), ("bpe_c",)])
def test_figures_add_up(open_ensemble: OpenEnsemble, strategy: str, names: tuple[str, ...]) -> None:
    ensemble = open_ensemble(*names)
    reply = ensemble.generate("Hello there", Overrides(seed=4, max_tokens=15, strategy=strategy))  # type: ignore[arg-type]
    ended = reply.finish_reason == "stop"
    assert len(reply.steps) <= 15
    assert sum(u.pieces for u in reply.usage) == pytest.approx(len(reply.steps))
    calls = sum(u.calls for u in reply.usage)
    assert calls == (len(reply.steps) + ended) * (len(names) if strategy == "ce" else 1)
    for usage in reply.usage:
        assert usage.prompt_evaluated == (usage.prompt_length if usage.calls else 0)
    assert 0 < reply.decode_seconds < reply.seconds
    assert json.loads(json.dumps(reply.as_dict()))["usage"]["pieces"] == len(reply.steps)


def test_a_prompt_in_the_cache_is_not_evaluated_again(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    settings = Overrides(seed=2, max_tokens=30, strategy="ce")
    first = ensemble.generate("Hello there", settings)
    again = ensemble.generate("Hello there", settings)
    assert again.text == first.text
    # The last token gives the logits of the first piece.
    assert [u.prompt_evaluated for u in again.usage] == [1, 1]


def test_raw_completions_end_at_a_stop_string(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "bpe_c")
    whole = ensemble.generate("the cat", Overrides(seed=3, max_tokens=60), raw=True)
    stop = whole.text[5:8]
    cut = ensemble.generate("the cat", Overrides(seed=3, max_tokens=60, stop=(stop,)), raw=True)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_replies_at_once_without_room_for_a_piece(two_models: Path) -> None:
    with me_local.load(two_models, batch=2) as ensemble:
        finished = list(ensemble.generate_many(["a", "b", "c"], Overrides(max_tokens=0)))
    assert [one.index for one in finished] == [0, 1, 2]
    assert [(one.reply.text, one.reply.finish_reason) for one in finished if one.reply] == [("", "length")] * 3


def test_no_reply_waits_for_ever_for_its_member(two_models: Path) -> None:
    """Of two replies, which are written by a member each, one gets its piece at each step, the other at the next."""
    with me_local.load(two_models, batch=2) as ensemble:
        config = override(ensemble.config, Overrides(route="own", seed=3))
        batching = ensemble.batching(config)
        asks = [
            Ask("the cat", Overrides(weights={name: float(name == own) for name in ensemble.names}))
            for own in ensemble.names
        ]
        drafts = [ensemble.begin(batching, config, ask).draft for ask in asks]
        for _ in range(12):
            batching.step()
    assert [len(draft.steps) > 3 or draft.finish_reason == "stop" for draft in drafts] == [True, True]


def test_cancelling_keeps_what_is_there(open_ensemble: OpenEnsemble) -> None:
    stream = open_ensemble("bpe_a", "spm").stream("Hello", Overrides(seed=1, max_tokens=200))
    for count, _ in enumerate(stream, start=1):
        if count == 3:
            stream.cancel()
    assert stream.reply.finish_reason == "cancelled"
    assert len(stream.reply.steps) == 3


def test_cancelling_from_another_thread(open_ensemble: OpenEnsemble) -> None:
    # Temperature 0 in a loop of its own argmax seldom ends by itself.
    stream = open_ensemble("bpe_a").stream("Hello", Overrides(temperature=0, max_tokens=10**6))
    threading.Timer(0.2, stream.cancel).start()
    assert stream.finish().finish_reason in ("cancelled", "stop", "length")


def test_two_streams_may_be_read_in_turn(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    settings = [Overrides(seed=seed, max_tokens=12) for seed in (1, 2)]
    alone = [ensemble.generate("Hello", s).text for s in settings]
    streams = [ensemble.stream("Hello", s) for s in settings]
    together = ["", ""]
    for _ in range(12):
        for i, stream in enumerate(streams):
            together[i] += next(stream).text if len(stream.reply.steps) < 12 else ""
            if stream.reply.finish_reason != "error":
                break
    for i, stream in enumerate(streams):
        together[i] += "".join(step.text for step in stream)
    assert together == alone


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("  \n", "the prompt is empty"),
        ([Message("system", "x")], "no user message"),
        ([Message("user", "x"), Message("system", "y")], "ends with the system"),
        ([Message("assistant", "y")], "no user message"),
        (
            "word " * 600,
            r'the prompt has \d+ tokens for member "bpe_a", which exceeds the available context size of 512',
        ),
    ],
)
def test_prompts_that_cannot_be_answered(open_ensemble: OpenEnsemble, prompt: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_ensemble("bpe_a").generate(prompt)  # type: ignore[arg-type]


def test_raw_prompts_that_cannot_be_completed(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a")
    for prompt, message in (
        ("", "empty"),
        ([Message("user", "x")], "not a conversation"),
        ("cat " * 900, "tokens for"),
    ):
        with pytest.raises(InputError, match=message):
            ensemble.generate(prompt, raw=True)  # type: ignore[arg-type]


def test_a_reply_may_fill_the_context(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    for seed in range(200):
        reply = ensemble.generate("Hi", Overrides(seed=seed, max_tokens=10**6, top_k=3))
        if reply.finish_reason == "length":
            break
    else:
        pytest.fail("no reply was long enough")
    lengths = [u.prompt_length + u.text_evaluated for u in reply.usage]
    assert max(lengths) >= 500


def test_the_system_message_of_a_member_goes_before_the_ensembles(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm", top='[ensemble]\nsystem = "all"')
    for config, expected in (
        (ensemble.config, [b"all", b"all"]),
        (me_local.config.override(ensemble.config, Overrides(system="new")), [b"new", b"new"]),
    ):
        for member, prompt, said in zip(
            ensemble.members, ensemble.prompter.prompts([Message("user", "Hi")], config).ids, expected, strict=True
        ):
            assert said in member.vocabulary.joined(prompt.tolist())
    own = open_ensemble("bpe_a", "spm", top='[ensemble]\nsystem = "all"', member='system = "own"')
    prompts = own.prompter.prompts([Message("user", "Hi")], own.config).ids
    assert all(b"own" in m.vocabulary.joined(p.tolist()) for m, p in zip(own.members, prompts, strict=True))
    prompts = own.prompter.prompts([Message("system", "said"), Message("user", "Hi")], own.config).ids
    assert all(b"own" not in m.vocabulary.joined(p.tolist()) for m, p in zip(own.members, prompts, strict=True))


def test_notices_say_what_a_user_may_not_expect(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm", member="n_gpu_layers = 5")
    assert any(n.startswith("spm: it has no chat template, so it sees a plain transcript") for n in ensemble.notices)
    assert not any(n.startswith("bpe_a: it has no chat template") for n in ensemble.notices)
    if not me_local.llama.weights.supports_gpu():
        assert any("no GPU support" in n for n in ensemble.notices)


def test_plugins_that_are_not_there(write_models: WriteModels) -> None:
    path = write_models("bpe_a", top='[ensemble]\nrouter = "gate"')
    with pytest.raises(
        ConfigError, match=r'models\.toml: \[ensemble\]\.router: "gate": no installed package .* constant'
    ):
        me_local.load(path)


def test_a_plugin_of_an_installed_package(
    write_models: WriteModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site"
    (package / "gates-1.0.dist-info").mkdir(parents=True)
    (package / "gates-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: gates\nVersion: 1.0\n")
    (package / "gates-1.0.dist-info" / "entry_points.txt").write_text(
        "[me_local.routers]\nlast = gates:last\nbroken = gates:missing\n"
    )
    (package / "gates.py").write_text(
        "import numpy as np\ndef last(text, weights):\n    return np.eye(len(weights))[-1]\n"
    )
    monkeypatch.syspath_prepend(str(package))
    with me_local.load(write_models("bpe_a", "spm", top='[ensemble]\nrouter = "last"')) as ensemble:
        reply = ensemble.generate("Hello", Overrides(seed=1, max_tokens=10))
        assert {step.member for step in reply.steps} == {"spm"}
        assert reply.usage[0].calls == 0
    with pytest.raises(
        ConfigError, match=r'router: "broken" of me_local\.routers cannot be imported from gates:missing'
    ):
        me_local.load(write_models("bpe_a", top='[ensemble]\nrouter = "broken"'))


def test_a_member_that_fails_to_load_frees_the_others(write_models: WriteModels, tmp_path: Path) -> None:
    path = write_models("bpe_a")
    path.write_text(path.read_text() + '\n[[members]]\nname = "gone"\npath = "gone.gguf"\n')
    with pytest.raises(LoadError, match=rf'member "gone": {tmp_path}/gone\.gguf: there is no such file'):
        me_local.load(path)


def test_a_closed_ensemble_says_so(write_models: WriteModels) -> None:
    with me_local.load(write_models("bpe_a", "spm")) as ensemble:
        stream = ensemble.stream("Hello", Overrides(seed=1))
        next(stream)
    with pytest.raises(RunError, match="closed"):
        stream.finish()
    for raw in (True, False):
        with pytest.raises(RunError, match="the ensemble is closed"):
            ensemble.generate("Hello", raw=raw)
    ensemble.close()


def test_a_member_without_weight_need_not_fit(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_c", "spm")
    ensemble.members[1].n_ctx = 20
    prompt = "the cat sat on the mat and more"
    with pytest.raises(InputError, match='for member "spm"'):
        ensemble.generate(prompt)
    reply = ensemble.generate(prompt, Overrides(weights={"spm": 0}, max_tokens=3, seed=1))
    assert len(reply.steps) == 3


def test_a_reply_does_not_depend_on_what_was_asked_before(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    settings = Overrides(seed=1, max_tokens=5, strategy="ce")
    fresh = ensemble.generate("the cat sat", settings)
    ensemble.generate("the cat sat on the mat", settings)
    again = ensemble.generate("the cat sat", settings)
    # A longer prompt was evaluated in between: its beginning is not used for this one.
    assert [u.prompt_evaluated for u in again.usage] == [u.prompt_evaluated for u in fresh.usage]
    assert again.text == fresh.text
    assert [u.prompt_evaluated for u in ensemble.generate("the cat sat", settings).usage] == [1, 1]


def test_a_router_or_an_alignment_that_fails_is_one_error(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")

    def failing(*_: object) -> object:
        raise KeyError("gate")

    for part, message in (("router", "the router failed after 0 bytes"), ("alignment", 'member "')):
        working = getattr(ensemble.engine, part)
        setattr(ensemble.engine, part, failing)
        with pytest.raises(RunError, match=message):
            ensemble.generate("Hello")
        setattr(ensemble.engine, part, working)


@pytest.mark.parametrize("prompt", [None, ["x"], [{"role": "user", "content": "x"}]])
def test_what_is_no_conversation(open_ensemble: OpenEnsemble, prompt: object) -> None:
    with pytest.raises((InputError, TypeError)):
        open_ensemble("bpe_a").generate(prompt)  # type: ignore[arg-type]


def test_roles_that_are_none() -> None:
    with pytest.raises(InputError, match="'tool'"):
        Message("tool", "x")  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_the_likeliest_pieces_of_the_distribution_that_was_sampled_from(
    open_ensemble: OpenEnsemble, strategy: str
) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    config = me_local.config.override(ensemble.config, Overrides(seed=1, max_tokens=20, strategy=strategy, top_k=5))  # type: ignore[arg-type]
    prompts = ensemble.prompter.raw_prompts("the cat", config)
    plain = ensemble.start(config, prompts).finish()
    steps = ensemble.start(config, prompts, top=10).finish().steps
    assert [step.piece for step in steps] == [step.piece for step in plain.steps]
    assert all(step.top == () for step in plain.steps)
    for step in steps:  # two members with five tokens each: the ten pieces are the whole mixture
        probabilities = [probability for _, probability in step.top]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)
        assert dict(step.top)[step.piece] == step.probability
    few = ensemble.start(config, prompts, top=2).finish().steps
    assert [step.top for step in few] == [step.top[:2] for step in steps]


@pytest.mark.parametrize("names", [("bpe_a", "spm"), ("bpe_a", "bpe_b"), ("spm",)])
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_a_reply_goes_on_behind_what_the_assistant_began(
    open_ensemble: OpenEnsemble, names: tuple[str, ...], strategy: str
) -> None:
    """Each member sees its prompt, and behind it the ids of the whole text: of what is given and what it wrote."""
    with open_ensemble(*names) as ensemble:
        begun = [Message("user", "the cat"), Message("assistant", " sat on")]
        stream = ensemble.stream(begun, Overrides(seed=3, max_tokens=8, strategy=strategy))  # type: ignore[arg-type]
        pieces = b"".join(step.piece for step in stream)
        generation = stream._draft.generation
        assert generation.text == b" sat on" + pieces
        assert stream.reply.text.encode() in pieces or b"\xef" in stream.reply.text.encode()
        prompts = ensemble.prompter.prompts(begun[:1], ensemble.config).ids
        for member, prompt in zip(ensemble.members, prompts, strict=True):
            text = member.vocabulary.encode(b" sat on")
            i = ensemble.members.index(member)
            assert generation.ids(i)[: len(prompt)].tolist() == prompt.tolist()
            if not ensemble.engine.unified.same:
                assert generation.ids(i)[len(prompt) :].tolist() == member.vocabulary.encode(generation.text)
            assert generation.given[i] == len(prompt) + len(text)
        many = [finished.reply for finished in ensemble.generate_many([begun], Overrides(seed=3, max_tokens=8))]
        assert many[0] is not None


ENDLESS = Overrides(seed=3, strategy="ce", max_tokens=30, constraint=Constraint("regex", "[ a-z]{400}"))
PRECISE = 'type_k = "f32"\ntype_v = "f32"'


@pytest.mark.parametrize("cut", [1, 7, 15])
@pytest.mark.parametrize("raw", [False, True])
def test_a_reply_that_was_cut_goes_on_as_it_would_have(open_ensemble: OpenEnsemble, cut: int, raw: bool) -> None:
    """By CE, whose draws are those of their places in the text, in full precision."""
    ensemble = open_ensemble("bpe_c", "spm", member=PRECISE)
    user, shorter = Message("user", "the cat"), replace(ENDLESS, max_tokens=30 - cut)
    whole = ensemble.generate("the cat" if raw else [user], ENDLESS, raw=raw)
    begun = "".join(step.text for step in whole.steps[:cut])
    rest = ensemble.generate("the cat" + begun if raw else [user, Message("assistant", begun)], shorter, raw=raw)
    assert begun + rest.text == whole.text
    assert len(rest.steps) > 5


def test_ids_are_at_the_places_of_their_text(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("spm", member=PRECISE)
    ids = tuple(ensemble.members[0].vocabulary.encode(b"the cat", at_start=True))
    by_ids = ensemble.generate(Tokens(ids), replace(ENDLESS, constraint=None), raw=True)
    assert by_ids.text == ensemble.generate("the cat", replace(ENDLESS, constraint=None), raw=True).text
