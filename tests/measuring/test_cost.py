"""What evaluations cost, worked out by hand, and the number of replies at once that is chosen from it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from me_local.errors import LoadError
from me_local.llama.context import CELL_BYTES
from me_local.llama.member import Member
from me_local.llama.memory import kv_cache_bytes
from me_local.measuring import cost
from me_local.measuring.cost import CallCost, choose_batch, measure, pieces_per_second, steps

OpenMember = Callable[..., Member]


def linear(reading: float, token: float, row: float = 0.0, cell: float = 0.0) -> CallCost:
    """A model that takes so long for reading its weights, for each token, for each row of logits and for each cell."""
    counts = (1, 4, 16, 64)
    first = tuple(reading + n * (token + row) for n in counts)
    return CallCost(counts, first, tuple(n * token for n in counts), cell)


@pytest.mark.parametrize("count", [1, 2, 4, 7.5, 16, 64])
@pytest.mark.parametrize("tokens", [1, 3])
def test_between_what_was_timed_there_is_a_straight_line(count: float, tokens: int) -> None:
    found = linear(0.02, 0.003, 0.005, 1e-5).seconds(count, tokens, 164)
    assert found == pytest.approx(0.02 + count * (0.003 * tokens + 0.005) + 100e-5 * count * tokens)


def test_beyond_it_costs_grow_in_proportion_and_below_they_do_not() -> None:
    timed = CallCost((1, 4), (0.01, 0.02), (0.001, 0.003))
    assert timed.seconds(8, 2, 0) == pytest.approx(2 * 0.02 + 2 * 0.003)
    assert timed.seconds(0.9, 1, 0) == 0.01
    assert CallCost((1,), (0.01,), (0.001,)).seconds(3, 1, 0) == pytest.approx(0.03)


COSTS = (linear(0.006, 0.001), linear(0.010, 0.003))


@pytest.mark.parametrize(
    ("way", "count", "seconds"),
    [
        ("me shared", 1, 0.25 * 0.006 + 0.75 * 0.010 + 0.004),
        ("me shared", 4, (0.25 * 0.006 + 0.75 * 0.010) / 4 + 0.004),
        ("ce", 1, 0.016 + 0.004),
        ("ce", 4, 0.016 / 4 + 0.004),
    ],
)
def test_speed_of_all_replies_together(way: Any, count: int, seconds: float) -> None:
    assert pieces_per_second(COSTS, [1, 3], count, way) == pytest.approx(1 / seconds)


def test_logits_are_for_those_that_have_drawn_the_member() -> None:
    costs = (linear(0.006, 0.001, 0.002), linear(0.010, 0.003, 0.004))
    shared, ce = 0.009 / 4 + 0.004 + 0.25 * 0.002 + 0.75 * 0.004, 0.016 / 4 + 0.004 + 0.006
    assert pieces_per_second(costs, [1, 3], 4, "me shared") == pytest.approx(1 / shared)
    assert pieces_per_second(costs, [1, 3], 4, "ce") == pytest.approx(1 / ce)


@pytest.mark.parametrize("way", ["ce", "me shared", "me own"])
def test_attention_costs_as_much_as_the_reply_is_long(way: Any) -> None:
    one = linear(0.006, 0.001, 0.0, 1e-6)
    assert pieces_per_second([one], [1], 8, way, 364) == pytest.approx(1 / (0.006 / 8 + 0.001 + 300e-6))


def test_members_without_weight_cost_nothing() -> None:
    for way in ("me shared", "me own", "ce"):
        assert pieces_per_second(COSTS, [1, 0], 2, way) == pytest.approx(1 / 0.004)  # type: ignore[arg-type]


def test_own_routes_lie_between_the_others() -> None:
    """One at a time they are the shared route's. Of two replies and equal weights, half of the calls serve both.

    After a call that served one, one is left and the other is drawn anew: half the time both wait for one member, which
    then serves two. After a call that served two, both are drawn: half the time for the same. So a piece takes 2/3
    of a call.
    """
    assert pieces_per_second(COSTS, [1, 3], 1, "me own") == pytest.approx(
        pieces_per_second(COSTS, [1, 3], 1, "me shared"), rel=0.02
    )
    equal = (linear(0.01, 0.001), linear(0.01, 0.001))
    assert pieces_per_second(equal, [1, 1], 2, "me own") == pytest.approx(1 / (0.01 * 2 / 3 + 0.002), rel=0.02)
    for count in (2, 4, 8):
        ce, own, shared = (pieces_per_second(COSTS, [1, 3], count, way) for way in ("ce", "me own", "me shared"))  # type: ignore[arg-type]
        assert ce < own < shared


def test_own_routes_where_little_was_timed_or_a_member_is_hardly_drawn() -> None:
    once = CallCost((1,), (0.01,), (0.001,))
    one = pieces_per_second([once, once], [0.7, 0.3], 1, "me own")
    assert one == pytest.approx(pieces_per_second([once, once], [0.7, 0.3], 1, "me shared"), rel=0.02)
    assert pieces_per_second(COSTS, [1, 1e-5], 4, "me own") > 0


@pytest.fixture
def invented(open_member: OpenMember, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Chooses for two members that cost this, on a machine with room for so many replies; None: nobody knows."""
    members = [open_member("bpe_a"), open_member("spm")]
    one = sum(
        (kv_cache_bytes(m.weights.metadata, m.weights.memory, m.config, 512) or 0)
        + CELL_BYTES * 512
        + 4 * m.vocabulary.size
        for m in members
    )

    def choose(first: CallCost, second: CallCost, room: float | None = 1000, most: int = 1000, way: Any = "ce") -> int:
        costs = iter([first, second])
        monkeypatch.setattr(cost, "measure", lambda member, most: next(costs))
        monkeypatch.setattr(cost, "available_memory", lambda: None if room is None else round(room * one / 0.7))
        return choose_batch(members, [0.5, 0.5], way, most)

    return choose


def test_the_least_that_is_nearly_as_fast_as_any(invented: Callable[..., int]) -> None:
    """With CE a piece takes 2a/N + 2b: as long as 0.9 / (2a/64 + 2b) is not reached, it is worth while."""
    assert invented(linear(0.01, 0.0), linear(0.01, 0.0)) == 64
    assert invented(linear(0.0, 0.01), linear(0.0, 0.01)) == 1
    # a = b: 1/N + 1 <= (1/64 + 1) / 0.9 = 1.1285, so N >= 7.8
    assert invented(linear(0.01, 0.01), linear(0.01, 0.01)) == 8
    # a = 4·b: 4/N + 1 <= (4/64 + 1) / 0.9 = 1.1806, so N >= 22.2
    assert invented(linear(0.04, 0.01), linear(0.04, 0.01)) == 32
    # ME reads half of it: 2/N + 1 <= (2/64 + 1) / 0.9 = 1.1458, so N >= 13.7
    assert invented(linear(0.04, 0.01), linear(0.04, 0.01), way="me shared") == 16


@pytest.mark.parametrize(
    ("room", "most", "chosen"),
    [(None, 20, 8), (None, 1, 1), (1000, 20, 16), (10.5, 100, 8), (1.5, 100, 1), (0.2, 100, 1)],
)
def test_as_many_as_there_are_and_as_fit(
    invented: Callable[..., int], room: float | None, most: int, chosen: int
) -> None:
    assert invented(linear(0.01, 0.0), linear(0.01, 0.0), room, most) == chosen


@pytest.fixture
def clocked(open_member: OpenMember, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Member]:
    """Makes a model on a GPU: an evaluation returns at once, and to read the logits takes the time."""

    def made(reading: float, token: float) -> Member:
        clock, pending = [0.0], [0.0]

        def evaluate(_: Any, parts: Any) -> None:
            pending[0] = reading + token * sum(len(part.ids) for part in parts) + 0.005 * len(parts)

        def logits(_: Any) -> None:
            clock[0] += pending[0]

        member = open_member("bpe_a")
        monkeypatch.setattr(Member, "evaluate", evaluate)
        monkeypatch.setattr(Member, "logits", logits)
        monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        return member

    return made


@pytest.fixture
def timed(clocked: Callable[[float, float], Member]) -> Callable[..., CallCost]:
    """Measures such a model."""
    return lambda reading, token, most: measure(clocked(reading, token), most)


def test_a_step_and_several_tokens(clocked: Callable[[float, float], Member], monkeypatch: pytest.MonkeyPatch) -> None:
    member = clocked(0.5, 0.003)
    assert steps(member) == pytest.approx((0.508, 0.529))
    monkeypatch.setattr(cost, "Member", no_room)
    assert steps(member) is None


def no_room(*_: object, **__: object) -> Member:
    raise LoadError("no memory")


def test_measuring_waits_for_the_logits(timed: Callable[..., CallCost]) -> None:
    found = timed(0.5, 0.003, 20)
    assert found.counts == (1, 4, 16, 20)
    assert found.first == pytest.approx([0.5 + n * 0.008 for n in found.counts])
    assert found.more == pytest.approx([n * 0.003 for n in found.counts])


def test_more_sequences_are_not_tried_where_a_token_hardly_gets_cheaper(timed: Callable[..., CallCost]) -> None:
    assert timed(0.001, 0.003, 64).counts == (1, 4, 16)
    assert timed(0.5, 0.003, 64).counts == (1, 4, 16, 64)


def test_no_more_is_timed_than_there_is_room_for(
    timed: Callable[..., CallCost], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, most = cost._probe, 4

    def refuse(member: Member, cells: int, sequences: int) -> Member:
        if sequences > most:
            raise LoadError("no memory")
        return make(member, cells, sequences)

    monkeypatch.setattr(cost, "_probe", refuse)
    assert timed(0.5, 0.003, 64).counts == (1, 4)
    most = 0
    with pytest.raises(LoadError):
        timed(0.5, 0.003, 64)


def test_more_replies_than_are_ever_chosen_are_not_timed(timed: Callable[..., CallCost]) -> None:
    assert timed(0.5, 0.003, 128).counts == (1, 4, 16, 64)


@pytest.mark.parametrize("trained", [0, 200])
def test_a_tiny_model_is_measured(open_member: OpenMember, trained: int) -> None:
    member = open_member("bpe_a")
    member.weights.trained_context = trained
    found = measure(member, 4)
    assert found.counts[0] == 1
    assert min(found.first) > 0
    assert min(found.more) >= 0
    assert found.cell >= 0
