"""Every kind of memory: after any history, `sync` gives the logits of a fresh evaluation of the same ids."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from unittest.mock import patch

import llama_cpp
import numpy as np
import pytest
from conftest import logits_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from selection import slow_but

from me_local.arrays import IntArray
from me_local.decoding.engine import Engine, Request
from me_local.decoding.generation import Generation
from me_local.llama.checkpoints import Checkpoint, Checkpoints
from me_local.llama.member import Member
from me_local.llama.states import State
from me_local.mixture.alignment import top_k
from me_local.mixture.routing import constant
from me_local.model import Evaluated, EvaluationInterruptedError
from me_local.sampling import Sampling
from me_local.text.growing import TokenizedText
from me_local.text.unified import END

OpenMember = Callable[..., Member]

KINDS = {"bpe_a": "full", "swa": "sliding window 16", "recurrent": "recurrent", "hybrid": "hybrid"}
LONGEST = 120
ATOL = 1e-3  # logits differ in their low bits with the size of a batch
SETTINGS = {"type_k": "f32", "type_v": "f32"}  # rounding to 16 bits would make a low bit a higher one

tokens = st.lists(st.integers(3, 340), min_size=1, max_size=12)
histories = st.lists(st.integers(3, 340), min_size=1, max_size=60)
finals = st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0])


class MemoryMachine(RuleBasedStateMachine):
    """A member in batches of 8 tokens, with another context that evaluates everything anew and in one batch."""

    def __init__(self, member: Member, reference: Member, beginning: Sequence[int] = ()) -> None:
        super().__init__()
        self.member, self.reference, self.beginning = member, reference, list(beginning)
        member.forget()
        self.ids: list[int] = []
        self.states: list[State] = []

    @initialize(history=histories)
    def begin(self, history: list[int]) -> None:
        self.ids = self.beginning + history
        self.check()

    @precondition(lambda self: len(self.ids) < len(self.beginning) + LONGEST)
    @rule(new=tokens, final=finals)
    def append(self, new: list[int], final: float) -> None:
        self.ids = self.ids + new
        self.check(final)

    @rule(back=st.integers(1, 20), new=tokens, final=finals)
    def change_the_tail(self, back: int, new: list[int], final: float) -> None:
        self.ids = self.ids[:-back] + new
        self.check(final)

    @rule(back=st.integers(1, 40))
    def roll_back(self, back: int) -> None:
        self.ids = self.ids[:-back] or self.ids[:1]
        self.check()

    @rule(history=histories)
    def replace_the_history(self, history: list[int]) -> None:
        self.ids = history
        self.check()

    @rule(part=st.floats(0, 1), final=finals, alone=st.booleans())
    def prepare_a_part(self, part: float, final: float, alone: bool) -> None:
        count = int(part * len(self.ids))
        self.member.prepare(self.array()[:count], final=int(final * count), alone=alone)

    @rule(back=st.integers(0, 20), new=tokens, final=finals)
    def die_after_a_decode(self, back: int, new: list[int], final: float) -> None:
        """An evaluation that decodes and then dies before the bookkeeping, as an interrupt can."""
        decode = self.member._decode

        def dying(*args: object) -> int:
            decode(*args)
            raise KeyboardInterrupt

        other = np.array(self.ids[: len(self.ids) - back] + new, dtype=np.int32)
        with patch.object(self.member, "_decode", dying), pytest.raises(KeyboardInterrupt):
            self.member.sync(other, final=int(final * len(other)))

    @rule(
        back=st.integers(2, 20),
        after=st.booleans(),
        name=st.sampled_from(["state_seq_set_data_ext", "state_seq_get_data_ext", "memory_seq_rm", "memory_clear"]),
    )
    def die_while_going_back(self, back: int, after: bool, name: str) -> None:
        """An interrupt before or after one of llama.cpp's functions that move the memory."""
        real = getattr(llama_cpp, f"llama_{name}")

        def dying(*args: object) -> None:
            if after:
                real(*args)
            raise KeyboardInterrupt

        other = np.array([*self.ids[:-back], 7, 7], dtype=np.int32)
        with patch.object(llama_cpp, f"llama_{name}", dying), suppress(KeyboardInterrupt):
            self.member.sync(other, final=len(other) - 1)

    @rule()
    def save(self) -> None:
        self.states.append(self.member.caches[0].save())

    @precondition(lambda self: self.states)
    @rule(which=st.integers(0), new=tokens, final=finals)
    def restore(self, which: int, new: list[int], final: float) -> None:
        state = self.states[which % len(self.states)]
        self.member.caches[0].restore(state)
        self.ids = [*state.ids.tolist(), *new]
        assert self.check(final).tokens == len(new)

    @precondition(lambda self: self.states)
    @rule(which=st.integers(0), after=st.booleans())
    def die_while_restoring(self, which: int, after: bool) -> None:
        real = llama_cpp.llama_state_seq_set_data

        def dying(*args: object) -> None:
            if after:
                real(*args)
            raise KeyboardInterrupt

        with patch.object(llama_cpp, "llama_state_seq_set_data", dying), pytest.raises(KeyboardInterrupt):
            self.member.caches[0].restore(self.states[which % len(self.states)])

    @rule(new=tokens, batches=st.integers(0, 2))
    def interrupt_between_batches(self, new: list[int], batches: int) -> None:
        answers = iter([False] * batches + [True] * 100)
        other = np.array(self.ids + new * 3, dtype=np.int32)
        with suppress(EvaluationInterruptedError):  # where little changes, it ends before it is stopped
            self.member.sync(other, lambda: next(answers))

    def array(self) -> IntArray:
        return np.array(self.ids, dtype=np.int32)

    def check(self, final: float = 0.0) -> Evaluated:
        """`final` is a part of the ids, and no promise: a wrong one may cost time, but nothing else."""
        self.reference.forget()
        expected = logits_of(self.reference, self.array())
        evaluated = self.member.sync(self.array(), final=int(final * len(self.ids)))
        logits = self.member.logits()
        np.testing.assert_allclose(logits, expected, atol=ATOL, rtol=0)
        assert 1 <= evaluated.tokens <= len(self.ids)
        return evaluated

    def teardown(self) -> None:
        if self.ids:
            self.check()


@pytest.mark.parametrize("name", slow_but(KINDS, "recurrent"))
def test_any_history_equals_a_fresh_evaluation(open_member: OpenMember, name: str) -> None:
    member, reference = open_member(name, n_batch=8, **SETTINGS), open_member(name, **SETTINGS)
    assert member.weights.memory == KINDS[name]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: MemoryMachine(member, reference),
        settings=settings(max_examples=40, stateful_step_count=25, deadline=None),
    )


@pytest.mark.slow
def test_a_cache_that_loses_what_leaves_the_window(open_member: OpenMember) -> None:
    """llama.cpp rounds it up to 256 cells, so that it is after as many tokens that cells are lost."""
    member = open_member("swa", n_batch=8, n_ctx=1024, swa_full=False, **SETTINGS)
    reference = open_member("swa", n_ctx=1024, **SETTINGS)
    beginning = np.random.default_rng(4).integers(3, 340, 400).tolist()
    ids = np.array(beginning, dtype=np.int32)
    member.sync(ids)
    assert llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(member._context), 0) > 100
    assert member.sync(ids[:100]).tokens == 100, "its first 100 tokens are lost"
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: MemoryMachine(member, reference, beginning),
        settings=settings(max_examples=20, stateful_step_count=25, deadline=None),
    )


@pytest.mark.parametrize("name", KINDS)
def test_the_tolerance_is_tight(open_member: OpenMember, name: str) -> None:
    """One other token 50 tokens back moves a logit by twenty times the tolerance, in every context tried."""
    random = np.random.default_rng(1)
    member = open_member(name, **SETTINGS)
    for _ in range(5):
        ids = random.integers(3, 340, 80, dtype=np.int32)
        right = logits_of(member, ids).copy()
        ids[30] = (ids[30] + 100) % 340
        member.forget()
        assert np.abs(logits_of(member, ids) - right).max() > 20 * ATOL


@pytest.mark.parametrize("name", KINDS)
def test_a_long_way_back(open_member: OpenMember, name: str) -> None:
    """By more than window and batch together: a cache of the window's size alone would have lost what is needed."""
    member, reference = (open_member(name, n_ctx=2048, **SETTINGS) for _ in range(2))
    ids = np.random.default_rng(2).integers(3, 340, 1500, dtype=np.int32)
    member.sync(ids)
    np.testing.assert_allclose(logits_of(member, ids[:600]), logits_of(reference, ids[:600]), atol=ATOL, rtol=0)


ENGLISH = (
    "The harbour was quiet when the first boats came home. Anna stood on the wall and counted the lights: one, two, "
    "and then the small green one that was always late. They talked about the weather, the price of the nets and "
    "other things that people talk about when they are tired, until nobody listened any more and it was dark."
)
CZECH = "Přečtěte si návod, než začnete; říkejte příště všechno, čeho jste si všimli. " * 5


@pytest.mark.parametrize("name", ["recurrent", "hybrid"])
@pytest.mark.parametrize("text", [ENGLISH, CZECH])
@pytest.mark.parametrize("width", [1, 3])
def test_a_changed_tail_costs_a_few_tokens(open_member: OpenMember, name: str, text: str, width: int) -> None:
    """In pieces that cut every word; before there were checkpoints it took 30 to 90 tokens a piece, and rising."""
    member, reference = open_member(name, **SETTINGS), open_member(name, **SETTINGS)
    context = TokenizedText(member.vocabulary, at_start=True)
    prompt = np.arange(10, 60, dtype=np.int32)
    member.prepare(prompt[:-1], final=len(prompt))
    tokens = []
    for end in range(width, len(text.encode()) + 1, width):
        ids = np.concatenate([prompt, context.ids(text.encode()[:end])])
        evaluated = member.sync(ids, final=len(prompt) + context.final)
        logits = member.logits()
        tokens.append(evaluated.tokens)
        if end % (20 * width) == 0:
            reference.forget()
            np.testing.assert_allclose(logits, logits_of(reference, ids), atol=ATOL, rtol=0)
    assert np.mean(tokens) < 6
    assert max(tokens) < 40


@pytest.mark.parametrize("names", [("recurrent", "hybrid"), ("hybrid", "bpe_c"), ("spm", "recurrent")])
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_an_ensemble_evaluates_little_more_than_the_text(
    open_member: OpenMember, names: Sequence[str], strategy: str
) -> None:
    members = [open_member(name) for name in names]
    engine = Engine(members, constant, top_k)
    pieces, evaluated = 0, np.zeros(2)
    for seed in range(4):
        running = Generation(engine, request(members, strategy, seed), lambda: False)
        for _ in range(60):
            draw = running.step()
            assert draw is not None
            if draw.number == END:
                break
            pieces += 1
        evaluated += [work.text_tokens for work in running.work]
    assert (evaluated / pieces < 2).all()  # 1.0 to 1.7 as measured


def request(members: Sequence[Member], strategy: str, seed: int) -> Request:
    starts = [[5] if member.vocabulary.bos is None else [member.vocabulary.bos] for member in members]
    return Request(
        prompts=tuple(np.array(start, dtype=np.int32) for start in starts),
        weights=np.full(len(members), 1 / len(members)),
        sampling=(Sampling(),) * len(members),
        strategy=strategy,  # type: ignore[arg-type]
        argmax=False,
        seed=seed,
        head=ENGLISH.encode(),
    )


@pytest.mark.parametrize("name", ["recurrent", "hybrid"])
@pytest.mark.parametrize("alone", [True, False])
def test_another_reply_to_a_prompt_finds_it_evaluated(open_member: OpenMember, name: str, alone: bool) -> None:
    member = open_member(name)
    prompt, reply = np.arange(10, 60, dtype=np.int32), np.arange(70, 200, dtype=np.int32)
    member.prepare(prompt, final=50, alone=alone)
    for end in range(0, len(reply), 2):
        member.sync(np.concatenate([prompt, reply[: end + 1]]), final=50 + end)
    for _ in range(2):
        assert member.prepare(prompt, final=50, alone=alone).tokens == 0
        assert member.sync(np.append(prompt, 9).astype(np.int32), final=50).tokens == 1


@pytest.mark.parametrize("function", ["set", "get"])
def test_a_checkpoint_that_fails_costs_time_and_nothing_else(open_member: OpenMember, function: str) -> None:
    member, reference = open_member("hybrid", **SETTINGS), open_member("hybrid", **SETTINGS)
    ids, other = np.arange(10, 60, dtype=np.int32), np.arange(10, 60, dtype=np.int32)
    other[45:] = 7
    with patch.object(llama_cpp, f"llama_state_seq_{function}_data_ext", lambda *_: 0):
        member.prepare(ids[:40], final=40)
        member.sync(ids)
        evaluated = member.sync(other)
        logits = member.logits()
    assert evaluated.tokens == 50
    np.testing.assert_allclose(logits, logits_of(reference, other), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["bpe_a", "swa"])
def test_a_memory_that_can_be_cut_has_no_checkpoints(
    open_member: OpenMember, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, sizes = open_member(name), []
    decode = member._decode
    monkeypatch.setattr(member, "_decode", lambda parts: sizes.append(len(parts[0].ids)) or decode(parts))
    ids = np.arange(10, 60, dtype=np.int32)
    member.prepare(ids[:30], final=20)
    member.sync(ids, final=45)
    assert sizes == [30, 20]
    assert member.caches[0].checkpoints is None


def checkpoint(length: int) -> Checkpoint:
    return Checkpoint(length, np.empty(0, dtype=np.uint8))


def test_which_checkpoints_are_kept() -> None:
    checkpoints = Checkpoints()
    assert checkpoints.newest is None
    for length, prompt in [(10, True), (20, False), (30, True), (40, False), (50, False)]:
        checkpoints.add(checkpoint(length), prompt=prompt)
    for cut, left in [(60, 50), (49, 40), (39, 30), (29, 10), (9, None)]:  # 20 made room for 50
        checkpoints.cut(cut)
        assert (checkpoints.newest and checkpoints.newest.length) == left


@pytest.mark.parametrize(
    ("keep", "common", "final", "due"),
    [
        (20, 20, 25, 25),  # in what is to be evaluated: in two batches
        (25, 25, 25, 25),  # where the cache stands
        (25, 25, 24, None),  # passed without one
        (20, 20, 40, None),  # nothing is going to change
        (30, 30, 9, 30),  # final a long way back
        (10, 30, 0, 30),  # after going back: where it was the same twice
        (10, 25, 0, None),  # too close
        (10, 26, 0, 26),
    ],
)
def test_when_a_checkpoint_of_the_text_is_due(keep: int, common: int, final: int, due: int | None) -> None:
    checkpoints = Checkpoints()
    checkpoints.add(checkpoint(10), prompt=True)
    assert checkpoints.due_in_text(keep, common, final, 40) == due


@pytest.mark.parametrize(
    ("keep", "final", "due"), [(0, 40, 40), (0, 30, 30), (35, 30, 40), (0, 0, 40), (40, 40, 40), (0, 10, None)]
)
def test_when_a_checkpoint_of_a_prompt_is_due(keep: int, final: int, due: int | None) -> None:
    checkpoints = Checkpoints()
    checkpoints.add(checkpoint(10), prompt=True)
    assert checkpoints.due_in_prompt(keep, final, 40) == due


@pytest.mark.parametrize(("length", "stops"), [(0, ()), (1, (1,)), (16, (16,)), (17, (1, 17)), (100, (84, 100))])
def test_checkpoints_of_a_prompt_by_itself(length: int, stops: tuple[int, ...]) -> None:
    assert Checkpoints.stops(length) == stops
