"""Questions with right answers, put to an ensemble and to its members alone.

Two methods make records: `Likelihood` scores the choices of a question, `Sampling` draws replies, as the paper does.
A record is an object with `id`; `question`, `task` and `settings`; and `correct`: for each measure of the method and
each arm (a member alone, or the ensemble in some way) whether its answer is right. That of a sampled reply has its
`cost`: the pieces; the evaluations, which are predictions of members; the tokens that go through members, prompts
included as if no cache held any of them; and the seconds since the reply before it was finished, which add up to
what an arm takes also where several replies are made at once. Tables are made of records alone.
"""

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from me_local.asking import Ask
from me_local.config import Overrides, Strategy
from me_local.decoding.likelihoods import Score
from me_local.decoding.reply import Reply
from me_local.ensemble import Ensemble
from me_local.errors import ConfigError, InputError, RunError
from me_local.evaluation.tables import ACCURACY, COSTS, PER_CHARACTER, Record
from me_local.evaluation.tasks import Question, Task
from me_local.evaluation.voting import vote
from me_local.records import route_record, stretch_of
from me_local.sampling import Sampling as Shape

ENSEMBLE = "ensemble"
VOTE = "VOTE"
MAX_TOKENS = 512
TOP_K = 10
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

    def conclusions(self, jobs: Sequence[Job], records: Mapping[str, Record]) -> Iterator[Record]:
        """The records that follow from those of all jobs, without a model."""


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

    def conclusions(self, jobs: Sequence[Job], records: Mapping[str, Record]) -> Iterator[Record]:
        """None."""
        return iter(())

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
    """Draws replies, `runs` for each question and arm.

    `weights` are the members', by their names; `strategies` are "members" (each alone), "me", "ce", "union" and "vote",
    which is the weighted majority of the members that have a weight: these then answer alone, too. The protocol is that
    of the paper, up to 512 pieces at temperature 1 from the `top_k` likeliest tokens (10 by default). A task of one's
    own has its own limits, and the sampling of models.toml, but for a `top_k`. What is looked into is the answer of a
    reply, behind its thought.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        strategies: Sequence[str],
        runs: int,
        top_k: int | None,
        settings: dict[str, Any],
    ) -> None:
        ensembles = tuple(name.upper() for name in strategies if name != "members")
        self._voters = {name: weight for name, weight in weights.items() if weight} if VOTE in ensembles else {}
        self._singles = tuple(weights if "members" in strategies else self._voters)
        self.arms = _arms(self._singles, ensembles)
        self._runs, self._top_k = runs, top_k
        self.settings = {"method": "sampling", "top_k": top_k, "max_tokens": MAX_TOKENS} | settings

    def jobs(self, task: Task, questions: Sequence[Question]) -> Iterator[Job]:
        """All of a question one after the other: its prompt is evaluated once."""
        for question in questions:
            for arm in self.arms:
                if arm != VOTE:
                    yield from (Job(task, question, arm, run) for run in range(self._runs))

    def records(self, ensemble: Ensemble, jobs: Sequence[Job], done: Mapping[str, Record]) -> Iterator[Record]:
        """The replies, the answers that were found in them, whether these are right, and what they took.

        One arm after the other, because replies at once are quick where all of them need the same member.
        """
        for arm in self.arms:
            by_task: dict[str, list[Job]] = {}
            for job in jobs:
                if job.arm == arm:
                    by_task.setdefault(job.task.name, []).append(job)
            for of_arm in by_task.values():
                yield from self._replies(ensemble, of_arm, done)

    def conclusions(self, jobs: Sequence[Job], records: Mapping[str, Record]) -> Iterator[Record]:
        """The votes on what the members answered alone: one for each question and run."""
        for job in jobs:
            if self._voters and job.arm == next(iter(self._voters)):
                ballots = {name: records[replace(job, arm=name).id] for name in self._voters}
                yield self._vote(replace(job, arm=VOTE), ballots)

    def _replies(self, ensemble: Ensemble, jobs: Sequence[Job], done: Mapping[str, Record]) -> Iterator[Record]:
        """The records of jobs of one arm and one task."""
        earlier = {i: stretch_of(done[job.id]) for i, job in enumerate(jobs) if job.id in done}
        asks = [Ask(job.task.messages(job.question), Overrides(seed=_seed(job))) for job in jobs]
        overrides = self._overrides(ensemble.names, jobs[0].task, jobs[0].arm)
        since = time.perf_counter()
        for finished in ensemble.generate_many(asks, overrides, earlier=earlier):
            job = jobs[finished.index]
            if isinstance(finished.error, InputError):
                raise InputError(f"{job.task.name}, question {job.question.id}: {finished.error}")
            if finished.reply is None:
                raise finished.error or RunError("the reply is missing")
            seconds = time.perf_counter() - since
            yield self._record(job, finished.reply, seconds) | route_record(finished.stretch)
            since = time.perf_counter()

    def _overrides(self, names: Sequence[str], task: Task, arm: str) -> Overrides:
        shared = Overrides(
            strategy=_STRATEGIES.get(arm, "me"),
            weights={name: float(name == arm) for name in names} if arm in self._singles else None,
            seed=zlib.crc32(f"{task.name}/{arm}".encode()),  # of the route
            top_k=self._top_k,
        )
        if task.own:
            return replace(shared, max_tokens=task.own.max_tokens, stop=task.own.stop)
        top_k = TOP_K if self._top_k is None else self._top_k
        paper = asdict(Shape(top_k=top_k))
        return replace(shared, **paper, max_tokens=MAX_TOKENS, min_tokens=0, ignore_eos=False)

    def _record(self, job: Job, reply: Reply, seconds: float) -> Record:
        found = job.task.extract(job.question, reply.answer)
        return _sampled(job, self.settings, found) | {
            "seed": reply.seed,
            "finish_reason": reply.finish_reason,
            "cost": _cost(reply, seconds),
            "reply": reply.answer,
            "thought": reply.thought,
        }

    def _vote(self, job: Job, ballots: Mapping[str, Record]) -> Record:
        name = f"{job.task.name}/{job.question.id}/{job.run}"
        answers = {member: ballot["found"] for member, ballot in ballots.items()}
        decided = vote(answers, self._voters, job.task.same, name)
        return _sampled(job, self.settings, decided.winner) | {
            "votes": decided.weights,
            "drawn": decided.drawn,
            "cost": {key: sum(ballot["cost"][key] for ballot in ballots.values()) for key in COSTS},
        }


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` of the questions, evenly spread: files are sorted by subject."""
    count = len(questions) if limit is None else min(limit, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


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


def _sampled(job: Job, settings: dict[str, Any], found: str | None) -> Record:
    """What the records of replies and of votes have in common."""
    return _record(job, settings) | {
        "arm": job.arm,
        "run": job.run,
        "answer": job.question.answer,
        "found": found,
        "correct": {ACCURACY: {job.arm: job.task.right(job.question, found)}},
    }


def _cost(reply: Reply, seconds: float) -> dict[str, float]:
    ran = [usage for usage in reply.usage if usage.calls]
    return {
        "pieces": len(reply.steps),
        "evaluations": sum(usage.calls for usage in ran),
        "tokens": sum(usage.prompt_length + usage.text_evaluated for usage in ran),
        "seconds": seconds,
    }


def _arms(names: Sequence[str], ensembles: tuple[str, ...]) -> tuple[str, ...]:
    taken = set(names) & set(ensembles)
    if taken:
        raise ConfigError(f'member "{taken.pop()}": the tables use this name for the ensemble: rename the member')
    return (*names, *ensembles)
