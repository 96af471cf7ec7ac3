"""Every kind of memory: after any history, `sync` gives the logits of a fresh evaluation of the same ids."""

from collections.abc import Callable
from contextlib import suppress
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from me_local.member import EvaluationInterruptedError, Member
from me_local.vocabulary import IntArray

OpenMember = Callable[..., Member]

KINDS = {"bpe_a": "full", "swa": "sliding window 16", "recurrent": "recurrent", "hybrid": "hybrid"}
LONGEST = 120
ATOL = 2e-3  # logits differ in their low bits with the size of a batch

tokens = st.lists(st.integers(3, 340), min_size=1, max_size=12)
histories = st.lists(st.integers(3, 340), min_size=1, max_size=60)


class MemoryMachine(RuleBasedStateMachine):
    """A member in batches of 8 tokens, with another context that evaluates everything anew and in one batch."""

    def __init__(self, member: Member, reference: Member) -> None:
        super().__init__()
        self.member, self.reference = member, reference
        member.forget()
        self.ids: list[int] = []

    @initialize(history=histories)
    def begin(self, history: list[int]) -> None:
        self.ids = history
        self.check()

    @precondition(lambda self: len(self.ids) < LONGEST)
    @rule(new=tokens)
    def append(self, new: list[int]) -> None:
        self.ids = self.ids + new
        self.check()

    @rule(back=st.integers(1, 20), new=tokens)
    def change_the_tail(self, back: int, new: list[int]) -> None:
        self.ids = self.ids[:-back] + new
        self.check()

    @rule(back=st.integers(1, 40))
    def roll_back(self, back: int) -> None:
        self.ids = self.ids[:-back] or self.ids[:1]
        self.check()

    @rule(history=histories)
    def replace_the_history(self, history: list[int]) -> None:
        self.ids = history
        self.check()

    @rule(part=st.floats(0, 1))
    def prepare_a_part(self, part: float) -> None:
        self.member.prepare(self.array()[: int(part * len(self.ids))])

    @rule(back=st.integers(0, 20), new=tokens)
    def die_after_a_decode(self, back: int, new: list[int]) -> None:
        """An evaluation that decodes and then dies before the bookkeeping, as an interrupt can."""
        decode = self.member._llama._ctx.decode

        def dying(batch: object) -> None:
            decode(batch)
            raise KeyboardInterrupt

        other = np.array(self.ids[: len(self.ids) - back] + new, dtype=np.int32)
        with patch.object(self.member._llama._ctx, "decode", dying), pytest.raises(KeyboardInterrupt):
            self.member.sync(other)

    @rule(new=tokens, batches=st.integers(0, 2))
    def interrupt_between_batches(self, new: list[int], batches: int) -> None:
        answers = iter([False] * batches + [True] * 100)
        other = np.array(self.ids + new * 3, dtype=np.int32)
        with suppress(EvaluationInterruptedError):  # where little changes, it ends before it is stopped
            self.member.sync(other, lambda: next(answers))

    def array(self) -> IntArray:
        return np.array(self.ids, dtype=np.int32)

    def check(self) -> None:
        self.reference.forget()
        expected = self.reference.sync(self.array())[0]
        np.testing.assert_allclose(self.member.sync(self.array())[0], expected, atol=ATOL, rtol=0)

    def teardown(self) -> None:
        if self.ids:
            self.check()


@pytest.mark.parametrize("name", KINDS)
def test_any_history_equals_a_fresh_evaluation(open_member: OpenMember, name: str) -> None:
    member, reference = open_member(name, n_batch=8), open_member(name)
    assert member.memory == KINDS[name]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: MemoryMachine(member, reference),
        settings=settings(max_examples=30, stateful_step_count=20, deadline=None),
    )


@pytest.mark.parametrize("name", KINDS)
def test_the_tolerance_is_tight(open_member: OpenMember, name: str) -> None:
    """One other token 50 tokens back moves a logit by ten times the tolerance, in every context tried."""
    random = np.random.default_rng(1)
    member = open_member(name)
    for _ in range(5):
        ids = random.integers(3, 340, 80, dtype=np.int32)
        right = member.sync(ids)[0].copy()
        ids[30] = (ids[30] + 100) % 340
        member.forget()
        assert np.abs(member.sync(ids)[0] - right).max() > 10 * ATOL


@pytest.mark.parametrize("name", KINDS)
def test_a_long_way_back(open_member: OpenMember, name: str) -> None:
    """By more than window and batch together: a cache of the window's size alone would have lost what is needed."""
    member, reference = open_member(name, n_ctx=2048), open_member(name, n_ctx=2048)
    ids = np.random.default_rng(2).integers(3, 340, 1500, dtype=np.int32)
    member.sync(ids)
    np.testing.assert_allclose(member.sync(ids[:600])[0], reference.sync(ids[:600])[0], atol=ATOL, rtol=0)
