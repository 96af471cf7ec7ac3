"""One member: its mirror against fresh evaluations, its failures, and what it refuses to load."""

import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import llama_cpp
import numpy as np
import pytest
from conftest import logits_of, lone_member
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from me_local.arrays import IntArray
from me_local.config import MemberConfig
from me_local.errors import ConfigError, LoadError, RunError
from me_local.llama.member import Member
from me_local.llama.weights import Weights, checked_file
from me_local.model import EvaluationInterruptedError
from me_local.text.built_in import render_built_in

OpenMember = Callable[..., Member]
F32 = {"type_k": "f32", "type_v": "f32"}  # an f16 cache rounds batches of different sizes apart by up to 1e-3


def ids(*values: int) -> IntArray:
    return np.array(values, dtype=np.int32)


def fresh(open_member: OpenMember, name: str, context: IntArray) -> np.ndarray:
    """The logits of a clean context that evaluates everything in one pass."""
    with open_member(name) as member:
        return logits_of(member, context).copy()


def test_the_backlog_goes_in_at_once(open_member: OpenMember) -> None:
    member = open_member("bpe_a")
    assert member.sync(ids(5, 6, 7)).tokens == 3
    evaluated = member.sync(ids(5, 6, 7, 8, 9))
    logits = member.logits()
    assert evaluated.tokens == 2
    np.testing.assert_allclose(logits, fresh(open_member, "bpe_a", ids(5, 6, 7, 8, 9)), atol=1e-4)


def test_a_changed_tail_is_evaluated_again(open_member: OpenMember) -> None:
    member = open_member("spm")
    member.sync(ids(10, 11, 12, 13))
    evaluated = member.sync(ids(10, 11, 20))
    logits = member.logits()
    assert evaluated.tokens == 1
    np.testing.assert_allclose(logits, fresh(open_member, "spm", ids(10, 11, 20)), atol=1e-4)


def test_the_same_ids_again_evaluate_the_last_one(open_member: OpenMember) -> None:
    member = open_member("bpe_a")
    first = logits_of(member, ids(5, 6, 7)).copy()
    evaluated = member.sync(ids(5, 6, 7))
    again = member.logits()
    assert evaluated.tokens == 1
    np.testing.assert_allclose(again, first, atol=1e-4)


def test_prepare_cuts_what_is_longer(open_member: OpenMember) -> None:
    member = open_member("bpe_a")
    member.sync(ids(5, 6, 7, 8))
    assert member.prepare(ids(5, 6)).tokens == 0
    assert member.sync(ids(5, 6, 7, 8)).tokens == 2


contexts = st.lists(st.integers(3, 40), min_size=1, max_size=30).map(lambda values: ids(*values))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(contexts, st.booleans()), min_size=1, max_size=6))
def test_any_sequence_of_contexts_equals_fresh_evaluations(
    open_member: OpenMember, steps: list[tuple[IntArray, bool]]
) -> None:
    with open_member("bpe_c", n_batch=8, **F32) as member, open_member("bpe_c", **F32) as reference:
        for context, fails in steps:
            if fails:
                _fail_in_the_middle(member, context)
            reference.forget()
            expected = logits_of(reference, context)
            np.testing.assert_allclose(logits_of(member, context), expected, atol=1e-4)


def _fail_in_the_middle(member: Member, context: IntArray) -> None:
    """An evaluation that decodes and then dies before the bookkeeping, as an interrupt can."""
    decode = member._decode

    def dying(*args: object) -> int:
        decode(*args)
        raise KeyboardInterrupt

    with patch.object(member, "_decode", dying), pytest.raises(KeyboardInterrupt):
        member.sync(np.concatenate([context, ids(3)]))


def test_an_interrupt_between_batches_leaves_the_mirror_right(open_member: OpenMember) -> None:
    member = open_member("bpe_a", n_batch=4)
    answers = iter([False, True])
    with pytest.raises(EvaluationInterruptedError, match="stopped at token 4 of 10"):
        member.sync(ids(*range(5, 15)), lambda: next(answers))
    evaluated = member.sync(ids(*range(5, 15)))
    logits = member.logits()
    assert evaluated.tokens == 6
    np.testing.assert_allclose(logits, fresh(open_member, "bpe_a", ids(*range(5, 15))), atol=1e-4)


@pytest.mark.parametrize(
    ("code", "message"),
    [(1, "no room is left"), (2, "aborted"), (-1, "batch invalid"), (-3, "llama.cpp failed")],
)
def test_a_failed_decode_names_member_and_position(open_member: OpenMember, code: int, message: str) -> None:
    member = open_member("bpe_a")
    member.sync(ids(5, 6, 7))
    failed = pytest.raises(RunError, match=rf'member "bpe_a", tokens 3 to 4: .*{message}')
    with patch.object(member, "_decode", lambda *_: code), failed:
        member.sync(ids(5, 6, 7, 8, 9))
    assert member.sync(ids(5, 6, 7, 8, 9)).tokens == 2


def test_the_context_ends_where_the_training_did(open_member: OpenMember) -> None:
    assert open_member("bpe_a", n_ctx=0).n_ctx == 2048
    assert open_member("bpe_a", n_ctx=10**12).n_ctx == 2048
    assert open_member("bpe_a", n_ctx=300).n_ctx == 512


def test_a_model_on_the_hub(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tiny["bpe_a"])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with lone_member(MemberConfig(name="hub", hf="owner/repo:model.gguf", n_ctx=256)) as member:
        assert member.vocabulary.size == 400
    assert asked == [("owner/repo", "model.gguf")]

    def offline(repository: str, file: str) -> str:
        raise OSError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(LoadError, match=r'hf = "owner/repo:model\.gguf" cannot be fetched: no connection$'):
        Weights(MemberConfig(name="hub", hf="owner/repo:model.gguf"))


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("big-00001-of-00003.gguf", [f"big-0000{i}-of-00003.gguf" for i in (1, 2, 3)]),
        ("q4/big-00002-of-00002.gguf", ["q4/big-00001-of-00002.gguf", "q4/big-00002-of-00002.gguf"]),
        ("big-00001-of-00001.gguf", ["big-00001-of-00001.gguf"]),
        ("big-00004-of-00003.gguf", ["big-00004-of-00003.gguf"]),
        ("big-1-of-3.gguf", ["big-1-of-3.gguf"]),
    ],
)
def test_all_parts_of_a_model_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, parts: list[str]
) -> None:
    asked = []

    def download(repository: str, part: str) -> str:
        asked.append(part)
        (tmp_path / Path(part).name).write_bytes(b"GGUF")
        return str(tmp_path / Path(part).name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert checked_file(MemberConfig(name="hub", hf=f"owner/repo:{file}")) == tmp_path / Path(file).name
    assert asked == parts


@pytest.mark.parametrize("key", ["type_k", "type_v"])
def test_a_cache_of_bf16(open_member: OpenMember, key: str) -> None:
    """It keeps 8 bits of each number, so that logits are near those of f32, but not equal."""
    context = ids(5, 6, 7, 8, 9)
    precise = logits_of(open_member("bpe_a", **F32), context)
    rounded = logits_of(open_member("bpe_a", **F32 | {key: "bf16"}), context)
    assert not np.array_equal(rounded, precise)
    np.testing.assert_allclose(rounded, precise, atol=0.2)


def test_a_split_among_more_devices_than_llama_cpp_knows(tiny: dict[str, Path]) -> None:
    most = llama_cpp.llama_max_devices()
    many = (1.0,) * (most + 1)
    message = f'member "a": tensor_split: has {most + 1} numbers, and llama.cpp knows {most} devices at most'
    with pytest.raises(ConfigError, match=re.escape(message)):
        Weights(MemberConfig(name="a", path=tiny["bpe_a"], tensor_split=many))
    Weights(MemberConfig(name="a", path=tiny["bpe_a"], tensor_split=many[1:])).close()


def test_built_in_templates() -> None:
    chat = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in chat) + "<|im_start|>assistant\n"
    assert render_built_in("chatml", chat) == expected
    long = [("user", "ä" * 5000)]
    assert "ä" * 5000 in render_built_in("chatml", long)
