"""Members on `llama_cpp.Llama` objects: the replies of models.toml, seed by seed, and what their owner may do."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import ROOT
from gguf import GGUFWriter
from selection import slow_but

from me_local import (
    Chat,
    ConfigError,
    Ensemble,
    InputError,
    LoadError,
    MeLocalError,
    Overrides,
    RunError,
    Sampling,
    load,
    load_config,
)
from me_local.decoding.reply import Reply
from me_local.measuring.inspection import inspect_member

WriteModels = Callable[..., Path]
MakeLlama = Callable[..., llama_cpp.Llama]
PROMPT = "the cat sat on the mat"
SEEDS = range(20)


@pytest.fixture
def make_llama(tiny: dict[str, Path]) -> Iterator[MakeLlama]:
    """Makes a `Llama` of a tiny model, with the options that `write_models` gives a member."""
    made: list[llama_cpp.Llama] = []

    def make(name: str, **options: Any) -> llama_cpp.Llama:
        usual = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
        made.append(llama_cpp.Llama(str(tiny[name]), **usual | options))
        return made[-1]

    yield make
    for llama in made:
        llama.close()


def replies(ensemble: Ensemble, strategy: str, *, raw: bool, seeds: Sequence[int] = SEEDS) -> list[Reply]:
    settings = [Overrides(seed=seed, max_tokens=12, strategy=strategy) for seed in seeds]  # type: ignore[arg-type]
    return [ensemble.generate(PROMPT, each, raw=raw) for each in settings]


def said(some: Sequence[Reply]) -> list[list[tuple[object, ...]]]:
    """Everything of the steps, to the last bit."""
    return [[(step.piece, step.member, step.probability, step.shares) for step in reply.steps] for reply in some]


MEMORIES: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (("bpe_a", "spm"), {}, ""),
    (("bpe_a", "bpe_b"), {"n_batch": 8}, "n_batch = 8"),
    (("swa", "recurrent"), {}, ""),
    (("hybrid", "bpe_c"), {}, ""),
    (("swa", "bpe_a"), {"swa_full": False}, "swa_full = false"),
    (("recurrent", "hybrid"), {"n_batch": 8}, "n_batch = 8"),
    (("bpe_a", "spm"), {"type_k": 0, "type_v": 0}, 'type_k = "f32"\ntype_v = "f32"'),
    (("bpe_a", "spm"), {"rope_freq_base": 500.0, "n_ubatch": 4}, "llama.rope_freq_base = 500.0\nllama.n_ubatch = 4"),
]


@pytest.mark.parametrize("memory", slow_but(range(len(MEMORIES)), 0, 2, 5))
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "chat"])
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_the_replies_of_the_files(
    write_models: WriteModels,
    make_llama: MakeLlama,
    memory: int,
    raw: bool,
    strategy: str,
) -> None:
    """Without guesses, which instances do not evaluate: by other batches the low bits are others."""
    names, options, member = MEMORIES[memory]
    models = write_models(*names, weights=[0.7, 0.3], member=member)
    with load(models, Overrides(draft="none")) as ensemble:
        expected = replies(ensemble, strategy, raw=raw)
    instances = {name: make_llama(name, **options) for name in names}
    with Ensemble.of(instances, dict(zip(names, [0.7, 0.3], strict=True))) as ensemble:
        found = replies(ensemble, strategy, raw=raw)
    assert said(found) == said(expected)
    assert [[u.prompt_evaluated for u in r.usage] for r in found] == [
        [u.prompt_evaluated for u in r.usage] for r in expected
    ]
    assert len({reply.text for reply in found}) > 10


def test_words_and_likelihoods_are_those_of_the_files(write_models: WriteModels, make_llama: MakeLlama) -> None:
    by_words = Overrides(seed=2, unit="word", max_tokens=20)
    found = []
    for ensemble in (
        load(write_models("bpe_a", "spm")),
        Ensemble.of({name: make_llama(name) for name in ("bpe_a", "spm")}),
    ):
        with ensemble:
            reply = ensemble.generate(PROMPT, by_words)
            found.append((said([reply]), ensemble.score("the cat", " sat on the mat"), ensemble.unit))
            assert ensemble.generate(PROMPT, by_words).text == reply.text  # a score in between changes nothing
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["bpe_a", "swa", "recurrent", "hybrid"])
def test_what_its_owner_does_in_between_changes_no_reply(make_llama: MakeLlama, name: str) -> None:
    def generate(llama: llama_cpp.Llama) -> None:
        llama.create_completion("the cat", max_tokens=5, temperature=0, seed=1)

    def end(llama: llama_cpp.Llama) -> None:
        llama.eval([5, 6])

    def forget(llama: llama_cpp.Llama) -> None:
        llama.reset()

    def others(llama: llama_cpp.Llama) -> None:
        llama.input_ids[: llama.n_tokens] = 7

    def same_tokens_in_other_batches(llama: llama_cpp.Llama) -> None:
        ids = llama.input_ids[: llama.n_tokens].tolist()
        llama.reset()
        for i in ids:
            llama.eval([i])

    llama = make_llama(name)
    with Ensemble.of({"a": llama, "b": make_llama("bpe_c")}) as ensemble:
        fresh = said(replies(ensemble, "me", raw=True, seeds=[3]))
        for use in (generate, end, forget, others, same_tokens_in_other_batches):
            use(llama)
            found = replies(ensemble, "me", raw=True, seeds=[3])
            assert said(found) == fresh
            assert found[0].usage[0].prompt_evaluated in (0, found[0].usage[0].prompt_length)  # none of it was kept
        stream = ensemble.stream(PROMPT, Overrides(seed=3, max_tokens=12), raw=True)
        for _ in zip(range(5), stream, strict=False):
            llama.eval([8])
        stream.finish()
        texts = [step[0] for step in fresh[0]]
        assert [step.piece for step in stream.reply.steps] == texts  # numbers may differ in their low bits


@pytest.mark.parametrize("name", ["bpe_a", "swa", "recurrent", "hybrid"])
def test_between_two_steps_it_says_what_it_holds(make_llama: MakeLlama, name: str) -> None:
    llama, other = make_llama(name), make_llama(name)
    with Ensemble.of({"a": llama}) as ensemble:
        member = ensemble.members[0]
        stream = ensemble.stream("the cat", Overrides(seed=1, max_tokens=9, ignore_eos=True), raw=True)
        for _ in stream:
            assert llama.input_ids[: llama.n_tokens].tolist() == member.caches[0].ids.tolist()
            assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llama.ctx), 0) == llama.n_tokens - 1
        pieces = member.vocabulary.joined(llama.input_ids[: llama.n_tokens].tolist())
        assert pieces.decode().strip() == ("the cat" + stream.reply.text)[: len(pieces)].strip()
    held = llama.input_ids[: llama.n_tokens].tolist()
    assert len(held) > 5
    llama.eval([5])
    other.eval([*held, 5])
    size = llama.n_vocab()
    mine, fresh = (np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(x.ctx, -1), (size,)) for x in (llama, other))
    np.testing.assert_allclose(mine, fresh, atol=2e-2)


def test_closing_the_ensemble_leaves_the_instances(make_llama: MakeLlama) -> None:
    instances = {"a": make_llama("bpe_a"), "b": make_llama("spm", n_threads=3, n_threads_batch=2)}
    with Ensemble.of(instances) as ensemble:
        expected = said(replies(ensemble, "ce", raw=True))
        ensemble.members[1].share_cores(2)
    with pytest.raises(RunError, match=r"^the ensemble is closed$"):
        ensemble.generate("x")
    assert instances["a"].create_completion("the cat", max_tokens=3)["choices"]
    assert llama_cpp.llama_n_threads(instances["b"].ctx) == 3
    assert llama_cpp.llama_n_threads_batch(instances["b"].ctx) == 2
    with Ensemble.of(instances) as again:
        assert said(replies(again, "ce", raw=True)) == expected


def test_an_instance_that_its_owner_closes_is_one_line(make_llama: MakeLlama) -> None:
    llama = make_llama("bpe_a")
    ensemble = Ensemble.of({"a": llama, "b": make_llama("spm")})
    stream = ensemble.stream("the cat", Overrides(seed=1, max_tokens=100, strategy="ce"), raw=True)
    next(stream)
    ensemble.score("the cat", " sat")
    llama.close()
    line = '^the Llama of member "a" was closed: make another, and an ensemble of it$'
    for use in (
        stream.finish,
        lambda: ensemble.generate("x"),
        lambda: ensemble.generate("x", raw=True),
        lambda: ensemble.generate("a b " * 3000, raw=True),
        lambda: ensemble.score("a long, unknown text of many words", " sat"),
        lambda: ensemble.members[0].logits(),
        lambda: Chat(ensemble).say("Hello").finish(),
    ):
        with pytest.raises(RunError, match=line):
            use()
    ensemble.close()
    with pytest.raises(RunError, match="closed"):
        ensemble.generate("x")


def test_an_instance_that_is_closed_while_it_is_evaluated(make_llama: MakeLlama) -> None:
    """Its owner waits until the evaluation is over; here the other thread cannot begin before one is under way."""
    llama = make_llama("bpe_a")
    evaluating, real = threading.Event(), llama.eval

    def evaluate(tokens: Sequence[int]) -> None:
        evaluating.set()
        real(tokens)

    llama.eval = evaluate
    ends: list[MeLocalError | Reply] = []

    def write() -> None:
        with Ensemble.of({"a": llama}) as ensemble:
            for seed in range(10_000):
                try:
                    ends[:] = [ensemble.generate("the cat", Overrides(seed=seed, max_tokens=100), raw=True)]
                except MeLocalError as error:
                    ends[:] = [error]
                    return

    writing = threading.Thread(target=write)
    writing.start()
    assert evaluating.wait(30)
    llama.close()
    writing.join(60)
    assert not writing.is_alive()
    assert "was closed" in str(ends[0])


def test_an_evaluation_that_fails_or_is_interrupted(make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = make_llama("recurrent")
    with Ensemble.of({"a": llama}) as ensemble:
        fresh = said(replies(ensemble, "me", raw=True, seeds=[5]))
        decode = llama._ctx.decode

        def failing(batch: object) -> None:
            raise RuntimeError("llama_decode returned 1")

        def interrupted(batch: object) -> None:
            decode(batch)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(llama._ctx, "decode", failing)
            with pytest.raises(RunError, match=r'^member "a", tokens \d+ to \d+: no room is left in its KV cache$'):
                ensemble.generate("another text", raw=True)
        assert said(replies(ensemble, "me", raw=True, seeds=[5])) == fresh
        stream = ensemble.stream(PROMPT, Overrides(seed=5, max_tokens=12), raw=True)
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(llama._ctx, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stream.finish()
        assert llama.input_ids[: llama.n_tokens].tolist() == ensemble.members[0].caches[0].ids.tolist()
        assert said(replies(ensemble, "me", raw=True, seeds=[5])) == fresh


def test_a_use_in_the_middle_of_a_step_is_no_reply_of_another(make_llama: MakeLlama) -> None:
    llama = make_llama("bpe_a")
    with Ensemble.of({"a": llama}) as ensemble:
        member = ensemble.members[0]
        member.sync(np.array([5, 6, 7], dtype=np.int32), lambda: False)
        llama.eval([9])
        with pytest.raises(RunError, match=r'^member "a": its Llama was used by another while a step was under way$'):
            member.logits()


def test_an_ensemble_that_is_forgotten_gives_its_instances_free(make_llama: MakeLlama) -> None:
    llama = make_llama("bpe_a")
    Ensemble.of({"a": llama}).generate("Hello", Overrides(seed=1, max_tokens=3))
    with Ensemble.of({"b": llama}) as ensemble:
        assert ensemble.generate("Hello", Overrides(seed=1, max_tokens=3)).text


def test_verify_and_inspect_know_nothing_of_the_difference(make_llama: MakeLlama, write_models: WriteModels) -> None:
    files, instances = write_models("bpe_a", "spm"), {name: make_llama(name) for name in ("bpe_a", "spm")}
    with load(files) as loaded, Ensemble.of(instances) as ensemble:
        for theirs, ours in zip(loaded.members, ensemble.members, strict=True):
            expected = replace(inspect_member(theirs), working_bytes=None, total_bytes=None)
            assert inspect_member(ours) == expected


def problem(*arguments: Any, **settings: Any) -> str:
    with pytest.raises((ConfigError, LoadError)) as caught:
        Ensemble.of(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_a_member_is_one_line(make_llama: MakeLlama, tiny: dict[str, Path]) -> None:
    llama = make_llama("bpe_a")
    assert problem({}) == "Ensemble.of: takes a mapping from the names of members to llama_cpp.Llama objects"
    assert problem([llama]) == problem({})
    assert problem({"a": str(tiny["bpe_a"])}) == 'Ensemble.of: "a": is no llama_cpp.Llama, but of the type str'
    assert '"b": is the same Llama as "a"' in problem({"a": llama, "b": llama})
    assert "make it without logits_all" in problem({"a": make_llama("bpe_a", logits_all=True)})
    assert "make it without embedding" in problem({"a": make_llama("bpe_a", embedding=True)})
    assert "make it without vocab_only" in problem({"a": make_llama("bpe_a", vocab_only=True)})
    drafting = make_llama("bpe_a")
    drafting.draft_model = lambda ids, **_: ids
    assert "make it without draft_model" in problem({"a": drafting})
    gone = make_llama("bpe_a")
    gone.close()
    assert problem({"a": gone}) == 'Ensemble.of: "a": is closed: make it again'
    assert problem({"a": llama}, batch=2).startswith('Ensemble.of: the Llama of member "a" has room for one reply')
    assert problem({"a": llama}, batch=0) == "batch: there is at least one reply at once, got 0"
    assert problem({"a": llama}, {"b": 1.0}) == 'Ensemble.of: weights: "b" is no member; there are a'
    assert problem({"a": llama}, sampling={"b": Sampling()}) == 'Ensemble.of: sampling: "b" is no member; there are a'
    assert problem({"a": llama}, templates={"b": "plain"}) == 'Ensemble.of: templates: "b" is no member; there are a'
    assert problem({"a": llama}, {"a": -1.0}) == 'Ensemble.of: "a".weight: must be at least 0, got -1.0'
    assert problem({"a": llama}, {"a": 0.0}) == "Ensemble.of: weights: every one is 0; one must be above 0"
    assert problem({"a": llama}, sampling={"a": Sampling(top_p=2)}).startswith('Ensemble.of: "a".top_p: must be')
    assert 'member "a": chat_template' in problem({"a": llama}, templates={"a": "no-such"})
    assert "must be a name" in problem({"a=b": llama})
    assert "must be a string" in problem({3: llama})
    with Ensemble.of({"a": llama}):
        assert "is in another ensemble, which is open: close that first" in problem({"b": llama})
    assert Ensemble.of({"b": llama}).names == ("b",)


def test_a_prompt_for_a_context_that_is_too_small(make_llama: MakeLlama) -> None:
    with Ensemble.of({"a": make_llama("bpe_a", n_ctx=12)}) as ensemble:
        with pytest.raises(
            InputError,
            match=r'for member "a", which exceeds the available context size of 12.*as its Llama is made',
        ):
            ensemble.generate(PROMPT * 5, raw=True)
        reply = ensemble.generate("the", Overrides(seed=1, temperature=0), raw=True)
        assert reply.finish_reason in ("length", "stop")
        assert reply.usage[0].prompt_length + reply.usage[0].text_evaluated <= 12


def test_weights_sampling_and_templates_by_the_members_names(make_llama: MakeLlama, tmp_path: Path) -> None:
    instances = {"a": make_llama("bpe_a"), "b": make_llama("spm"), "c": make_llama("bpe_c")}
    own = tmp_path / "own.jinja"
    own.write_text("Q: {% for m in messages %}{{ m.content }} {% endfor %}A:")
    with Ensemble.of(
        instances,
        {"a": 2.0, "b": 1.0},
        Overrides(seed=1, system="all", temperature=0.5),
        sampling={"b": Sampling(top_k=3)},
        templates={"b": str(own), "c": "chatml"},
    ) as ensemble:
        members = ensemble.config.members
        assert [member.weight for member in members] == [0.5, 0.25, 0.25]
        assert [(m.sampling.top_k, m.sampling.temperature) for m in members] == [(10, 0.5), (3, 0.5), (10, 0.5)]
        assert (ensemble.config.seed, ensemble.config.system) == (1, "all")
        _, prompts, _ = ensemble.prompter.asked("Hello", ensemble.config, raw=False)
        texts = [m.vocabulary.joined(ids.tolist()) for m, ids in zip(ensemble.members, prompts, strict=True)]
        assert texts[1].strip() == b"Q: all Hello A:"
        assert b"<|im_start|>user\nHello" in texts[2]
        assert not any("transcript" in notice for notice in ensemble.notices)


def test_an_adapter_with_a_scale_is_in_the_likelihoods_too(
    make_llama: MakeLlama, write_models: WriteModels, tmp_path: Path
) -> None:
    path, random = tmp_path / "lora.gguf", np.random.default_rng(3)
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for part, shape in (("a", (2, 32)), ("b", (32, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{part}", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = []
    for ensemble in (
        load(write_models("bpe_a", member=f'lora = "{path}"\nllama.lora_scale = 0.5')),
        Ensemble.of({"bpe_a": make_llama("bpe_a", lora_path=str(path), lora_scale=0.5)}),
        Ensemble.of({"bpe_a": make_llama("bpe_a", lora_path=str(path))}),
        Ensemble.of({"bpe_a": make_llama("bpe_a")}),
    ):
        with ensemble:
            steps = said(replies(ensemble, "me", raw=True, seeds=[1, 2]))
            found.append((steps, ensemble.score("the cat", " sat on the mat")))
    assert found[0] == found[1]
    assert all(found[i][part] != found[1][part] for i in (2, 3) for part in (0, 1))


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_the_demo_models(strategy: str) -> None:
    """Of models.toml, with two prompts: one raw, one in each model's own chat template."""
    config = load_config(ROOT / "models.toml")
    overrides = Overrides(temperature=1.0, repeat_penalty=1.05, draft="none")  # instances evaluate no guesses
    with load(ROOT / "models.toml", overrides) as ensemble:
        expected = [said(replies(ensemble, strategy, raw=raw, seeds=range(6))) for raw in (True, False)]
    instances = {
        member.name: llama_cpp.Llama(str(member.path), n_ctx=member.n_ctx, n_gpu_layers=-1, verbose=False)
        for member in config.members
    }
    weights = {member.name: member.weight for member in config.members}
    with Ensemble.of(instances, weights, overrides) as ensemble:
        assert [said(replies(ensemble, strategy, raw=raw, seeds=range(6))) for raw in (True, False)] == expected
    for llama in instances.values():
        llama.close()
