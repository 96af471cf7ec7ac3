"""Fitted weights against values worked out by hand, against scipy, and against what must hold for any data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import minimize

from me_local.decoding.likelihoods import UnitScores, mixed
from me_local.evaluation import fitting
from me_local.evaluation.fitting import fit, fit_weights


def total(logs: np.ndarray, weights: np.ndarray) -> float:
    return float(mixed(logs, weights[:, None]).sum())


def blocks(logs: np.ndarray, count: int, size: int = 10) -> list[UnitScores]:
    return [UnitScores(np.arange(part.shape[1]), part, size) for part in np.split(logs, count, axis=1)]


def test_where_only_one_member_can_have_written_a_unit_weights_are_shares() -> None:
    with np.errstate(divide="ignore"):
        logs = np.log(np.array([[0.5, 0.2, 0.7, 0.0], [0.0, 0.0, 0.0, 0.1]]))
    np.testing.assert_allclose(fit_weights(logs), [0.75, 0.25], atol=1e-6)


def test_a_quadratic_worked_out_by_hand() -> None:
    """Units of P = (0.8, 0.2) twice and (0.1, 0.4) once: 2·0.6/(0.2+0.6λ) = 0.3/(0.4-0.3λ), so λ = 0.42/0.54."""
    logs = np.log(np.array([[0.8, 0.8, 0.1], [0.2, 0.2, 0.4]]))
    np.testing.assert_allclose(fit_weights(logs), [7 / 9, 2 / 9], atol=1e-3)


def test_against_scipy() -> None:
    random = np.random.default_rng(1)
    logs = random.normal(-4, 2, size=(4, 500))
    found = fit_weights(logs)
    result = minimize(
        lambda x: -total(logs, np.exp(x) / np.exp(x).sum()), np.zeros(4), method="BFGS", options={"gtol": 1e-6}
    )
    assert total(logs, found) == pytest.approx(-result.fun, abs=1e-3)
    np.testing.assert_allclose(found, np.exp(result.x) / np.exp(result.x).sum(), atol=2e-3)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.floats(-30, 0)),
)
def test_never_worse_than_the_best_member_nor_than_equal_weights(logs: np.ndarray) -> None:
    weights = fit_weights(logs)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert total(logs, weights) >= logs.sum(axis=1).max()
    equal = np.full(len(logs), 1 / len(logs))
    assert total(logs, weights) >= total(logs, equal) - 1e-9


def test_each_step_raises_the_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = np.random.default_rng(2).normal(-4, 2, size=(3, 200))
    values = []
    for steps in range(40):
        monkeypatch.setattr(fitting, "_STEPS", steps)
        values.append(total(logs, fit_weights(logs)))
    assert (np.diff(values) >= -1e-9).all()
    assert values[-1] > values[0] + 1


def test_every_fourth_block_is_held_out() -> None:
    logs = np.log(np.array([[0.5] * 6 + [0.01] * 2, [0.25] * 6 + [0.5] * 2]))
    result = fit(["a", "b"], blocks(logs, 4))
    assert [row.name for row in result.rows] == ["a", "b", "equal", "fitted"]
    assert (result.bytes, result.units) == ((30, 10), (6, 2))
    np.testing.assert_allclose(result.weights, [1, 0], atol=1e-6)
    assert result.rows[0].fitted == pytest.approx(6 / 30)
    assert result.rows[1].fitted == pytest.approx(12 / 30)
    assert result.rows[2].fitted == pytest.approx(-6 * np.log2(0.375) / 30)
    assert result.rows[1].held_out == pytest.approx(2 / 10)
    assert result.rows[3].held_out == pytest.approx(-2 * np.log2(0.01) / 10, rel=1e-4)
