"""Questions with right answers, put to an ensemble and to its members alone, and the accuracy of each.

Two methods make records: `Likelihood` scores the choices of a question, `Sampling` draws replies, as the paper does.
A record is an object with `id`; `question`, `task` and `settings`; and `correct`: for each measure of the method and
each arm (a member alone, or the ensemble in some way) whether its answer is right. Tables are made of records alone.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from me_local.asking import Ask
from me_local.config import Overrides, Strategy
from me_local.decoding.likelihoods import Score
from me_local.decoding.reply import Reply
from me_local.ensemble import Ensemble
from me_local.errors import ConfigError, InputError, RunError
from me_local.evaluation.tasks import Question, Task
from me_local.records import route_record, stretch_of

Record = dict[str, Any]

ENSEMBLE = "ensemble"
ACCURACY = "accuracy"
PER_CHARACTER = "per character"
MAX_TOKENS = 512
_STRATEGIES: dict[str, Strategy] = {"ME": "me", "CE": "ce", "UNION": "union"}


@dataclass(frozen=True, slots=True)
class Job:
    """One record to be made: a question, and for sampled replies by which arm and in which run."""

    task: Task
    question: Question
    arm: str = ""
    run: int = 0

    @property
    def id(self) -> str:
        """Names the record."""
        name = f"{self.task.name}/{self.question.id}"
        return f"{name}/{self.arm}/{self.run}" if self.arm else name


class Method(Protocol):
    """How questions are put.

    `arms` are the columns of its tables, the members alone first; `settings` is what records must have in common.
    """

    arms: tuple[str, ...]
    settings: dict[str, Any]

    def jobs(self, task: Task, questions: Sequence[Question]) -> Iterator[Job]:
        """The records that questions of a task need."""

    def records(self, ensemble: Ensemble, jobs: Sequence[Job], done: Mapping[str, Record]) -> Iterator[Record]:
        """The records of the jobs that are not `done`, each as soon as it is there.

        Raises InputError that names the question, RunError.
        """


class Likelihood:
    """Scores the choices of a question; the likeliest is the answer.

    `accuracy` is by the likelihood, `per character` by its logarithm per character of the choice. Deterministic.
    """

    def __init__(self, names: Sequence[str], settings: dict[str, Any]) -> None:
        self.arms = _arms(names, (ENSEMBLE,))
        self.settings = {"method": "likelihood"} | settings

    def jobs(self, task: Task, questions: Sequence[Question]) -> Iterator[Job]:
        """One for each question. Raises InputError for a task without choices."""
        if task.scoring is None:
            raise InputError(f'task "{task.name}" has no choices to score: use --method sampling')
        return (Job(task, question) for question in questions)

    def records(self, ensemble: Ensemble, jobs: Sequence[Job], done: Mapping[str, Record]) -> Iterator[Record]:
        """The log-likelihoods of the choices, in nats, and which arms are right."""
        return (self._record(ensemble, job) for job in jobs if job.id not in done)

    def _record(self, ensemble: Ensemble, job: Job) -> Record:
        assert job.task.scoring is not None
        scoring = job.task.scoring(job.question)
        scores = [_scored(ensemble, job, scoring.prompt, text) for text in scoring.continuations]
        columns = list(zip(*[(*score.members, score.log_likelihood) for score in scores], strict=True))
        likelihoods = dict(zip(self.arms, columns, strict=True))
        answer = job.question.answer
        correct = {
            measure: {arm: scoring.best(values, normalised=norm) == answer for arm, values in likelihoods.items()}
            for measure, norm in ((ACCURACY, False), (PER_CHARACTER, True))
        }
        return _record(job, self.settings) | {"answer": answer, "log_likelihoods": likelihoods, "correct": correct}


class Sampling:
    """Draws replies, `runs` for each question and arm: the protocol of the paper.

    Up to 512 pieces at temperature 1 from the `top_k` likeliest tokens; `strategies` are "members" (each alone), "me",
    "ce" and "union". What is looked into is the answer of a reply, behind its thought.
    """

    def __init__(
        self, names: Sequence[str], strategies: Sequence[str], runs: int, top_k: int, settings: dict[str, Any]
    ) -> None:
        ensembles = tuple(name.upper() for name in strategies if name != "members")
        self.arms = _arms(names if "members" in strategies else (), ensembles)
        self._runs, self._top_k = runs, top_k
        self._singles = set(self.arms) - set(ensembles)
        self.settings = {"method": "sampling", "top_k": top_k} | settings

    def jobs(self, task: Task, questions: Sequence[Question]) -> Iterator[Job]:
        """All of a question one after the other: its prompt is evaluated once."""
        for question in questions:
            for arm in self.arms:
                yield from (Job(task, question, arm, run) for run in range(self._runs))

    def records(self, ensemble: Ensemble, jobs: Sequence[Job], done: Mapping[str, Record]) -> Iterator[Record]:
        """The replies, the answers that were found in them, and whether these are right.

        One arm after the other, because replies at once are quick where all of them need the same member.
        """
        for arm in self.arms:
            of_arm = [job for job in jobs if job.arm == arm]
            earlier = {i: stretch_of(done[job.id]) for i, job in enumerate(of_arm) if job.id in done}
            asks = [Ask(job.task.messages(job.question), Overrides(seed=_seed(job))) for job in of_arm]
            overrides = self._overrides(ensemble, arm)
            for finished in ensemble.generate_many(asks, overrides, earlier=earlier):
                job = of_arm[finished.index]
                if isinstance(finished.error, InputError):
                    raise InputError(f"{job.task.name}, question {job.question.id}: {finished.error}")
                if finished.reply is None:
                    raise finished.error or RunError("the reply is missing")
                yield self._record(job, finished.reply) | route_record(finished.stretch)

    def _overrides(self, ensemble: Ensemble, arm: str) -> Overrides:
        return Overrides(
            strategy=_STRATEGIES.get(arm, "me"),
            weights={name: float(name == arm) for name in ensemble.names} if arm in self._singles else None,
            seed=zlib.crc32(arm.encode()),  # of the route
            temperature=1.0,
            top_k=self._top_k,
            top_p=1.0,
            min_p=0.0,
            max_tokens=MAX_TOKENS,
        )

    def _record(self, job: Job, reply: Reply) -> Record:
        return _record(job, self.settings) | {
            "arm": job.arm,
            "run": job.run,
            "seed": reply.seed,
            "answer": job.question.answer,
            "found": job.task.extract(job.question, reply.answer),
            "correct": {ACCURACY: {job.arm: job.task.correct(job.question, reply.answer)}},
            "finish_reason": reply.finish_reason,
            "pieces": len(reply.steps),
            "seconds": reply.seconds,
            "reply": reply.answer,
            "thought": reply.thought,
        }


@dataclass(frozen=True, slots=True)
class Cell:
    """How often one arm is right: `accuracy` and its standard `error`, between 0 and 1.

    `gain` is that over the member that is right most often, with a standard error of its own, as both answered the
    same questions; None for members. The errors are those of choosing questions (and of sampling, where replies are
    sampled), None for a single question.
    """

    accuracy: float
    error: float | None
    gain: float | None = None
    gain_error: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """The accuracies of all arms at one task, by one measure; `questions` and `runs` count what they are means of."""

    task: str
    measure: str
    questions: int
    runs: int
    cells: dict[str, Cell]


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` of the questions, evenly spread: files are sorted by subject."""
    count = len(questions) if limit is None else min(limit, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def tabulate(records: Sequence[Record], arms: Sequence[str], singles: Sequence[str]) -> list[Row]:
    """A row for each task and measure, in the order of the records; `singles` are the arms that are members alone.

    Where two measures of a task agree in all figures (choices of MMLU are single letters), the second has no row.
    """
    found: dict[tuple[str, str], dict[str, dict[str, list[bool]]]] = defaultdict(
        lambda: {arm: defaultdict(list) for arm in arms}
    )
    for record in records:
        for measure, by_arm in record["correct"].items():
            for arm, correct in by_arm.items():
                found[record["task"], measure][arm][record["question"]].append(correct)
    rows = [_row(*key, by_arm, singles) for key, by_arm in found.items()]
    return [
        row for i, row in enumerate(rows) if not i or (row.task, row.cells) != (rows[i - 1].task, rows[i - 1].cells)
    ]


def _row(task: str, measure: str, by_arm: dict[str, dict[str, list[bool]]], singles: Sequence[str]) -> Row:
    shares = {
        arm: np.array([np.mean(runs) for _, runs in sorted(questions.items())]) for arm, questions in by_arm.items()
    }
    best = max(
        (shares[single] for single in singles if len(shares[single])), key=lambda values: values.mean(), default=None
    )
    cells: dict[str, Cell] = {}
    for arm, values in shares.items():
        if not len(values):
            continue
        cell = Cell(float(values.mean()), _error(values))
        if best is not None and arm not in singles and len(best) == len(values):
            cell = Cell(cell.accuracy, cell.error, float((values - best).mean()), _error(values - best))
        cells[arm] = cell
    first = next(iter(by_arm.values()))
    runs = max((len(values) for questions in by_arm.values() for values in questions.values()), default=0)
    return Row(task, measure, len(first), runs, cells)


def markdown(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """The rows as a Markdown table: accuracy ± standard error in per cent, and the gain over the best member."""
    lines = [["task", "measure", "questions", *arms], ["---"] * (3 + len(arms))]
    for row in rows:
        questions = f"{row.questions:,}" + (f" x {row.runs}" if row.runs > 1 else "")
        lines.append([row.task, row.measure, questions, *(_shown(row.cells.get(arm)) for arm in arms)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.accuracy:.1%}" + (f" ± {100 * cell.error:.1f}" if cell.error is not None else "")
    return text + (f" ({100 * cell.gain:+.1f})" if cell.gain is not None else "")


def _seed(job: Job) -> int:
    # Members and strategies must not share random numbers.
    return zlib.crc32(job.id.encode())


def _scored(ensemble: Ensemble, job: Job, prompt: str, continuation: str) -> Score:
    try:
        return ensemble.score(prompt, continuation, raw=True)
    except InputError as error:
        raise InputError(f"{job.task.name}, question {job.question.id}: {error}") from None


def _record(job: Job, settings: dict[str, Any]) -> Record:
    return {"id": job.id, "task": job.task.name, "question": job.question.id, "settings": settings}


def _arms(names: Sequence[str], ensembles: tuple[str, ...]) -> tuple[str, ...]:
    taken = set(names) & set(ensembles)
    if taken:
        raise ConfigError(f'member "{taken.pop()}": the tables use this name for the ensemble: rename the member')
    return (*names, *ensembles)


def _error(values: "np.ndarray[Any, np.dtype[np.float64]]") -> float | None:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
