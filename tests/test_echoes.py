"""What a text's own units get, against a slow computation and against `Ensemble.score`."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import OpenEnsemble, OpenMember, logits_of

from me_local import Ensemble, InputError, Overrides
from me_local.asking import Ask, Tokens
from me_local.echoes import Echo, echo
from me_local.llama.member import Member
from me_local.model import EvaluationInterruptedError

TEXT = "The harbour was café 😀 quiet,\n and then 12 dogs ran"
FULL = 'type_k = "f32"\ntype_v = "f32"'


def logs(member: Member, ids: list[int]) -> dict[int, float]:
    """The log-probabilities of the next token, of those that may be sampled."""
    member.forget()
    logits = logits_of(member, np.array(ids, np.int32)).astype(float)
    v = member.vocabulary
    may = [i for i in range(v.size) if i in v.end_ids or (v.pieces[i] and i not in v.removed)]
    total = math.log(math.fsum(math.exp(logits[i]) for i in may))
    return {i: float(logits[i]) - total for i in may}


def scored(ensemble: Ensemble, prompt: str | Tokens, top: int = 0, **overrides: Any) -> Echo:
    return echo(ensemble, Ask(prompt, Overrides(**overrides), top, "scores"))


@pytest.mark.parametrize("weights", [{"bpe_a": 0.3, "bpe_b": 0.7}, {"bpe_a": 0.0, "bpe_b": 1.0}])
def test_tokens_are_mixed_one_by_one(
    open_ensemble: OpenEnsemble, open_member: OpenMember, weights: dict[str, float]
) -> None:
    ensemble = open_ensemble("bpe_a", "bpe_b", member=FULL)
    members = {name: open_member(name, type_k="f32", type_v="f32") for name in weights}
    vocabulary = members["bpe_a"].vocabulary
    ids = vocabulary.encode(TEXT.encode(), at_start=True)
    found = scored(ensemble, TEXT, 3, weights=weights, temperature=0.2, top_k=1)
    assert found.text == TEXT
    assert found.units[0] == (vocabulary.pieces[ids[0]], None, None)
    assert b"".join(unit.piece for unit in found.units) == TEXT.encode()
    for place, unit in enumerate(found.units[1:], start=1):
        each = {name: logs(member, ids[:place]) for name, member in members.items()}
        mixture = {
            i: math.log(math.fsum(w * math.exp(each[name][i]) for name, w in weights.items())) for i in each["bpe_a"]
        }
        assert unit.piece == vocabulary.pieces[ids[place]]
        assert unit.log_probability == pytest.approx(mixture[ids[place]], abs=1e-5)
        best = sorted(mixture, key=mixture.__getitem__, reverse=True)[:3]
        assert unit.top is not None
        assert [piece for piece, _ in unit.top] == [vocabulary.pieces[i] for i in best]
        assert [log for _, log in unit.top] == pytest.approx([mixture[i] for i in best], abs=1e-5)


@pytest.mark.parametrize("names", [("bpe_a", "spm"), ("bpe_a", "bpe_b"), ("spm", "swa"), ("bpe_c",)])
def test_units_add_up_to_the_score_of_the_text_behind_the_first(
    open_ensemble: OpenEnsemble, names: tuple[str, ...]
) -> None:
    ensemble = open_ensemble(*names, weights=[0.3, 0.7][: len(names)])
    found = scored(ensemble, TEXT).units
    at = next(place for place, unit in enumerate(found) if unit.piece)  # a space in front of the text has no bytes
    first = found[at].piece.decode()
    total = math.fsum(unit.log_probability or 0.0 for unit in found[at + 1 :])
    assert at == (1 if names == ("spm", "swa") else 0)
    assert total == pytest.approx(ensemble.score(first, TEXT.removeprefix(first), raw=True).log_likelihood, abs=1e-4)
    if names == ("bpe_a", "spm"):
        assert [unit.piece for unit in found][:2] == [b"The", b" harbour"]
        assert all(unit.top is None for unit in found)


def test_ids_are_scored_as_they_are(open_ensemble: OpenEnsemble, open_member: OpenMember) -> None:
    """Also where no tokenizer would give them, control tokens included; BOS is there once."""
    ensemble, member = open_ensemble("bpe_a", "bpe_c"), open_member("bpe_c")
    v = member.vocabulary
    assert v.bos is not None
    ids = [*v.encode(b"the cat", at_start=True), *v.encode(b" s"), *v.encode(b"at"), *v.end_ids]
    weights = {"bpe_a": 0.0, "bpe_c": 1.0}
    found = scored(ensemble, Tokens(tuple(ids)), weights=weights)
    expected = [logs(member, [v.bos, *ids[:n]])[ids[n]] for n in range(1, len(ids))]
    assert [unit.log_probability for unit in found.units[1:]] == pytest.approx(expected, abs=1e-3)
    assert [unit.piece for unit in found.units] == [v.pieces[i] for i in ids]
    behind_bos = scored(ensemble, Tokens((v.bos, *ids)), weights=weights)
    assert behind_bos.units[2:] == found.units[1:]
    assert behind_bos.text == found.text == "the cat sat"


def test_one_unit_has_no_probability(open_ensemble: OpenEnsemble) -> None:
    for names in (("bpe_a", "spm"), ("bpe_a", "bpe_b")):
        assert scored(open_ensemble(*names), "t").units == ((b"t", None, None),)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (Tokens((1, 2)), "ids are those of one vocabulary, and the members have several: name one of them"),
        ("", "the prompt is empty"),
        ("the cat " * 300, "which exceeds the available context size of 512"),
    ],
)
def test_what_is_refused(open_ensemble: OpenEnsemble, prompt: str | Tokens, says: str) -> None:
    with pytest.raises(InputError, match=says):
        scored(open_ensemble("bpe_a", "spm"), prompt)


def test_ids_that_there_are_not(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    size = ensemble.members[0].vocabulary.size
    for id_ in (-1, size, 2**40):
        with pytest.raises(InputError, match=f"there are ids from 0 to {size - 1}"):
            scored(ensemble, Tokens((1, id_)), weights={"bpe_a": 1.0, "spm": 0.0})


def test_a_member_without_likelihoods_is_named_where_it_is_asked(
    open_ensemble: OpenEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    abilities = replace(ensemble.members[1].abilities, engine="llama-server", likelihoods=False)
    monkeypatch.setattr(ensemble.members[1], "abilities", abilities)
    with pytest.raises(InputError, match=r'member "spm": its engine \(llama-server\) does not score texts'):
        scored(ensemble, TEXT)
    assert scored(ensemble, TEXT, weights={"bpe_a": 1.0, "spm": 0.0}).units


@pytest.mark.parametrize("names", [("bpe_a", "spm"), ("bpe_a", "bpe_b")])
def test_it_is_interrupted(open_ensemble: OpenEnsemble, names: tuple[str, ...]) -> None:
    """And what is asked next is right."""
    ensemble = open_ensemble(*names)
    calls: list[int] = []

    def interrupted() -> bool:
        calls.append(1)
        return len(calls) > 8

    with pytest.raises(EvaluationInterruptedError):
        echo(ensemble, Ask(TEXT, echo="scores"), interrupted)
    assert scored(ensemble, TEXT) == scored(open_ensemble(*names), TEXT)
