"""What the engine of a member cannot do is refused in one line, before anything is asked of it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import OpenEnsemble, WriteModels

from me_local import Bias, ConfigError, Ensemble, Overrides, load
from me_local.asking import Ask, require_able
from me_local.model import Abilities

LITTLE = Abilities("vllm", most_logits=20, raw_logits=False)


@pytest.fixture
def ensemble(open_ensemble: OpenEnsemble) -> Ensemble:
    """Two members here, as they will be asked about."""
    return open_ensemble("bpe_c", "spm")


def ask(ensemble: Ensemble, **given: Any) -> None:
    """Whether both members could do that if an engine gave no more than the 20 largest log-probabilities."""
    members: Any = [SimpleNamespace(name=member.name, abilities=LITTLE) for member in ensemble.members]
    require_able(ensemble.engine, members, ensemble.with_overrides(Overrides(**given)))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repeat_last_n": 5},
        {"dry_multiplier": 0.8, "dry_penalty_last_n": 5},
        {"logit_bias": [Bias("e", -1.0), Bias("t", -math.inf)]},
        {"min_tokens": 3},
        {"typical_p": 0.5, "xtc_probability": 0.5},
        {"repeat_penalty": 2.0, "repeat_last_n": 0},
        {"presence_penalty": 1.0, "repeat_last_n": 0},
        {"dry_multiplier": 1.0, "dry_penalty_last_n": 0},
        {"top_n_sigma": 0.0},
    ],
    ids=str,
)
def test_what_few_logits_are_enough_for(ensemble: Ensemble, given: dict[str, Any]) -> None:
    ask(ensemble, **given)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"repeat_penalty": 1.1, "repeat_last_n": 5}, r"repeat_penalty = 1\.1 needs logits, and its engine \(vllm\)"),
        (
            {"presence_penalty": 0.5, "repeat_last_n": 64},
            r"top_k = 10 with penalties, biases or DRY on 64 tokens needs \d+ logits",
        ),
        ({"dry_multiplier": 0.8, "dry_penalty_last_n": 99}, "DRY on 99 tokens needs"),
        ({"presence_penalty": -0.5, "repeat_last_n": 5}, "makes tokens likelier .* needs all logits"),
        ({"logit_bias": [Bias("e", 1.0)]}, "makes tokens likelier .* needs all logits"),
        ({"top_n_sigma": 2.0}, r"top_n_sigma = 2 needs all logits"),
    ],
)
def test_what_they_are_not_enough_for(ensemble: Ensemble, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=f'^member "bpe_c": .*{problem}') as caught:
        ask(ensemble, **given)
    assert "\n" not in str(caught.value)


def test_an_id_is_that_of_the_member_that_is_asked_alone(ensemble: Ensemble) -> None:
    """Also where the others have no token of that number."""
    pieces, small = ensemble.members[1].vocabulary.pieces, ensemble.members[0].vocabulary.size
    large = next(i for i, piece in enumerate(pieces) if i >= small and piece.isalpha())
    alone = Overrides(logit_bias=[(large, 1e6)], weights={"bpe_c": 0, "spm": 1}, max_tokens=3, seed=1)
    assert ensemble.generate("the cat", alone, raw=True).text == pieces[large].decode() * 3


def test_biases_that_say_nothing(ensemble: Ensemble) -> None:
    with pytest.raises(ConfigError, match="different vocabularies, so nobody knows whose token 5 is"):
        ask(ensemble, logit_bias=[(5, -1.0)])
    large = ensemble.members[1].vocabulary.size - 1
    assert large >= ensemble.members[0].vocabulary.size
    with pytest.raises(ConfigError, match=f'member "bpe_c" has no token {large}'):
        ensemble.with_overrides(Overrides(logit_bias=[(large, -1.0)], weights={"bpe_c": 1, "spm": 0}))
    with pytest.raises(ConfigError, match=f'member "spm" has no token {large + 1}'):
        ensemble.with_overrides(Overrides(logit_bias=[Bias(large + 1, -1.0, "spm")]))
    with pytest.raises(ConfigError, match='"no such piece" is a token of no member'):
        ask(ensemble, logit_bias={"no such piece": -1.0})


@pytest.mark.parametrize("batch", [1, 2])
def test_settings_of_one_prompt_among_many(write_models: WriteModels, batch: int) -> None:
    asked = [Ask("the cat", Overrides(logit_bias={"no such piece": -1.0})), Ask("the cat", Overrides(max_tokens=2))]
    with load(write_models("bpe_c", "spm"), batch=batch) as ensemble:
        refused, replied = sorted(ensemble.generate_many(asked, raw=True), key=lambda finished: finished.index)
    assert '"no such piece" is a token of no member' in str(refused.error)
    assert replied.reply is not None
