"""Several sequences of a member: after any history of all of them, each has the logits of a fresh lone evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import llama_cpp
import numpy as np
import pytest
from conftest import logits_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from selection import slow_but

from me_local import RunError
from me_local.arrays import IntArray, LogitArray
from me_local.config import MemberConfig
from me_local.llama.batch import Part, level
from me_local.llama.member import Member
from me_local.llama.sequences import Sequences
from me_local.llama.states import WORTH
from me_local.llama.weights import Weights
from me_local.model import Outcome, Target

OpenMember = Callable[..., Member]

KINDS = ["bpe_a", "swa", "recurrent", "hybrid"]
COUNT = 3
ATOL = 1e-3  # logits differ in their low bits with the size of a batch; see test_the_tolerance_is_tight elsewhere
LONGEST = 140

tokens = st.lists(st.integers(3, 340), min_size=1, max_size=12)
histories = st.lists(st.integers(3, 340), min_size=1, max_size=2 * WORTH)
finals = st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0])
places = st.integers(0, COUNT - 1)
subsets = st.lists(places, min_size=1, max_size=COUNT, unique=True)


@pytest.fixture
def open_many(tiny: dict[str, Path]) -> Iterator[OpenMember]:
    """Loads a tiny model by name as a member of several sequences; 32-bit caches, as rounding would move low bits."""
    with ExitStack() as stack:

        def open_one(name: str, *, sequences: int = COUNT, **given: object) -> Member:
            values = {"n_ctx": 512, "n_threads": 1, "type_k": "f32", "type_v": "f32"} | given
            config = MemberConfig(name=name, path=tiny[name], **values)  # type: ignore[arg-type]
            weights = stack.enter_context(closing(Weights(config)))
            return stack.enter_context(Member(config, weights, sequences=sequences))

        yield open_one


def array(ids: Sequence[int]) -> IntArray:
    return np.array(ids, dtype=np.int32)


def random_ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 340, count).tolist()


def fresh(reference: Member, ids: Sequence[int]) -> LogitArray:
    reference.forget()
    return logits_of(reference, array(ids)).copy()


@contextmanager
def failing(member: Member, fails: Callable[[int, list[int]], bool], *, decoded: bool = False) -> Iterator[None]:
    """Evaluations for which `fails(call, sequences)` is true answer with code 1, after having decoded or not."""
    decode, calls = member._decode, iter(range(10**6))

    def planted(parts: Sequence[Part]) -> int:
        fault = fails(next(calls), [cache.sequence for cache, *_ in parts])
        code = 0 if fault and not decoded else decode(parts)
        return 1 if fault else code

    with patch.object(member, "_decode", planted):
        yield


class SequencesMachine(RuleBasedStateMachine):
    """Three sequences with ids of their own each, and another context that evaluates everything anew."""

    def __init__(self, member: Member, reference: Member, beginning: Sequence[int] = ()) -> None:
        super().__init__()
        self.member, self.reference = member, reference
        self.sequences = Sequences(member)
        for cache in member.caches:
            cache.forget()
        self.ids = [[*beginning, 5 + i] for i in range(COUNT)]

    @rule(place=places, new=tokens)
    def append(self, place: int, new: list[int]) -> None:
        if len(self.ids[place]) < len(self.ids[0]) + LONGEST:
            self.ids[place] = self.ids[place] + new

    @rule(place=places, back=st.integers(1, 40), new=tokens)
    def change_the_tail(self, place: int, back: int, new: list[int]) -> None:
        self.ids[place] = self.ids[place][:-back] + new

    @rule(place=places, history=histories)
    def replace(self, place: int, history: list[int]) -> None:
        self.ids[place] = history

    @rule(place=places, other=places, part=st.sampled_from([0.6, 0.9, 1.0, 1.0]), new=tokens)
    def begin_like_another(self, place: int, other: int, part: float, new: list[int]) -> None:
        self.ids[place] = self.ids[other][: int(part * len(self.ids[other]))] + new

    @rule(which=subsets, final=finals)
    def sync(self, which: list[int], final: float) -> None:
        self.check(self.sequences.sync(self.targets(which, final)), which)

    @rule(which=subsets, others=subsets, final=finals)
    def sync_beside_others(self, which: list[int], others: list[int], final: float) -> None:
        beside = self.targets([place for place in others if place not in which], final)
        self.check(self.sequences.sync(self.targets(which, final), beside), which)

    @rule(which=subsets, most=st.sampled_from([3, 30, 200]), final=finals)
    def prefill(self, which: list[int], most: int, final: float) -> None:
        before = [self.member.caches[place].length for place in which]
        outcomes = self.sequences.prefill(self.targets(which, final), most)
        assert all(outcome.error is None for outcome in outcomes.values())
        assert sum(outcome.tokens for outcome in outcomes.values()) <= most
        done = [self.sequences.holds(place, array(self.ids[place])) for place in which]
        assert outcomes or all(done), before

    @rule(which=subsets, final=finals)
    def prefill_to_the_end(self, which: list[int], final: float) -> None:
        targets = self.targets(which, final)
        for _ in range(200):
            if all(self.sequences.holds(place, target.ids) for place, target in targets.items()):
                break
            self.sequences.prefill(targets, 100)
        else:
            raise AssertionError("prompts never get there")

    @rule(which=subsets, final=finals, calls=st.sets(st.integers(0, 3), min_size=1), decoded=st.booleans())
    def fail_once(self, which: list[int], final: float, calls: set[int], decoded: bool) -> None:
        """Only a sequence whose evaluation fails alone has an error."""
        with failing(self.member, lambda call, parts: call in calls and len(parts) > 1, decoded=decoded):
            outcomes = self.sequences.sync(self.targets(which, final))
            self.check(outcomes, which)

    @precondition(lambda self: self.ids)
    @rule(which=subsets, bad=places, final=finals, decoded=st.booleans())
    def fail_for_one(self, which: list[int], bad: int, final: float, decoded: bool) -> None:
        with failing(self.member, lambda _, parts: bad in parts, decoded=decoded):
            outcomes = self.sequences.sync(self.targets(which, final))
            self.check(outcomes, [place for place in which if place != bad])
            if bad in which:
                assert isinstance(outcomes[bad].error, RunError)
                assert outcomes[bad].logits is None

    @rule(which=subsets, bad=places, final=finals, decoded=st.booleans())
    def fail_in_a_prompt(self, which: list[int], bad: int, final: float, decoded: bool) -> None:
        with failing(self.member, lambda _, parts: bad in parts, decoded=decoded):
            outcomes = self.sequences.prefill(self.targets(which, final), 100)
        assert [place for place, outcome in outcomes.items() if outcome.error] in ([], [bad])

    @rule(which=subsets, back=st.integers(0, 20), new=tokens, final=finals, prompt=st.booleans())
    def die_after_a_decode(self, which: list[int], back: int, new: list[int], final: float, prompt: bool) -> None:
        decode = self.member._decode

        def dying(*args: object) -> int:
            decode(*args)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        others = {p: self.ids[p][: len(self.ids[p]) - back] + new for p in which}
        targets = {p: Target(array(ids), int(final * len(ids))) for p, ids in others.items()}
        with patch.object(self.member, "_decode", dying), suppress(KeyboardInterrupt):
            if prompt:
                self.sequences.prefill(targets, 100)
            else:
                self.sequences.sync(targets)

    @rule(
        which=subsets,
        after=st.booleans(),
        name=st.sampled_from(["state_seq_set_data_ext", "state_seq_get_data_ext", "memory_seq_rm", "memory_seq_cp"]),
        prompt=st.booleans(),
    )
    def die_in_llama(self, which: list[int], after: bool, name: str, prompt: bool) -> None:
        real = getattr(llama_cpp, f"llama_{name}")

        def dying(*args: object) -> None:
            if after:
                real(*args)
            raise KeyboardInterrupt

        with patch.object(llama_cpp, f"llama_{name}", dying), suppress(KeyboardInterrupt):
            if prompt:
                self.sequences.prefill(self.targets(which, 0.5), 100)
            else:
                self.sequences.sync(self.targets(which, 0.5))

    def targets(self, which: Sequence[int], final: float) -> dict[int, Target]:
        """`final` is a part of the ids, and no promise: a wrong one may cost time, but nothing else."""
        return {p: Target(array(self.ids[p]), int(final * len(self.ids[p]))) for p in which}

    def check(self, outcomes: Mapping[int, Outcome], which: Sequence[int]) -> None:
        assert set(which) <= set(outcomes)
        for place in which:
            outcome = outcomes[place]
            assert outcome.error is None
            assert outcome.logits is not None
            assert outcome.tokens >= 1
            np.testing.assert_allclose(outcome.logits, fresh(self.reference, self.ids[place]), atol=ATOL, rtol=0)

    def teardown(self) -> None:
        everyone = list(range(COUNT))
        self.check(self.sequences.sync(self.targets(everyone, 0.0)), everyone)


@pytest.mark.parametrize("name", slow_but(KINDS, "hybrid"))
def test_any_history_equals_fresh_lone_evaluations(open_many: OpenMember, open_member: OpenMember, name: str) -> None:
    """Backlogs are larger than a batch of 24 tokens, and copied where they begin alike."""
    member, reference = open_many(name, n_batch=24), open_member(name, type_k="f32", type_v="f32")
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: SequencesMachine(member, reference),
        settings=settings(max_examples=60, stateful_step_count=25, deadline=None),
    )


@pytest.mark.slow
def test_a_cache_that_loses_what_leaves_the_window(open_many: OpenMember, open_member: OpenMember) -> None:
    """What one sequence has behind its window another may take: going back needs a checkpoint then."""
    member = open_many("swa", n_batch=24, n_ctx=1024, swa_full=False)
    reference = open_member("swa", n_ctx=1024, type_k="f32", type_v="f32")
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: SequencesMachine(member, reference, random_ids(300, 4)),
        settings=settings(max_examples=40, stateful_step_count=25, deadline=None),
    )


def all_equal_fresh(outcomes: Mapping[int, Outcome], reference: Member, ids: Mapping[int, Sequence[int]]) -> None:
    for place, expected in ids.items():
        outcome = outcomes[place]
        assert outcome.logits is not None
        np.testing.assert_allclose(outcome.logits, fresh(reference, expected), atol=ATOL, rtol=0)


def targets_of(ids: Mapping[int, Sequence[int]], final: int = 0) -> dict[int, Target]:
    return {place: Target(array(given), final) for place, given in ids.items()}


@contextmanager
def noted(member: Member) -> Iterator[list[list[tuple[int, int]]]]:
    """For each evaluation the sequences in it, with their numbers of tokens."""
    calls: list[list[tuple[int, int]]] = []
    decode = member._decode

    def counting(parts: Sequence[Part]) -> int:
        calls.append([(cache.sequence, len(ids)) for cache, ids, _ in parts])
        return decode(parts)

    with patch.object(member, "_decode", counting):
        yield calls


@pytest.mark.parametrize("name", KINDS)
def test_backlogs_of_more_than_a_batch(open_many: OpenMember, open_member: OpenMember, name: str) -> None:
    member, reference = open_many(name, n_batch=24), open_member(name, type_k="f32", type_v="f32")
    ids = {place: random_ids(length, place) for place, length in enumerate((100, 1, 30))}
    with noted(member) as calls:
        outcomes = Sequences(member).sync(targets_of(ids))
    all_equal_fresh(outcomes, reference, ids)
    assert [outcomes[place].tokens for place in range(3)] == [100, 1, 30]
    assert max(sum(tokens for _, tokens in call) for call in calls) <= 24
    assert calls[-1][1] == (1, 1)


@pytest.mark.parametrize("name", ["recurrent", "hybrid"])
def test_what_is_evaluated_anew_may_be_more_than_a_batch(
    open_many: OpenMember, open_member: OpenMember, name: str
) -> None:
    """A memory that cannot be cut back goes back to zero, in several sequences at once, and stops at a checkpoint."""
    member, reference = open_many(name, n_batch=24), open_member(name, type_k="f32", type_v="f32")
    sequences = Sequences(member)
    ids = {place: random_ids(90, place) for place in range(3)}
    sequences.sync(targets_of(ids))
    other = {place: [*given[:70], 7, 8, 9] for place, given in ids.items()}
    all_equal_fresh(sequences.sync(targets_of(other, final=71)), reference, other)


def test_a_batch_smaller_than_the_number_of_sequences(open_many: OpenMember, open_member: OpenMember) -> None:
    member, reference = open_many("bpe_a", sequences=5, n_batch=2), open_member("bpe_a", type_k="f32", type_v="f32")
    ids = {place: random_ids(7 + place, place) for place in range(5)}
    all_equal_fresh(Sequences(member).sync(targets_of(ids)), reference, ids)
    assert member.n_batch == 5


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("decoded", [False, True])
def test_only_the_sequence_that_fails_by_itself_has_an_error(
    open_many: OpenMember, open_member: OpenMember, name: str, decoded: bool
) -> None:
    member, reference = open_many(name, sequences=5), open_member(name, type_k="f32", type_v="f32")
    sequences = Sequences(member)
    ids = {place: random_ids(20 + place, place) for place in range(5)}
    sequences.sync(targets_of(ids))
    longer = {place: [*given, 9, 10] for place, given in ids.items()}
    with failing(member, lambda _, places: 3 in places, decoded=decoded), noted(member) as calls:
        outcomes = sequences.sync(targets_of(longer))
    assert [[place for place, _ in call] for call in calls] == [
        [0, 1, 2, 3, 4],
        [0, 1],
        [2, 3, 4],
        [2],
        [3, 4],
        [3],
        [4],
    ]
    all_equal_fresh(outcomes, reference, {place: given for place, given in longer.items() if place != 3})
    error = outcomes[3].error
    assert str(error) == f'member "{name}", tokens 23 to 24: no room is left in its KV cache' or name != "bpe_a"
    assert isinstance(error, RunError)
    all_equal_fresh(sequences.sync(targets_of(longer)), reference, longer)


@pytest.mark.parametrize("name", KINDS)
def test_prompts_that_begin_alike_are_evaluated_once(open_many: OpenMember, open_member: OpenMember, name: str) -> None:
    member, reference = open_many(name, sequences=4), open_member(name, type_k="f32", type_v="f32")
    sequences = Sequences(member)
    common = random_ids(100, 1)
    prompts = targets_of(
        {place: common if name in ("recurrent", "hybrid") else [*common, 5 + place] for place in range(4)}
    )
    with noted(member) as calls:
        for _ in range(10):
            sequences.prefill(prompts, 64)
    assert all(sequences.holds(place, prompt.ids) for place, prompt in prompts.items())
    assert sum(tokens for call in calls for _, tokens in call) <= 104
    ids = {place: [*prompt.ids.tolist(), 77 + place] for place, prompt in prompts.items()}
    all_equal_fresh(sequences.sync(targets_of(ids)), reference, ids)


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_is_taken_over_from_a_reply_that_went_on(
    open_many: OpenMember, open_member: OpenMember, name: str
) -> None:
    """A memory that cannot be cut back has a checkpoint there, which another sequence can go back to, too."""
    member, reference = open_many(name), open_member(name, type_k="f32", type_v="f32")
    sequences = Sequences(member)
    prompt = random_ids(80, 1)
    sequences.prefill(targets_of({0: prompt}, final=80), 100)
    for end in range(1, 30, 3):
        sequences.sync(targets_of({0: prompt + random_ids(end, 2)}, final=80 + end))
    with noted(member) as calls:
        sequences.prefill(targets_of({1: prompt}, final=80), 100)
        ids = {0: prompt + random_ids(40, 2), 1: [*prompt, 9], 2: [4]}
        outcomes = sequences.sync(targets_of(ids))
    assert sum(tokens for call in calls for place, tokens in call if place == 1) == 1
    all_equal_fresh(outcomes, reference, ids)


def test_cells_behind_the_window_of_another_sequence_are_not_taken(
    open_many: OpenMember, open_member: OpenMember
) -> None:
    """llama.cpp takes them from any sequence; where that is cut back, it looks at them again."""
    member, reference = open_many("swa"), open_member("swa", type_k="f32", type_v="f32")
    sequences = Sequences(member)
    ids = random_ids(16, 1)  # the window
    sequences.prefill(targets_of({1: [6, 7]}), 100)
    sequences.prefill(targets_of({0: ids}), 100)
    sequences.prefill(targets_of({1: [3]}), 100)
    sequences.prefill(targets_of({1: [3], 2: [7, 3, 8]}), 100)
    all_equal_fresh(sequences.sync(targets_of({0: ids})), reference, {0: ids})


@pytest.mark.parametrize(
    ("lengths", "lags", "least"),
    [
        ({0: 3}, {}, 3),
        ({0: 2, 1: 2, 2: 2}, {}, 2),
        ({0: 3, 1: 2, 2: 3}, {}, 3),  # one token more, and one run instead of three
        ({0: 1, 1: 20}, {}, 1),  # 19 tokens more would be worth more than a run
        ({0: 2, 2: 2}, {1: 2}, 2),
        ({0: 2, 2: 3}, {1: 3}, 3),
    ],
)
def test_parts_are_as_long_as_pays(lengths: dict[int, int], lags: dict[int, int], least: int) -> None:
    assert level(lengths, lags) == least


def test_parts_of_nearly_equal_lengths_are_made_equal(open_many: OpenMember, open_member: OpenMember) -> None:
    member, reference = open_many("bpe_a"), open_member("bpe_a", type_k="f32", type_v="f32")
    sequences = Sequences(member)
    ids = {place: random_ids(20, place) for place in range(3)}
    sequences.sync(targets_of(ids))
    longer = {place: given + [9] * (2 if place == 1 else 3) for place, given in ids.items()}
    with noted(member) as calls:
        all_equal_fresh(sequences.sync(targets_of(longer)), reference, longer)
    assert calls == [[(0, 3), (1, 3), (2, 3)]]


def test_a_sequence_between_others_comes_along(open_many: OpenMember, open_member: OpenMember) -> None:
    """llama.cpp runs the model once for sequences with neighbouring numbers."""
    member, reference = open_many("bpe_a", sequences=4), open_member("bpe_a", type_k="f32", type_v="f32")
    sequences = Sequences(member)
    ids = {place: random_ids(20, place) for place in range(3)}
    sequences.sync(targets_of(ids))
    longer = {place: [*given, 7, 8, 9] for place, given in ids.items()} | {3: random_ids(60, 3)}
    with noted(member) as calls:
        outcomes = sequences.sync(
            targets_of({place: longer[place][:-1] for place in (0, 2)}), targets_of({p: longer[p] for p in (1, 3)})
        )
    assert calls == [[(0, 2), (1, 2), (2, 2)]]
    assert outcomes[1].logits is None
    all_equal_fresh(outcomes, reference, {place: longer[place][:-1] for place in (0, 2)})
    all_equal_fresh(sequences.sync(targets_of(longer)), reference, longer)


def test_a_failure_beside_others_is_tried_without_them(open_many: OpenMember, open_member: OpenMember) -> None:
    member, reference = open_many("bpe_a"), open_member("bpe_a", type_k="f32", type_v="f32")
    sequences = Sequences(member)
    ids = {place: random_ids(20, place) for place in range(3)}
    sequences.sync(targets_of(ids))
    longer = {place: [*given, 7, 8] for place, given in ids.items()}
    with failing(member, lambda _, places: 1 in places):
        outcomes = sequences.sync(targets_of({p: longer[p] for p in (0, 2)}), targets_of({1: longer[1]}))
    all_equal_fresh(outcomes, reference, {p: longer[p] for p in (0, 2)})


@pytest.mark.parametrize("name", KINDS)
def test_what_a_lender_has_beyond_its_mirror_is_not_borrowed(
    open_many: OpenMember, open_member: OpenMember, name: str
) -> None:
    """An interrupt after a decode leaves it there."""
    member, reference = open_many(name), open_member(name, type_k="f32", type_v="f32")
    sequences = Sequences(member)
    prompt, decode = random_ids(60, 1), member._decode
    sequences.prefill(targets_of({0: prompt}, final=60), 100)

    def dying(parts: Sequence[Part]) -> int:
        decode(parts)
        raise KeyboardInterrupt

    with patch.object(member, "_decode", dying), pytest.raises(KeyboardInterrupt):
        sequences.sync(targets_of({0: [*prompt, 7, 8, 9]}))
    with noted(member) as calls:
        sequences.prefill(targets_of({1: prompt}, final=60), 100)
    assert calls == []
    ids = {1: [*prompt, 11, 12]}
    all_equal_fresh(sequences.sync(targets_of(ids)), reference, ids)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("swa_full", [True, False])
def test_what_can_be_borrowed(open_many: OpenMember, name: str, swa_full: bool) -> None:
    """A memory with checkpoints is copied as a state, which leaves out what the window has passed."""
    member, random = open_many(name, n_ctx=1024, n_batch=64, swa_full=swa_full), np.random.default_rng(3)
    lender, borrower, beyond = member.caches[0], member.caches[1], 0
    for length in (10, 15, 16, 40, 200, 700):
        member.prepare(random.integers(3, 340, length, dtype=np.int32), final=length // 2)
        for back in (0, 1, 8, length // 2 + 3):
            wanted = np.append(lender.ids[: length - back], 399).astype(np.int32)
            lendable = lender.lendable(wanted)
            beyond += lender.usable(wanted) > lendable
            borrower.borrow(lender, lendable)
            assert borrower.cut(borrower.common(wanted, len(wanted))) == lendable
    assert (beyond > 0) == (name == "swa" and not swa_full)


def test_a_prompt_by_itself_begins_with_the_first_cell(open_many: OpenMember) -> None:
    """Cells that a window has passed are taken again, and the next one to be taken may be any, in each sequence."""
    member, reference = (open_many("swa", n_ctx=1024, n_batch=24, swa_full=False) for _ in range(2))
    Sequences(member).sync(targets_of({place: random_ids(300 + 50 * place, place) for place in range(COUNT)}))
    member.sync(array(random_ids(600, 5)))
    prompt = array(random_ids(270, 6))
    for each in (member, reference):
        each.prepare(prompt[:-1], alone=True)
    np.testing.assert_array_equal(logits_of(member, prompt), logits_of(reference, prompt))


@pytest.mark.parametrize("name", KINDS)
def test_emptying_one_sequence_leaves_the_others(open_many: OpenMember, open_member: OpenMember, name: str) -> None:
    """Also those of a single token."""
    member, reference = open_many(name), open_member(name, type_k="f32", type_v="f32")
    sequences = Sequences(member)
    sequences.sync(targets_of({0: [5], 1: random_ids(30, 1), 2: random_ids(30, 2)}))
    member.caches[1].forget()
    member.caches[2].forget()
    ids = {0: [5, 6], 1: [7, 8, 9]}
    with noted(member) as calls:
        all_equal_fresh(sequences.sync(targets_of(ids)), reference, ids)
    assert sum(tokens for call in calls for place, tokens in call if place == 0) == 1


@pytest.mark.parametrize("name", KINDS)
def test_how_what_is_borrowed_came_is_not_followed(open_many: OpenMember, name: str) -> None:
    member = open_many(name)
    member.prepare(array(random_ids(40, 1)), alone=True)
    lender, borrower = member.caches[:2]
    borrower.borrow(lender, 40)
    assert (borrower.length, borrower.origin.ends) == (40, ())
    assert lender.origin.ends == ((24, 40) if name in ("recurrent", "hybrid") else (40,))
