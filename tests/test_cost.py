"""What evaluations cost, worked out by hand, and the number of replies at once that is chosen from it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from me_local import cost
from me_local.cost import CallCost, choose_batch, fitted, measure, pieces_per_second
from me_local.footprint import kv_cache_bytes
from me_local.member import CELL_BYTES, Member

OpenMember = Callable[..., Member]


def test_a_line_is_found_again() -> None:
    found = fitted({(k, r, m): 0.02 + 0.003 * k + 0.005 * r + 1e-5 * k * m for k, r, m in cost._CALLS_TIMED})
    assert (found.reading, found.token, found.row, found.cell) == pytest.approx((0.02, 0.003, 0.005, 1e-5))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # More than proportional: no reading. The squares of b/2 - 1 and b/3 - 1, relative errors, are to be least.
        ({(1, 0, 0): 2.0, (2, 0, 0): 6.0}, (0.0, (1 / 2 + 1 / 3) / (1 / 4 + 1 / 9))),
        # More tokens in less time: no cost of a token, and a/3 - 1 and a/2 - 1 are to be least.
        ({(1, 0, 0): 3.0, (2, 0, 0): 2.0}, ((1 / 3 + 1 / 2) / (1 / 9 + 1 / 4), 0.0)),
    ],
)
def test_no_part_is_negative_and_the_other_fits_best(
    seconds: dict[cost.Call, float], expected: tuple[float, float]
) -> None:
    found = fitted(seconds)
    assert (found.reading, found.token) == pytest.approx(expected)


COSTS = (CallCost(0.006, 0.001), CallCost(0.010, 0.003))


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
    costs = (CallCost(0.006, 0.001, 0.002), CallCost(0.010, 0.003, 0.004))
    shared, ce = 0.009 / 4 + 0.004 + 0.25 * 0.002 + 0.75 * 0.004, 0.016 / 4 + 0.004 + 0.006
    assert pieces_per_second(costs, [1, 3], 4, "me shared") == pytest.approx(1 / shared)
    assert pieces_per_second(costs, [1, 3], 4, "ce") == pytest.approx(1 / ce)


def test_attention_costs_as_much_as_the_reply_is_long() -> None:
    cost = CallCost(0.006, 0.001, 0.0, 1e-6)
    assert pieces_per_second([cost], [1], 8, "ce", 300) == pytest.approx(1 / (0.006 / 8 + 0.001 + 300e-6))


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
    equal = (CallCost(0.01, 0.001), CallCost(0.01, 0.001))
    assert pieces_per_second(equal, [1, 1], 2, "me own") == pytest.approx(1 / (0.01 * 2 / 3 + 0.002), rel=0.02)
    for count in (2, 4, 8):
        ce, own, shared = (pieces_per_second(COSTS, [1, 3], count, way) for way in ("ce", "me own", "me shared"))  # type: ignore[arg-type]
        assert ce < own < shared


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
        monkeypatch.setattr(cost, "measure", lambda member: next(costs))
        monkeypatch.setattr(cost, "available_memory", lambda: None if room is None else round(room * one / 0.7))
        return choose_batch(members, [0.5, 0.5], way, most)

    return choose


def test_the_least_that_is_nearly_as_fast_as_any(invented: Callable[..., int]) -> None:
    """With CE a piece takes 2a/N + 2b: as long as 0.9 / (2a/64 + 2b) is not reached, it is worth while."""
    assert invented(CallCost(0.01, 0.0), CallCost(0.01, 0.0)) == 64
    assert invented(CallCost(0.0, 0.01), CallCost(0.0, 0.01)) == 1
    # a = b: 1/N + 1 <= (1/64 + 1) / 0.9 = 1.1285, so N >= 7.8
    assert invented(CallCost(0.01, 0.01), CallCost(0.01, 0.01)) == 8
    # a = 4·b: 4/N + 1 <= (4/64 + 1) / 0.9 = 1.1806, so N >= 22.2
    assert invented(CallCost(0.04, 0.01), CallCost(0.04, 0.01)) == 32
    # ME reads half of it: 2/N + 1 <= (2/64 + 1) / 0.9 = 1.1458, so N >= 13.7
    assert invented(CallCost(0.04, 0.01), CallCost(0.04, 0.01), way="me shared") == 16


@pytest.mark.parametrize(
    ("room", "most", "chosen"),
    [(None, 20, 8), (None, 1, 1), (1000, 20, 16), (10.5, 100, 8), (1.5, 100, 1), (0.2, 100, 1)],
)
def test_as_many_as_there_are_and_as_fit(
    invented: Callable[..., int], room: float | None, most: int, chosen: int
) -> None:
    assert invented(CallCost(0.01, 0.0), CallCost(0.01, 0.0), room, most) == chosen


def test_measuring_waits_for_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU an evaluation returns at once, and reading the logits takes the time."""
    clock = [0.0]
    pending = [0.0]

    def evaluate(parts: Any) -> None:
        count = len(parts[0].ids)
        pending[0] = 0.02 + 0.003 * count + 0.005 * (count if parts[0].outputs == "every" else 1)

    def logits() -> None:
        clock[0] += pending[0]

    probe: Any = SimpleNamespace(
        vocabulary=SimpleNamespace(size=50), prepare=lambda ids: None, evaluate=evaluate, logits=logits, caches=(None,)
    )
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    found = fitted(cost._timed(probe, 512))
    assert (found.reading, found.token, found.row) == pytest.approx((0.02, 0.003, 0.005))


def test_a_model_of_short_contexts_is_measured(open_member: OpenMember) -> None:
    member = open_member("bpe_a")
    member.weights.trained_context = 200
    found = measure(member)
    assert found.reading + found.token > 0


def test_a_tiny_model_is_measured(open_member: OpenMember) -> None:
    found = measure(open_member("bpe_a"))
    assert found.reading >= 0
    assert found.token >= 0
    assert found.reading + found.token > 0
