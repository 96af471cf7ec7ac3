"""The table [members.llama]: what llama.cpp is told, what is refused and in which words, and who shares weights."""

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from conftest import logits_of, write_toml

from me_local import ConfigError, Ensemble, LoadError, Overrides, load, load_config
from me_local.config import MemberConfig
from me_local.llama import options, trial
from me_local.llama.member import Member
from me_local.llama.weights import Shelf

OpenMember = Callable[..., Member]
OpenEnsemble = Callable[..., Ensemble]
IDS = np.array([5, 40, 300, 7, 7, 81, 12, 200, 33, 9], dtype=np.int32)


def table(**llama: object) -> MemberConfig:
    return MemberConfig(name="a", llama=llama)


def problem(**llama: object) -> str:
    """The whole error; there must be one, of one line."""
    with pytest.raises(ConfigError) as caught:
        options.require_options(table(**llama), "models.toml: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_frequency_of_the_positions_changes_logits_as_in_llama_cpp_python(
    open_member: OpenMember, tiny: dict[str, Path]
) -> None:
    plain, other = open_member("bpe_a"), open_member("bpe_a", llama={"rope_freq_base": 500.0})
    theirs = llama_cpp.Llama(str(tiny["bpe_a"]), n_ctx=512, n_threads=1, rope_freq_base=500.0, verbose=False)
    theirs.eval(IDS.tolist())
    expected = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(theirs.ctx, -1), (plain.vocabulary.size,))
    assert np.abs(logits_of(plain, IDS) - expected).max() > 1e-3
    assert np.array_equal(logits_of(other, IDS), expected)
    theirs.close()


def test_each_parameter_reaches_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[int] = []
    monkeypatch.setattr(llama_cpp, "llama_numa_init", began.append)
    model, context = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    member = table(
        split_mode="row",
        use_mlock=True,
        check_tensors=True,
        numa="isolate",
        rope_scaling_type="yarn",
        yarn_ext_factor=0.5,
        yarn_orig_ctx=64,
        n_ubatch=8,
        offload_kqv=False,
        op_offload=False,
        defrag_thold=0.25,
        n_threads_batch=3,
        kv_overrides={"a.b": True, "c": 7, "d": 0.5, "e": "word"},
    )
    options.set_model(model, member)
    options.set_context(context, member)
    assert (model.split_mode, model.load_mode, model.check_tensors) == (2, 3, True)  # MMAP_MLOCK
    assert began == [2]
    assert (context.rope_scaling_type, context.yarn_ext_factor, context.yarn_orig_ctx) == (2, 0.5, 64)
    assert (context.n_ubatch, context.offload_kqv, context.op_offload) == (8, False, False)
    assert (context.defrag_thold, context.n_threads_batch) == (0.25, 3)
    entries = [model.kv_overrides[i] for i in range(5)]
    assert [entry.key for entry in entries] == [b"a.b", b"c", b"d", b"e", b""]
    assert entries[0].value.val_bool is True
    assert (entries[1].value.val_i64, entries[2].value.val_f64, entries[3].value.val_str) == (7, 0.5, b"word")
    assert [entry.tag for entry in entries[:4]] == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("mmap", "mlock", "mode"), [(None, True, "MMAP_MLOCK"), (False, None, "NONE"), (False, True, "MLOCK")]
)
def test_how_the_file_is_read(mmap: bool | None, mlock: bool | None, mode: str) -> None:
    given = {key: value for key, value in (("use_mmap", mmap), ("use_mlock", mlock)) if value is not None}
    model = llama_cpp.llama_model_default_params()
    options.set_model(model, table(**given))
    assert model.load_mode == getattr(llama_cpp, f"LLAMA_LOAD_MODE_{mode}")


@pytest.mark.parametrize(
    "llama", [{"n_ubatch": 4}, {"use_mmap": False}, {"no_perf": False}, {"use_extra_bufts": False}]
)
def test_what_only_changes_how_it_is_computed(open_member: OpenMember, llama: dict[str, object]) -> None:
    other = logits_of(open_member("bpe_a", llama=llama), IDS).copy()
    np.testing.assert_allclose(other, logits_of(open_member("bpe_a"), IDS), atol=1e-3)


def test_a_header_with_other_values(open_member: OpenMember) -> None:
    changed = {"tokenizer.ggml.add_bos_token": False, "general.name": "ours", "llama.context_length": 300}
    plain, member = open_member("bpe_c"), open_member("bpe_c", llama={"kv_overrides": changed})
    assert plain.vocabulary.bos is not None
    assert member.vocabulary.bos is None
    assert member.weights.metadata["general.name"] == "ours"
    assert member.weights.metadata["tokenizer.ggml.add_bos_token"] == "false"
    assert (member.n_ctx, plain.n_ctx > 300) == (300, True)


def test_another_way_to_part_words_is_another_vocabulary(open_member: OpenMember) -> None:
    plain, same = open_member("bpe_a").vocabulary, open_member("bpe_a", llama={"n_ubatch": 8}).vocabulary
    other = open_member("bpe_a", llama={"kv_overrides": {"tokenizer.ggml.pre": "llama-bpe"}}).vocabulary
    assert plain.identity == same.identity
    assert plain.identity != other.identity


def test_a_header_value_of_another_type_is_one_line(open_member: OpenMember) -> None:
    with pytest.raises(ConfigError, match=r'member "bpe_a"\.llama\.kv_overrides\."llama\.context_length": must be int'):
        open_member("bpe_a", llama={"kv_overrides": {"llama.context_length": 300.0}})


def test_what_llama_cpp_refuses_is_one_line(open_member: OpenMember) -> None:
    with pytest.raises(LoadError, match=r'member "bpe_a": .*bpe_a\.gguf cannot be loaded: [^\n]+$'):
        open_member("bpe_a", llama={"kv_overrides": {"llama.block_count": 9}})


def test_an_embedding_model_by_its_header_is_refused(open_member: OpenMember) -> None:
    with pytest.raises(LoadError, match="does not generate text"):
        open_member("bpe_a", llama={"kv_overrides": {"llama.attention.causal": False}})


@pytest.mark.parametrize(
    ("llama", "words"),
    [
        ({"rope_freq_bse": 1.0}, '"a".llama.rope_freq_bse: unknown key; did you mean "rope_freq_base"?'),
        ({"quite_another": 1}, '"a".llama.quite_another: unknown key; allowed: check_tensors, '),
        ({"n_ctx": 5}, '"a".llama.n_ctx: set n_ctx in [[members]] itself'),
        ({"lora_path": "x"}, '"a".llama.lora_path: set lora in [[members]] itself'),
        ({"flash_attn_type": 1}, "set flash_attn in [[members]] itself"),
        ({"logits_all": True}, '"a".llama.logits_all: cannot be set: me-local asks for'),
        ({"n_seq_max": 4}, "cannot be set: me-local sets it by the number of replies at once"),
        ({"seed": 4}, "cannot be set: set seed in [ensemble]"),
        ({"cb_eval": 4}, "cannot be set: it is a pointer, which a file cannot hold"),
        ({"devices": []}, "cannot be set: it is a pointer, which a file cannot hold"),
        ({"rope_freq_base": "x"}, 'llama.rope_freq_base: must be a finite number, got "x"'),
        ({"rope_freq_base": True}, "llama.rope_freq_base: must be a finite number, got true"),
        ({"yarn_ext_factor": float("nan")}, "must be a finite number, got nan"),
        ({"lora_scale": "x"}, "llama.lora_scale: must be a finite number"),
        ({"offload_kqv": 1}, "llama.offload_kqv: must be true or false, got 1"),
        ({"use_mmap": "no"}, 'llama.use_mmap: must be true or false, got "no"'),
        ({"n_ubatch": 1.5}, "llama.n_ubatch: must be an integer, got 1.5"),
        ({"n_ubatch": -1}, "llama.n_ubatch: must be from 0 to 4294967295, got -1"),
        ({"n_threads_batch": 0}, "llama.n_threads_batch: must be from 1 to 512, got 0"),
        (
            {"rope_scaling_type": "yarm"},
            'must be one of "unspecified", "none", "linear", "yarn", "longrope", got "yarm"',
        ),
        ({"rope_scaling_type": 9}, "must be one of "),
        ({"numa": "all"}, 'must be one of "disabled", "distribute", "isolate", "numactl", "mirror", got "all"'),
        ({"kv_overrides": 3}, "llama.kv_overrides: must be a table, got 3"),
        ({"kv_overrides": {"a": {"b": 1}}}, "llama.kv_overrides.a: a key with dots stands in quotes"),
        ({"kv_overrides": {"a": [1]}}, 'llama.kv_overrides."a": must be true or false, a number, or a text'),
        ({"kv_overrides": {"a": "é" * 64}}, "a text of at most 127 bytes"),
        ({"kv_overrides": {"a" * 128: 1}}, "a key has at most 127 bytes"),
        ({"kv_overrides": {"a": 2**63}}, 'llama.kv_overrides."a": must be'),
        ({"load_mode": "mmap", "use_mmap": True}, '"a".llama.load_mode: goes without use_mmap and use_mlock'),
    ],
)
def test_mistakes_are_one_line_each(llama: dict[str, object], words: str) -> None:
    assert problem(**llama).startswith('models.toml: member "a".llama.')
    assert words in problem(**llama)


def test_every_parameter_of_llama_cpp_is_settable_or_has_a_reason() -> None:
    """Whatever a newer llama.cpp brings, nothing falls between."""
    kinds = (llama_cpp.llama_model_params, llama_cpp.llama_context_params)
    for key in (name for kind in kinds for name, _ in kind._fields_):
        try:
            options.require_options(table(**{key: None}))
        except ConfigError as error:
            assert "unknown" not in str(error)  # noqa: PT017
        else:
            pytest.fail(f"{key} takes nothing for a value")


def test_from_the_file_to_the_context(tiny: dict[str, Path], tmp_path: Path) -> None:
    path = write_toml(tmp_path, tiny, "bpe_a", "spm", weights=None, top="", member="[members.llama]\nn_ubatch = 16")
    assert [member.llama for member in load_config(path).members] == [{"n_ubatch": 16}] * 2
    with load(path) as ensemble:
        assert ensemble.generate("Hello", Overrides(seed=1, max_tokens=5)).usage
    path.write_text(path.read_text() + "\nn_ctx = 3")
    with pytest.raises(ConfigError, match=r'models\.toml: member "spm"\.llama\.n_ctx: set n_ctx in'):
        load(path)
    path.write_text(path.read_text().replace("[members.llama]\nn_ubatch = 16", "llama = 3", 1))
    with pytest.raises(ConfigError, match=r'members\[0\] "bpe_a"\.llama: must be a table, got 3'):
        load_config(path)


def test_members_of_one_file_share_weights_where_the_models_are_the_same(tiny: dict[str, Path]) -> None:
    shelf = Shelf()
    settings = [
        {},
        {"rope_freq_base": 500.0},
        {"n_ubatch": 8, "no_perf": False},
        {"use_mmap": False},
        {"kv_overrides": {"general.name": "other"}},
    ]
    members = [MemberConfig(name="a", path=tiny["bpe_a"], llama=llama) for llama in settings]
    weights = [shelf.weights(member) for member in members]
    assert [weights.index(each) for each in weights] == [0, 0, 0, 3, 4]
    shelf.close()


def test_one_file_twice_with_contexts_of_its_own(tiny: dict[str, Path], tmp_path: Path) -> None:
    path = write_toml(tmp_path, tiny, "bpe_a", weights=None, top="", member="")
    other = path.read_text().replace('"bpe_a"', '"b"', 1) + "\n[members.llama]\nrope_freq_base = 500.0"
    path.write_text(path.read_text() + "\n" + other)
    with load(path, batch=2) as ensemble:
        one, two = ensemble.members
        assert one.weights is two.weights
        assert np.abs(logits_of(one, IDS) - logits_of(two, IDS)).max() > 1e-3
        assert len(list(ensemble.generate_many(["a", "b"], Overrides(seed=1, max_tokens=5, strategy="ce")))) == 2


def test_a_context_beyond_the_training_needs_to_be_stretched(open_member: OpenMember) -> None:
    trained = open_member("bpe_a").weights.trained_context
    assert open_member("bpe_a", n_ctx=trained * 2).n_ctx == trained
    stretched = open_member("bpe_a", n_ctx=trained * 2, llama={"rope_scaling_type": "linear", "rope_freq_scale": 0.5})
    assert stretched.n_ctx == trained * 2
    assert open_member("bpe_a", n_ctx=0, llama={"rope_freq_scale": 0.5}).n_ctx == trained


def test_threads_for_batches_of_their_own(open_member: OpenMember, monkeypatch: pytest.MonkeyPatch) -> None:
    member = open_member("bpe_a", n_threads=4, llama={"n_threads_batch": 6})
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(llama_cpp, "llama_set_n_threads", lambda _, one, many: told.append((one, many)))
    for parts in (2, 8, 1):
        member.share_cores(parts)
    assert told == [(2, 3), (1, 1), (4, 6)]


def test_the_trial_sees_the_table(tiny: dict[str, Path]) -> None:
    plain = MemberConfig(name="a", path=tiny["bpe_a"])
    keys = {trial._key(plain), trial._key(MemberConfig(name="a", path=tiny["bpe_a"], llama={"use_mmap": False}))}
    assert len(keys) == 2
    read = trial._CONFIG.validate_json(trial._CONFIG.dump_json(table(rope_freq_base=2.5, kv_overrides={"a": True})))
    assert read.llama == {"rope_freq_base": 2.5, "kv_overrides": {"a": True}}


@pytest.mark.slow
def test_what_ends_the_process_is_found_by_the_trial(write_models: Callable[..., Path]) -> None:
    path = write_models("bpe_a", member="[members.llama]\nkv_overrides = { 'llama.attention.head_count' = 0 }")
    with pytest.raises(LoadError, match="bpe_a"):
        load(path, check=True)
