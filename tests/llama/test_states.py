"""Kept states: which one comes back for a prompt, what is dropped, and what a conversation saves by them."""

from collections.abc import Callable, Sequence
from unittest.mock import patch

import llama_cpp
import numpy as np
import pytest
from conftest import logits_of

import me_local
from me_local import Chat, Overrides
from me_local.llama.checkpoints import Checkpoint, Checkpoints
from me_local.llama.member import Member
from me_local.llama.origin import Origin
from me_local.llama.states import WORTH, State, States

OpenMember = Callable[..., Member]
OpenEnsemble = Callable[..., me_local.Ensemble]
SETTINGS = {"type_k": "f32", "type_v": "f32"}
KINDS = ["bpe_a", "swa", "recurrent", "hybrid"]


def state(
    *ids: int, size: int = 100, ends: tuple[int, ...] = (), reach: int = 0, checkpoints: Checkpoints | None = None
) -> State:
    array = np.array(ids, dtype=np.int32)
    origin = Origin(ends, checkpoints.lengths if checkpoints else ())
    return State(array, np.empty(size - array.nbytes, dtype=np.uint8), origin, reach, checkpoints)


def checkpoints_at(*lengths: int) -> Checkpoints:
    checkpoints = Checkpoints()
    for length in lengths:
        checkpoints.add(Checkpoint(length, np.empty(10, dtype=np.uint8)), prompt=True)
    return checkpoints


def array(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def test_the_longest_common_prefix_wins() -> None:
    states = States(1000)
    short, long, other = state(1, 2, 9), state(1, 2, 3, 4, 9), state(7, 8)
    for each in (short, long, other):
        states.add("a", each)
    states.add("b", state(1, 2, 3, 4, 5))
    assert states.best("a", array(1, 2, 3, 4, 5)) is long
    assert states.best("a", array(7, 8, 9)) is other
    assert states.best("c", array(1, 2)) is None


def test_the_one_used_least_recently_makes_room() -> None:
    states = States(300)
    first, second, third, fourth = (state(i, i, size=100) for i in range(4))
    for each in (first, second, third):
        states.add("a", each)
    assert (len(states), states.size) == (3, 300)
    states.best("a", first.ids)
    states.add("b", fourth)
    assert (len(states), states.size) == (3, 300)
    assert states.best("a", second.ids) is not second
    assert states.best("a", first.ids) is first
    states.add("a", state(9, size=301))
    assert (len(states), states.size) == (0, 0)


def test_a_continuation_takes_the_place_of_its_beginning() -> None:
    states = States(1000)
    states.add("a", state(1, 2, size=100))
    states.add("b", state(1, 2, size=100))
    states.add("a", state(1, 2, 3, size=150))
    assert (len(states), states.size) == (2, 250)
    states.add("a", state(1, 2, 3, 4, size=150, ends=(2,)))
    assert len(states) == 2
    states.add("a", state(1, 2, 3, 4, 5, size=150, ends=(3,)))  # not of one that was evaluated otherwise
    states.add("a", state(1, 2, 3, 4, 5, 6, size=150))
    assert len(states) == 4


def test_what_of_a_state_can_be_used() -> None:
    ids = array(1, 2, 3, 4)
    assert state(1, 2, 3, 9).usable(ids) == 3
    assert state(1, 2, 3, 9, reach=3).usable(ids) == 3
    assert state(1, 2, 3, 9, reach=4).usable(ids) == 0  # a window has passed what a fourth token would look at
    assert state(1, 2, 3, reach=3).usable(ids) == 3
    assert state(1, 2, 3, 9, reach=4, checkpoints=checkpoints_at(1, 2, 4)).usable(ids) == 2
    assert state(1, 2, 3, reach=3, checkpoints=checkpoints_at(2)).usable(ids) == 3
    assert state(1, 2, 3, size=100, checkpoints=checkpoints_at(2)).size == 110


def test_what_of_a_state_can_be_used_by_itself() -> None:
    ids = array(1, 2, 3, 4, 5)
    whole = Origin((2, 4, 5))
    assert state(1, 2, 3, 4, 5, 6, ends=(2, 4, 5)).usable(ids, whole) == 5
    assert state(1, 2, 3, 4, 5, 6, ends=(2, 4, 6)).usable(ids, whole) == 4
    assert state(1, 2, 3, 4, 5, 6, ends=(4, 5)).usable(ids, whole) == 0  # in other batches
    assert state(1, 2, 3, 9, ends=(2, 4)).usable(ids, whole) == 2  # with other tokens
    assert state(1, 2, 3, 4, 5).usable(ids, whole) == 0  # in some other way
    stopped = Origin((2, 4, 5), (4, 5))
    assert state(1, 2, 3, 4, 5, 6, ends=(2, 4, 5), reach=6, checkpoints=checkpoints_at(4, 5)).usable(ids, stopped) == 5
    assert state(1, 2, 3, 4, 5, 6, ends=(2, 4, 5), reach=6, checkpoints=checkpoints_at(4)).usable(ids, stopped) == 4
    assert state(1, 2, 3, 4, 5, 6, ends=(2, 4, 5), reach=6, checkpoints=checkpoints_at(5)).usable(ids, stopped) == 0
    assert state(1, 2, 3, 4, 5, ends=(2, 4, 5), reach=5, checkpoints=checkpoints_at(2, 5)).usable(ids, stopped) == 0


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
    # What comes back of a window lies in other cells.
    again = 99 if alone and name == "swa" else 0
    assert evaluated == [99] * 3 + [again] * 6
    assert 0 < member.states.size <= 10**8


def test_too_little_memory_keeps_nothing(open_member: OpenMember) -> None:
    member = open_member("bpe_a")
    member.states = States(1000)
    prompts = [np.arange(i, i + 60, dtype=np.int32) for i in (10, 100)]
    for prompt in prompts * 2:
        assert member.prepare(prompt).tokens == 60
    assert len(member.states) == 0


def test_what_is_kept_is_worth_it_and_has_room(open_member: OpenMember) -> None:
    """What a state takes follows from the prompt: one that is too large drops none of those that are there."""
    member = open_member("bpe_a")
    first, second, large = (np.arange(i, i + n, dtype=np.int32) for i, n in ((10, 40), (60, 40), (110, 200)))
    member.prepare(first)
    member.states = States(2 * member.caches[0].save().size)
    member.prepare(first[: 40 - WORTH + 1])
    assert len(member.states) == 0
    member.prepare(first)
    member.prepare(second)
    assert len(member.states) == 1
    member.prepare(large)
    assert len(member.states) == 2
    member.prepare(second)
    assert len(member.states) == 2
    assert member.prepare(first).tokens == 0
    longer = np.append(first, first[:20])
    assert member.prepare(longer).tokens == 20
    assert member.prepare(longer).tokens == 0  # what is there is more than what is kept


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


@pytest.mark.parametrize(("name", "swa_full"), [*((name, True) for name in KINDS), ("swa", False)])
def test_usable_is_what_can_be_gone_back_to(open_member: OpenMember, name: str, swa_full: bool) -> None:
    """In a cache, and in one that gets the state of another: not what a window has passed."""
    member, other = (open_member(name, n_ctx=1024, n_batch=64, swa_full=swa_full) for _ in range(2))
    random = np.random.default_rng(5)
    cache, whole = member.caches[0], 0
    for _ in range(30):
        history = random.integers(3, 340, random.choice([5, 14, 15, 16, 17, 60, 300, 700]), dtype=np.int32)
        member.prepare(history, final=int(random.integers(len(history) + 1)))
        if random.random() < 0.5:
            history = np.append(history, random.integers(3, 340, 40, dtype=np.int32))
            member.sync(history, final=len(history))
        common = len(history) - int(random.choice([0, 1, 5, 20, 40, 300]))
        wanted = np.append(history[: max(common, 0)], [399] * 3).astype(np.int32)
        state, usable = cache.save(), cache.usable(wanted)
        other.caches[0].restore(state)
        assert state.usable(wanted) == other.caches[0].cut(max(common, 0))
        assert usable == cache.cut(max(common, 0))
        whole += usable > state.usable(wanted)
    assert (whole > 0) == (name == "swa")


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
