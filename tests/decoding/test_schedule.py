"""Evaluations in turn or at the same time: the same results, and the faster way is found."""

import threading
import time
from unittest.mock import patch

import llama_cpp
import pytest
from conftest import OpenEnsemble, OpenMember

from me_local import Overrides
from me_local.decoding.schedule import Schedule


class Model:
    def __init__(self, *, divisible: bool = True, local: bool = True) -> None:
        self.divisible, self.local = divisible, local
        self.parts = 1

    def share_cores(self, parts: int) -> None:
        self.parts = parts


def test_at_the_same_time_means_in_threads_with_a_share_of_the_cores_each() -> None:
    models = [Model(), Model()]
    schedule, both = Schedule(models), threading.Barrier(2, timeout=10)

    def evaluate() -> int:
        both.wait()  # comes back only when the other is there, too
        return models[0].parts

    assert schedule.run({0: evaluate, 1: evaluate}, parallel=True) == {0: 2, 1: 2}
    assert schedule.run({1: lambda: models[1].parts}, parallel=True) == {1: 1}


def test_an_error_waits_for_the_others() -> None:
    done, begun = [], threading.Event()

    def fail() -> None:
        assert begun.wait(10)
        raise ValueError("broken")

    def last() -> None:
        begun.set()
        time.sleep(0.05)
        done.append(1)

    with pytest.raises(ValueError, match="broken"):
        Schedule([Model(), Model()]).run({0: fail, 1: last}, parallel=True)
    assert done == [1]


@pytest.mark.parametrize("faster", [False, True])
def test_the_faster_way_is_found(faster: bool) -> None:
    schedule, here = Schedule([Model(), Model()]), threading.get_ident()

    def evaluate() -> bool:
        parallel = threading.get_ident() != here
        time.sleep(0.001 if parallel == faster else 0.02)
        return parallel

    ways = [schedule.run({0: evaluate, 1: evaluate}, parallel=None)[0] for _ in range(14)]
    assert ways[:10] == [False, True] * 5
    assert ways[10:] == [faster] * 4
    assert schedule.parallel is faster


def test_one_that_keeps_its_threads_goes_in_turn_with_the_others() -> None:
    schedule, here = Schedule([Model(), Model(divisible=False)]), threading.get_ident()
    for _ in range(14):
        assert schedule.run(dict.fromkeys((0, 1), threading.get_ident), parallel=None) == {0: here, 1: here}
    assert schedule.parallel is False
    assert here not in schedule.run(dict.fromkeys((0, 1), threading.get_ident), parallel=True).values()


@pytest.mark.parametrize(("flash_attn", "counts"), [(True, []), (False, [2, 4])])
def test_the_threads_of_flash_attention_stay_as_many(
    open_member: OpenMember, flash_attn: bool, counts: list[int]
) -> None:
    """By it numbers depend on them, so that a share of the cores would make replies depend on what was faster."""
    member = open_member("bpe_a", flash_attn=flash_attn, n_threads=4)
    asked: list[int] = []
    with patch.object(llama_cpp, "llama_set_n_threads", lambda _, one, batch: asked.extend({one, batch})):
        member.share_cores(2)
        member.share_cores(1)
    assert asked == counts


@pytest.mark.parametrize("names", [("bpe_a", "bpe_b"), ("bpe_c", "spm"), ("hybrid", "recurrent", "swa")])
def test_ce_gives_the_same_reply_either_way(open_ensemble: OpenEnsemble, names: tuple[str, ...]) -> None:
    replies = [
        open_ensemble(*names).generate("Hello", Overrides(strategy="ce", seed=3, max_tokens=40, parallel=parallel))
        for parallel in (False, True, None)
    ]
    assert replies[0].steps == replies[1].steps == replies[2].steps
    assert len(replies[0].steps) > 5


@pytest.mark.parametrize("parallel", [None, True, False])
def test_members_elsewhere_are_asked_at_the_same_time_and_take_no_cores(parallel: bool | None) -> None:
    models = [Model(), Model(local=False), Model(local=False)]
    schedule, all_three = Schedule(models), threading.Barrier(3, timeout=10)

    def evaluate() -> int:
        all_three.wait()  # comes back only when the others are there, too
        return models[0].parts

    assert schedule.run(dict.fromkeys(range(3), evaluate), parallel) == {0: 1, 1: 1, 2: 1}
    assert schedule.run({1: threading.get_ident}, parallel) == {1: threading.get_ident()}
