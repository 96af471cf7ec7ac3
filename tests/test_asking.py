"""What the engine of a member cannot do is refused in one line, before anything is asked of it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import OpenEnsemble

from me_local import Bias, ConfigError, Ensemble, Overrides
from me_local.asking import require_able
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


def test_biases_that_say_nothing(ensemble: Ensemble) -> None:
    with pytest.raises(ConfigError, match="different vocabularies, so nobody knows whose token 5 is"):
        ask(ensemble, logit_bias=[(5, -1.0)])
    with pytest.raises(ConfigError, match='"no such piece" is a token of no member'):
        ask(ensemble, logit_bias={"no such piece": -1.0})
