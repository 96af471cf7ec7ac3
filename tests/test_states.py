"""Kept states: which one comes back for a prompt, what is dropped, and what a conversation saves by them."""

from collections.abc import Callable, Sequence
from unittest.mock import patch

import llama_cpp
import numpy as np
import pytest
from conftest import logits_of

import me_local
from me_local import Chat, Overrides
from me_local.checkpoints import Checkpoint, Checkpoints
from me_local.member import Member
from me_local.states import WORTH, State, States

OpenMember = Callable[..., Member]
OpenEnsemble = Callable[..., me_local.Ensemble]
SETTINGS = {"type_k": "f32", "type_v": "f32"}
KINDS = ["bpe_a", "swa", "recurrent", "hybrid"]


def state(*ids: int, size: int = 100, alone: int = 0, checkpoints: Checkpoints | None = None) -> State:
    array = np.array(ids, dtype=np.int32)
    return State(array, np.empty(size - array.nbytes, dtype=np.uint8), alone, checkpoints)


def array(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def test_the_longest_common_prefix_wins() -> None:
    states = States(1000)
    short, long, other = state(1, 2, 9), state(1, 2, 3, 4, 9), state(7, 8)
    for each in (short, long, other):
        states.add("a", each)
    states.add("b", state(1, 2, 3, 4, 5))
    assert states.best("a", array(1, 2, 3, 4, 5), alone=False) is long
    assert states.best("a", array(7, 8, 9), alone=False) is other
    assert states.best("c", array(1, 2), alone=False) is None


def test_the_one_used_least_recently_makes_room() -> None:
    states = States(300)
    first, second, third, fourth = (state(i, i, size=100) for i in range(4))
    for each in (first, second, third):
        states.add("a", each)
    assert (len(states), states.size) == (3, 300)
    states.best("a", first.ids, alone=False)
    states.add("b", fourth)
    assert (len(states), states.size) == (3, 300)
    assert states.best("a", second.ids, alone=False) is not second
    assert states.best("a", first.ids, alone=False) is first
    states.add("a", state(9, size=301))
    assert (len(states), states.size) == (0, 0)


def test_a_continuation_takes_the_place_of_its_beginning() -> None:
    states = States(1000)
    states.add("a", state(1, 2, size=100))
    states.add("b", state(1, 2, size=100))
    states.add("a", state(1, 2, 3, size=150))
    assert (len(states), states.size) == (2, 250)
    states.add("a", state(1, 2, 3, 4, size=150, alone=2))  # not of one that was evaluated otherwise
    assert len(states) == 3


def test_what_of_a_state_can_be_used() -> None:
    ids = array(1, 2, 3, 4)
    assert state(1, 2, 3, 9).usable(ids, alone=False) == 3
    assert state(1, 2, 3, 4, 5, alone=4).usable(ids, alone=True) == 4
    assert state(1, 2, 3, 4, 5, alone=3).usable(ids, alone=True) == 0
    assert state(1, 2, 3, alone=3).usable(ids, alone=True) == 0
    checkpoints = Checkpoints()
    checkpoints.add(Checkpoint(2, np.empty(10, dtype=np.uint8)), prompt=True)
    assert state(1, 2, 3, 9, checkpoints=checkpoints).usable(ids, alone=False) == 2
    assert state(1, 2, 3, checkpoints=checkpoints).usable(ids, alone=False) == 3
    assert state(1, 2, 3, size=100, checkpoints=checkpoints).size == 110


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("alone", [True, False])
def test_prompts_in_turn_are_evaluated_once(open_member: OpenMember, name: str, alone: bool) -> None:
    member, reference = open_member(name, **SETTINGS), open_member(name, **SETTINGS)
    member.states = States(10**8)
    random = np.random.default_rng(1)
    prompts = [random.integers(3, 340, 100, dtype=np.int32) for _ in range(3)]
    evaluated = []
    for _ in range(3):
        for prompt in prompts:
            evaluated.append(member.prepare(prompt[:-1], final=99, alone=alone).tokens)
            member.sync(prompt, final=99)
            np.testing.assert_allclose(member.logits(), logits_of(reference, prompt), atol=1e-3, rtol=0)
    assert evaluated == [99] * 3 + [0] * 6
    assert 0 < member.states.size <= 10**8


def test_too_little_memory_keeps_nothing(open_member: OpenMember) -> None:
    member = open_member("bpe_a")
    member.states = States(1000)
    prompts = [np.arange(i, i + 60, dtype=np.int32) for i in (10, 100)]
    for prompt in prompts * 2:
        assert member.prepare(prompt).tokens == 60
    assert len(member.states) == 0


def test_a_state_that_llama_cpp_refuses_costs_time_and_nothing_else(open_member: OpenMember) -> None:
    member, reference = open_member("hybrid", **SETTINGS), open_member("hybrid", **SETTINGS)
    member.states = States(10**8)
    prompts = [np.arange(i, i + 60, dtype=np.int32) for i in (10, 100)]
    for prompt in prompts:
        member.prepare(prompt)
    with patch.object(llama_cpp, "llama_state_seq_set_data", lambda *_: 0):
        assert member.prepare(prompts[0]).tokens == 60
    np.testing.assert_allclose(logits_of(member, prompts[0]), logits_of(reference, prompts[0]), atol=1e-3, rtol=0)
    refused = pytest.raises(me_local.RunError, match="does not give its state after 60 tokens")
    with patch.object(llama_cpp, "llama_state_seq_get_data", lambda *_: 0), refused:
        member.caches[0].save()


@pytest.mark.parametrize("names", [("bpe_a", "spm"), ("hybrid", "recurrent"), ("swa", "bpe_c")])
def test_conversations_in_turn_pay_only_what_is_new(open_ensemble: OpenEnsemble, names: Sequence[str]) -> None:
    ensemble = open_ensemble(*names)
    states = States(10**8)
    for member in ensemble.members:
        member.states = states
    chats = [Chat(ensemble) for _ in range(3)]
    for i, chat in enumerate(chats):
        chat.set(Overrides(seed=i, max_tokens=20, strategy="ce", system=f"{i}: the cat sat on the mat " * 5))
    replies = [[chat.say(f"turn {turn}").finish() for chat in chats] for turn in range(3)]
    for usage in [usage for turn in replies[1:] for reply in turn for usage in reply.usage]:
        assert usage.prompt_length > 80
        # Of a model with a sliding window the last tokens are not kept.
        assert usage.prompt_evaluated <= 50 + WORTH * (usage.member == "swa")
