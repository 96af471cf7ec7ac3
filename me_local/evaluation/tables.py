"""Tables of an evaluation, made of its records alone: means over questions, and paired differences, with their errors.

A standard error is that of choosing the questions (and of sampling, where replies are sampled): the spread of the
questions' values, each the mean of its runs, over the root of their number. Differences are taken question by question
before, so that what makes a question hard for all does not count. A single question has no error.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from me_local.arrays import FloatArray

Record = dict[str, Any]

ACCURACY = "accuracy"
PER_CHARACTER = "per character"
COSTS = ("pieces", "evaluations", "tokens", "seconds")
"""The measures of what a reply takes; all others are shares of right answers."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over questions, and its standard error."""

    mean: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Cell:
    """The figure of one arm.

    `gain` is the accuracy over that of the member that is right most often; None for members, and for costs.
    """

    mean: float
    error: float | None
    gain: Figure | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of all arms at one task, by one measure; `questions` and `runs` count what they are means of.

    `differences` are those between the arms that are no members, "ME - CE" and so on.
    """

    task: str
    measure: str
    questions: int
    runs: int
    cells: dict[str, Cell]
    differences: dict[str, Figure] = field(default_factory=dict)


def tabulate(records: Sequence[Record], arms: Sequence[str], singles: Sequence[str]) -> list[Row]:
    """A row for each task and measure, in the order of the records; `singles` are the arms that are members alone.

    Where two accuracies of a task agree in all figures (choices of MMLU are single letters), the second has no row.
    """
    found: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: {arm: defaultdict(list) for arm in arms}
    )
    for record in records:
        task, question = record["task"], record["question"]
        for measure, by_arm in record["correct"].items():
            for arm, correct in by_arm.items():
                found[task, measure][arm][question].append(correct)
        for measure, value in record.get("cost", {}).items():
            found[task, measure][record["arm"]][question].append(value)
    rows = [_row(*key, by_arm, singles) for key, by_arm in found.items()]
    return [row for i, row in enumerate(rows) if row.measure != PER_CHARACTER or row.cells != rows[i - 1].cells]


def _row(task: str, measure: str, by_arm: Mapping[str, Mapping[str, list[float]]], singles: Sequence[str]) -> Row:
    means = {
        arm: np.array([np.mean(runs) for _, runs in sorted(questions.items())])
        for arm, questions in by_arm.items()
        if questions
    }
    members = (means[single] for single in singles if single in means and measure not in COSTS)
    best = max(members, key=lambda values: values.mean(), default=None)
    cells: dict[str, Cell] = {}
    for arm, values in means.items():
        gain = None if best is None or arm in singles else _difference(values, best)
        figure = _figure(values)
        cells[arm] = Cell(figure.mean, figure.error, gain)
    pairs = combinations([arm for arm in means if arm not in singles], 2)
    differences = {f"{a} - {b}": _difference(means[a], means[b]) for a, b in pairs}
    questions = max(map(len, means.values()))
    runs = max(len(values) for questions_ in by_arm.values() for values in questions_.values())
    return Row(task, measure, questions, runs, cells, differences)


def _difference(values: FloatArray, others: FloatArray) -> Figure:
    assert len(values) == len(others), "all arms have all questions"
    return _figure(values - others)


def _figure(values: FloatArray) -> Figure:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Figure(float(values.mean()), error)


def markdown(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """The rows as Markdown tables: figures ± standard errors, accuracies in per cent with the gain over the best
    member; and the paired differences of accuracies, where there are any.
    """
    lines = [["task", "measure", "questions", *arms]]
    for row in rows:
        questions = f"{row.questions:,}" + (f" x {row.runs}" if row.runs > 1 else "")
        lines.append([row.task, row.measure, questions, *(_cell(row, row.cells.get(arm)) for arm in arms)])
    rows = [row for row in rows if row.measure not in COSTS]
    pairs = list(dict.fromkeys(pair for row in rows for pair in row.differences))
    if not pairs:
        return _table(lines)
    differences = [[row.task, row.measure, *(_signed(row, row.differences[pair]) for pair in pairs)] for row in rows]
    return _table(lines) + "\n\n" + _table([["task", "paired differences", *pairs], *differences])


def _table(lines: Sequence[Sequence[str]]) -> str:
    header, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rest])


def _cell(row: Row, cell: Cell | None) -> str:
    if cell is None:
        return ""
    scale, digits = _form(row.measure)
    percent = "" if row.measure in COSTS else "%"
    text = f"{scale * cell.mean:,.{digits}f}{percent}"
    text += "" if cell.error is None else f" ± {scale * cell.error:,.{digits}f}"
    return text + (f" ({_signed(row, cell.gain)})" if cell.gain else "")


def _signed(row: Row, figure: Figure) -> str:
    scale, digits = _form(row.measure)
    text = f"{scale * figure.mean:+,.{digits}f}"
    return text + ("" if figure.error is None else f" ± {scale * figure.error:,.{digits}f}")


def _form(measure: str) -> tuple[int, int]:
    """By what the figures of a measure are multiplied where they are shown, and how many decimals they have."""
    return (1, 2 if measure == "seconds" else 1) if measure in COSTS else (100, 1)
