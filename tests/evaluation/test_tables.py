"""Tables of an evaluation, worked out by hand."""

import math
from typing import Any

import pytest

from me_local.evaluation.tables import ACCURACY, Cell, Figure, Row, markdown, tabulate


def record(question: str, arm: str, correct: bool, task: str = "t", **cost: float) -> dict[str, Any]:
    return {"task": task, "question": question, "arm": arm, "correct": {ACCURACY: {arm: correct}}, "cost": cost}


def test_a_table_worked_out_by_hand() -> None:
    """Two runs of four questions: a is right on average in 1, 1, 0, 0; ME in 1, 1, 1/2, 0; b never."""
    made = [record(q, "a", q in "12") for q in "1234" for _ in range(2)]
    made += [record(q, "b", False) for q in "1234" for _ in range(2)]
    made += [record(q, "ME", q in "12" or (q == "3" and i == 0)) for q in "1234" for i in range(2)]
    (row,) = tabulate(made, ["a", "b", "ME"], ["a", "b"])
    assert (row.task, row.measure, row.questions, row.runs) == ("t", "accuracy", 4, 2)
    assert row.cells["a"] == Cell(0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert row.cells["b"] == Cell(0.0, 0.0)
    me = row.cells["ME"]
    assert me.mean == 0.625
    # Deviations of 1, 1, 1/2, 0 from 5/8: squares 9, 9, 1, 25 in 64ths; of the gains 0, 0, 1/2, 0 from 1/8: 1, 1, 9, 1.
    assert me.error == pytest.approx(math.sqrt(44 / 64 / 3 / 4))
    assert me.gain == Figure(0.125, pytest.approx(math.sqrt(12 / 64 / 3 / 4)))
    assert markdown([row], ["a", "b", "ME"]) == (
        "| task | measure | questions | a | b | ME |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| t | accuracy | 4 x 2 | 50.0% ± 28.9 | 0.0% ± 0.0 | 62.5% ± 23.9 (+12.5 ± 12.5) |"
    )


def test_differences_are_paired() -> None:
    """VOTE is right in three questions of four, and ME in these and the fourth."""
    made = [record(q, "ME", True) for q in "1234"] + [record(q, "VOTE", q != "4") for q in "1234"]
    (row,) = tabulate(made, ["ME", "VOTE"], [])
    # Differences of 0, 0, 0, 1 from 1/4: squares 1, 1, 1, 9 in 16ths.
    assert row.differences == {"ME - VOTE": Figure(0.25, pytest.approx(math.sqrt(12 / 16 / 3 / 4)))}
    assert row.cells["VOTE"] == Cell(0.75, pytest.approx(math.sqrt(12 / 16 / 3 / 4)))
    assert markdown([row], ["ME", "VOTE"]).splitlines()[-3:] == [
        "| task | paired differences | ME - VOTE |",
        "| --- | --- | --- |",
        "| t | accuracy | +25.0 ± 25.0 |",
    ]


def test_costs_are_plain_means_without_a_gain() -> None:
    made = [record(q, arm, True, tokens=1000.0 * int(q), seconds=0.25) for arm in ("a", "ME") for q in "13"]
    accuracy, tokens, seconds = tabulate(made, ["a", "ME"], ["a"])
    assert (accuracy.measure, tokens.measure, seconds.measure) == ("accuracy", "tokens", "seconds")
    assert tokens.cells["ME"] == Cell(2000.0, pytest.approx(1000.0))
    lines = markdown([accuracy, tokens, seconds], ["a", "ME"]).splitlines()
    assert lines[2:] == [
        "| t | accuracy | 2 | 100.0% ± 0.0 | 100.0% ± 0.0 (+0.0 ± 0.0) |",
        "| t | tokens | 2 | 2,000.0 ± 1,000.0 | 2,000.0 ± 1,000.0 |",
        "| t | seconds | 2 | 0.25 ± 0.00 | 0.25 ± 0.00 |",
    ]


def test_one_question_has_no_standard_error() -> None:
    rows = tabulate([record("1", "a", True)], ["a"], ["a"])
    assert rows == [Row("t", "accuracy", 1, 1, {"a": Cell(1.0, None)})]
    assert markdown(rows, ["a"]).endswith("| t | accuracy | 1 | 100.0% |")
