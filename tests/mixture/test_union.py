"""CE over the union of candidates against the mixture worked out in plain Python."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from conftest import logits_of

from me_local import Ensemble, Overrides
from me_local.asking import Prompts, make_request
from me_local.config import override
from me_local.decoding.generation import Generation
from me_local.llama.member import Member
from me_local.mixture.alignment import Distribution
from me_local.mixture.union import Union
from me_local.text.unified import END, UnifiedVocabulary

OpenEnsemble = Callable[..., Ensemble]
OpenMember = Callable[..., Member]

F32 = {"type_k": "f32", "type_v": "f32"}
HEADS = [b"the cat", b"and then ", b"so they", b"in the house the dog ran to the"]


def slow(members: list[Member], head: bytes, weights: list[float], k: int, temperature: float) -> dict[bytes, float]:
    """The mixture by its definition, b"" being END."""
    scores, kept = [], set()
    for member in members:
        v = member.vocabulary
        ids = [*([] if v.bos is None else [v.bos]), *v.encode(head, at_start=True)]
        logits = logits_of(member, np.array(ids, dtype=np.int32)).tolist()
        piece_of = {i: b"" if i in v.end_ids else piece for i, piece in enumerate(v.pieces) if piece or i in v.end_ids}
        best = sorted(piece_of, key=lambda i: -logits[i])[:k]
        kept |= {piece_of[i] for i in best}
        scores.append((v, logits, piece_of))
    mixture = dict.fromkeys(kept, 0.0)
    for (v, logits, piece_of), weight in zip(scores, weights, strict=True):
        found = {}
        for piece in kept:
            own = [i for i, text in piece_of.items() if text == piece]
            if piece == b"":
                found[piece] = max(logits[i] for i in own)
            else:
                found[piece] = logits[own[0] if own else v.encode(piece)[0]]
        total = math.fsum(math.exp(s / temperature) for s in found.values())
        for piece, s in found.items():
            mixture[piece] += weight * math.exp(s / temperature) / total
    return mixture


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("head", HEADS)
def test_against_the_definition(
    open_ensemble: OpenEnsemble, open_member: OpenMember, head: bytes, temperature: float
) -> None:
    names, weights = ("bpe_a", "spm"), [0.3, 0.7]
    ensemble = open_ensemble(*names, weights=weights, member='type_k = "f32"\ntype_v = "f32"')
    config = override(ensemble.config, Overrides(strategy="union", top_k=5, temperature=temperature, seed=1))
    prompts = tuple(writer.raw_prompt() for writer in ensemble.writers)
    generation = Generation(ensemble.engine, make_request(config, Prompts(head, prompts)), lambda: False)
    mixture = generation.mixture()
    pieces = ensemble.engine.unified.pieces
    found = {pieces[n]: p for n, p in zip(mixture.numbers.tolist(), mixture.probabilities.tolist(), strict=True)}
    expected = slow([open_member(name, **F32) for name in names], head, weights, 5, temperature)
    assert found == pytest.approx(expected, abs=1e-4)
    assert math.fsum(found.values()) == pytest.approx(1)
    assert 5 < len(found) <= 10


def test_it_is_not_the_mixture_of_ce(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    prompts = tuple(writer.raw_prompt() for writer in ensemble.writers)
    found = []
    for strategy in ("ce", "union"):
        config = override(ensemble.config, Overrides(strategy=strategy, top_k=5, seed=1))
        mixture = Generation(ensemble.engine, make_request(config, Prompts(HEADS[0], prompts)), lambda: False).mixture()
        found.append(mixture)
    assert found[0].numbers.tolist() == found[1].numbers.tolist()
    assert abs(found[0].probabilities - found[1].probabilities).max() > 1e-3


def test_a_reply_is_repeated_by_its_seed_and_has_shares(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    given = Overrides(strategy="union", seed=4, max_tokens=30)
    reply = ensemble.generate("the cat", given, raw=True)
    assert ensemble.generate("the cat", given, raw=True).text == reply.text
    assert reply.strategy == "union"
    for step in reply.steps:
        assert sum(step.shares) == pytest.approx(1)
        assert 0 < step.probability <= 1


def test_temperature_0_and_what_a_member_cannot_write(open_member: OpenMember) -> None:
    members = [open_member("bpe_a"), open_member("spm")]
    vocabularies = [member.vocabulary for member in members]
    unified = UnifiedVocabulary(vocabularies)
    number_of = {piece: n for n, piece in enumerate(unified.pieces)}
    union = Union(unified, vocabularies)
    kept = {
        i: Distribution(np.array([END, number_of[piece]], dtype=np.int32), np.array([0.5, 0.5]))
        for i, piece in enumerate((b" the", b"e"))
    }
    logits = {i: np.zeros(v.size, dtype=np.float32) for i, v in enumerate(vocabularies)}
    logits[0][vocabularies[0].pieces.index(b"e")] = 1.0
    logits[1][vocabularies[1].end_ids[0]] = 3.0
    found = union.distributions(kept, logits, {0: 0.0, 1: 1.0})
    for distribution in found.values():
        assert set(distribution.numbers.tolist()) == {END, number_of[b" the"], number_of[b"e"]}
    assert found[0].of(number_of[b"e"]) == 1.0
    assert found[1].of(END) == pytest.approx(math.exp(3) / (math.exp(3) + 2))


def test_union_runs_all_members_at_every_step(open_ensemble: OpenEnsemble) -> None:
    reply = open_ensemble("bpe_c", "spm").generate("Hello", Overrides(strategy="union", seed=2, max_tokens=20))
    assert len(reply.steps) > 3
    assert all(usage.calls >= len(reply.steps) for usage in reply.usage)
