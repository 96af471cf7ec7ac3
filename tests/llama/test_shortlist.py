"""The largest logits, picked by llama.cpp: the same distribution as all logits. On a CPU the calls work, too."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from selection import slow_but

import me_local
from me_local import Ensemble
from me_local.config import Overrides
from me_local.errors import RunError
from me_local.model import Shortlist
from tests.conftest import OpenMember, WriteModels

SETTINGS = {"type_k": "f32", "type_v": "f32"}
PROMPT = "The lazy dog and the quick fox"
PENALTIES = """top_k = 4
repeat_penalty = 1.5
presence_penalty = 0.5
repeat_last_n = 20
dry_multiplier = 2.0
dry_allowed_length = 1
dry_penalty_last_n = 20"""
BIASES = "top_k = 4\nmin_tokens = 3\nlogit_bias = [[' the', false], ['e', -2.0]]"
RAISED = "top_k = 4\nfrequency_penalty = -0.3"  # nothing is picked
DEVIATIONS = "top_k = 4\ntop_n_sigma = 1.5"  # likewise


@contextmanager
def opened(path: Path, *, short: bool, batch: int = 1) -> Iterator[Ensemble]:
    """An ensemble; with `short`, as if its logits came from a GPU."""
    with me_local.load(path, batch=batch) as ensemble:
        for member in ensemble.members:
            assert not member.on_gpu
            member.on_gpu = short
        yield ensemble


@pytest.mark.parametrize("name", ["bpe_a", "spm"])
def test_it_has_the_largest_logits_of_what_may_be_sampled(open_member: OpenMember, name: str) -> None:
    member = open_member(name, **SETTINGS)
    ids = np.array(member.vocabulary.encode(PROMPT.encode()), dtype=np.int32)
    member.sync(ids)
    logits = member.logits()
    assert isinstance(logits, np.ndarray)
    order = np.argsort(-logits)
    numbers = np.arange(len(logits), dtype=np.int32)
    numbers[order[[0, 2]]] = -1  # two of the best may not be sampled
    expected = sorted(order[[1, 3, 4, 5, 6]].tolist())
    values = logits[expected].copy()

    member.on_gpu = True
    member.shorten(5, numbers)
    member.forget()
    member.sync(ids)
    row = member.logits()
    assert isinstance(row, Shortlist)
    assert row.ids.tolist() == expected
    np.testing.assert_array_equal(row.logits, values)

    member.shorten(0, numbers)
    member.forget()
    member.sync(ids)
    again = member.logits()
    assert isinstance(again, np.ndarray)
    np.testing.assert_array_equal(again[expected], values)


def test_without_a_gpu_nothing_is_picked(open_member: OpenMember) -> None:
    member = open_member("bpe_a")
    member.shorten(5, np.arange(member.vocabulary.size, dtype=np.int32))
    member.sync(np.array([5, 6, 7], dtype=np.int32))
    assert isinstance(member.logits(), np.ndarray)


@pytest.mark.parametrize(
    "top",
    [
        'strategy = "me"',
        'strategy = "ce"',
        'strategy = "union"',
        'unit = "word"',
        'strategy = "ce"\ndecode = "argmax"',
    ],
)
@pytest.mark.parametrize(
    "sampling",
    slow_but(
        ["top_k = 4", "top_k = 10\ntop_p = 0.8", "top_k = 0", "temperature = 0", PENALTIES, BIASES, RAISED, DEVIATIONS],
        "top_k = 4",
        PENALTIES,
    ),
)
def test_replies_are_the_same(write_models: WriteModels, top: str, sampling: str) -> None:
    path = write_models(
        "bpe_a",
        "spm",
        weights=(0.6, 0.4),
        top=f"[ensemble]\n{top}\n[sampling]\n{sampling}",
        member='type_k = "f32"\ntype_v = "f32"',
    )
    replies = []
    for short in (False, True):
        with opened(path, short=short) as ensemble:
            replies.append([ensemble.generate(PROMPT, Overrides(seed=s, max_tokens=12), raw=True) for s in range(4)])
    for whole, shortened in zip(*replies, strict=True):
        assert [step.piece for step in whole.steps] == [step.piece for step in shortened.steps]
        pairs = zip(whole.steps, shortened.steps, strict=True)
        assert all(a.probability == pytest.approx(b.probability, abs=1e-5) for a, b in pairs)


def test_several_replies_at_once_are_the_same(write_models: WriteModels) -> None:
    path = write_models("bpe_a", "spm", top="[sampling]\ntop_k = 5", member='type_k = "f32"\ntype_v = "f32"')
    texts = []
    for short in (False, True):
        with opened(path, short=short, batch=3) as ensemble:
            done = ensemble.generate_many([PROMPT[i:] for i in range(6)], Overrides(seed=7, max_tokens=12), raw=True)
            texts.append({one.index: one.reply.text for one in done if one.reply})
    assert len(texts[0]) == 6
    assert texts[0] == texts[1]


def test_no_logits_is_an_error_with_the_name_of_the_member(open_member: OpenMember) -> None:
    member = open_member("bpe_a")
    member.on_gpu = True
    member.shorten(5, np.arange(member.vocabulary.size, dtype=np.int32))
    member.prepare(np.array([5, 6, 7], dtype=np.int32))
    member.sync(np.array([5, 6, 7], dtype=np.int32))
    with pytest.raises(RunError, match=f'member "{member.name}"'):
        member.row(5)


def test_where_llama_cpp_cannot_pick_all_logits_are_read(
    open_member: OpenMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = open_member("bpe_a")
    member.on_gpu = True
    assert member.picks_logits()
    assert member.caches[0].length == 0
    monkeypatch.setattr(llama_cpp, "llama_get_sampled_candidates_count_ith", lambda *_: 0)  # no top-k in the graph
    assert not member.picks_logits()
    monkeypatch.setattr(llama_cpp, "llama_set_sampler", lambda *_: False)
    assert not member.picks_logits()
    member.sync(np.array([5, 6, 7], dtype=np.int32))
    assert isinstance(member.logits(), np.ndarray)
