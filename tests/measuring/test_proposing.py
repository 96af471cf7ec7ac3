"""Which models are proposed: on machines and with models that are made up."""

from pathlib import Path

import pytest

from me_local.llama.devices import free_gpu_memory
from me_local.llama.weights import supports_gpu
from me_local.measuring.proposing import Candidate, Room, candidate, distinct, propose, reasons, weights_of
from me_local.stores.catalogue import Found
from me_local.stores.entry import Entry
from me_local.stores.facts import Facts

GB = 10**9


def made_up(
    name: str,
    billions: float,
    *,
    bits: float = 4.5,
    vocabulary: str = "",
    template: str | None = "chat",
    thinks: bool = False,
    title: str = "",
) -> Candidate:
    facts = Facts(
        title=title or name,
        architecture="llama",
        parameters=int(billions * GB),
        quantisation="Q4_K_M",
        context=32768,
        vocabulary="BPE",
        vocabulary_size=3,
        vocabulary_id=vocabulary or name,
        template=template,
        thinks=thinks,
        unfit="",
    )
    return candidate(Found(Entry("", name, name, (Path(name),)), facts, int(billions * GB * bits / 8), ""))


def alike(a: Candidate, b: Candidate) -> float:
    """Names that begin with "odd" cut a text otherwise."""
    return 0.3 if a.label.startswith("odd") or b.label.startswith("odd") else 0.8


def proposed(*models: Candidate, free: float = 64, gpu: bool = True) -> tuple[set[str], str]:
    proposal = propose(models, Room(int(free * GB), gpu=gpu), alike)
    return {one.label for one in proposal.members}, "\n".join(proposal.notes)


A8, B7, C3, D1 = made_up("a8", 8), made_up("b7", 7), made_up("c3", 3), made_up("d1", 1)


def test_the_largest_that_fit() -> None:
    names, notes = proposed(A8, B7, C3, D1)
    assert names == {"a8", "b7"}
    assert notes == (
        "proposed are a8 and b7, which cut a text alike in 80% of the places, both have chat templates, "
        "are near in size, need 9.7 GB where 64.0 GB of GPU memory are free"
    )


def test_where_the_best_do_not_fit_it_says_so() -> None:
    names, notes = proposed(A8, B7, C3, D1, free=8)
    assert names == {"a8", "c3"}
    assert "a8 and b7 would be the better choice, but need 9.7 GB together, and 8.0 GB of GPU memory are free" in notes
    names, notes = proposed(A8, B7, free=6)
    assert names == {"a8"}
    assert "it is no ensemble yet" in notes
    names, notes = proposed(A8, B7, free=2)
    assert names == set()
    assert "nothing fits: b7, the smallest model here, needs 4.5 GB, and 2.0 GB of GPU memory are free" in notes
    assert proposed() == (set(), "")


def test_where_memory_is_not_known_all_fit() -> None:
    assert {one.label for one in propose([A8, B7, C3], Room(None, gpu=False), alike).members} == {"a8", "b7"}


def test_templates_go_before_size_and_a_base_model_has_less_weight() -> None:
    base = made_up("base", 8, template=None)
    assert proposed(base, C3, D1)[0] == {"c3", "d1"}
    names, notes = proposed(base, B7)
    assert names == {"base", "b7"}
    assert "two models with chat templates would chat better" in notes
    assert weights_of([base, B7]) == [0.2, 0.8]
    assert "it has no chat template: a base model" in reasons([base], alike)[0]


def test_those_that_think_go_together() -> None:
    thinker, other = made_up("t8", 8, thinks=True), made_up("u3", 3, thinks=True)
    assert proposed(thinker, B7, other)[0] == {"t8", "u3"}
    assert "t8 thinks before it answers, and the other does not" in proposed(thinker, B7)[1]


def test_like_sizes_vocabularies_and_speed() -> None:
    assert proposed(made_up("a70", 70), D1, made_up("c2", 2), free=100)[0] == {"d1", "c2"}
    same = [made_up("s6", 6, vocabulary="v"), made_up("s7", 7, vocabulary="v")]
    assert proposed(A8, *same)[0] == {"s6", "s7"}
    odd = made_up("odd9", 9)
    assert proposed(odd, B7, C3)[0] == {"b7", "c3"}
    assert "no two models here cut a text alike: odd9 and b7 do so in 30%" in proposed(odd, B7)[1]
    # 32 and 30 billion are slow on a processor.
    assert proposed(made_up("a32", 32), made_up("b30", 30), A8, B7, gpu=False)[0] == {"a8", "b7"}
    assert proposed(made_up("a32", 32), made_up("b30", 30), A8, B7, gpu=True)[0] == {"a32", "b30"}


def test_one_file_of_each_model() -> None:
    files = [made_up(f"q{bits}", 3, bits=bits, title="same") for bits in (2.5, 4.5, 8.5, 16)]
    assert [one.label for one in distinct([*files, D1])] == ["q4.5", "d1"]
    assert [one.label for one in distinct([files[0], made_up("q3", 3, bits=3, title="same")])] == ["q3"]


def test_weights_sum_to_1() -> None:
    assert weights_of([A8, B7]) == [0.5, 0.5]
    assert weights_of([A8, C3]) == [0.7, 0.3]
    assert sum(weights_of([A8, B7, C3])) == pytest.approx(1)
    assert weights_of([A8]) == [1]


def test_speeds_in_words() -> None:
    first, second, third = reasons([C3, A8, D1], alike)
    assert first == "3 B parameters as Q4_K_M, 2.1 GB in memory; it has a chat template"
    assert second.endswith("it cuts a text where c3 does in 80% of the places; 2.7 times as much to read for a piece")
    assert third.endswith("3.0 times as fast")


def test_memory_of_gpus() -> None:
    free = free_gpu_memory()
    assert (free is None or free > 0) if supports_gpu() else free is None
