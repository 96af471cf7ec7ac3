"""What a task of an evaluation is: its questions, how they are put to a model, and how a reply or a choice is judged.

A task is pure: it reads files and makes and judges texts, and knows neither ensembles nor how replies are sampled.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from me_local.errors import InputError
from me_local.jsonl import read_objects, text_of
from me_local.text.messages import Message


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its right answer, and with the solved examples that go before it.

    `answer` has the form in which `Task.extract` gives a reply's: a letter for a question with `choices` (their
    texts, from A on), otherwise a number or a text. `group` is the subject of MMLU and the subtask of BIG-Bench Hard.
    `solution` is what an example answers: the assistant's turn. `examples` is empty for zero-shot.
    """

    id: str
    text: str
    answer: str
    group: str = ""
    choices: tuple[str, ...] = ()
    solution: str = ""
    examples: tuple["Question", ...] = ()


@dataclass(frozen=True, slots=True)
class Scoring:
    """What to score by likelihood: each of `continuations`, after the raw text `prompt`, without a chat template.

    Each continuation begins with a space, and they are in the order of the choices.
    """

    prompt: str
    continuations: tuple[str, ...]

    def best(self, log_likelihoods: Sequence[float], *, normalised: bool = False) -> str:
        """The letter of the likeliest choice, the first of equals.

        `log_likelihoods`, in nats, are those of the continuations. `normalised` divides each by the number of
        characters of its choice, without the space in front: `acc_norm` of lm-evaluation-harness.
        """
        scored = zip(log_likelihoods, self.continuations, strict=True)
        scores = [value / (len(text) - 1 if normalised else 1) for value, text in scored]
        return letter_of(scores.index(max(scores)))


Parse = Callable[[dict[str, Any], str, str], Question]
"""Makes a question of a row, its id and its place, as errors name it. Raises InputError."""

Examples = Mapping[str, tuple[Question, ...]]
"""Solved examples, by the `group` of the questions that they go before."""


@dataclass(frozen=True, slots=True)
class Own:
    """What a task of a user's own says besides: the limits of replies, where it has any.

    `digest` is one of all that the task is made of, so that a changed task is known from what it was.
    """

    digest: str
    max_tokens: int | None = None
    stop: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark.

    `questions_file` and `examples_file` (BIG-Bench Hard: a folder) are names in the folder of the data; the docstring
    of the task's module says what they hold. `scoring` is None where answers are no choices.

    `extract(question, reply)` is the answer that a reply gives, in the form of `Question.answer`, as far as it has
    one: where a box holds nothing of that form, what it holds, and None where no answer is found. `same` says whether
    two answers count as one; `own` is None for tasks that come with me-local.
    """

    name: str
    description: str
    questions_file: str
    examples_file: str
    read: Callable[[Path], list[Question]]
    read_examples: Callable[[Path], Examples]
    messages: Callable[[Question], tuple[Message, ...]]
    extract: Callable[[Question, str], str | None]
    scoring: Callable[[Question], Scoring] | None = None
    same: Callable[[str, str], bool] = operator.eq
    own: Own | None = None

    def correct(self, question: Question, reply: str) -> bool:
        """Whether the reply gives the right answer."""
        return self.right(question, self.extract(question, reply))

    def right(self, question: Question, found: str | None) -> bool:
        """Whether an answer that was found is the right one."""
        return found is not None and self.same(found, question.answer)


def read_questions(task: Task, folder: Path, *, few_shot: bool = False) -> list[Question]:
    """All questions of a task, in the order of its file; with `few_shot`, with their examples.

    Raises InputError that names file and line, for data that cannot be used and for questions without examples.
    """
    questions = task.read(folder / task.questions_file)
    if not few_shot:
        return questions
    path = folder / task.examples_file
    examples = task.read_examples(path)
    for question in questions:
        if question.group not in examples:
            raise InputError(f'{path}: no examples for "{question.group}", which {question.id} belongs to')
    return [replace(question, examples=examples[question.group]) for question in questions]


def read_rows(path: Path, parse: Parse) -> list[Question]:
    """The questions of a JSON Lines file, whose ids must differ. Raises InputError that names file and line."""
    return list(_unique(path, parse))


def _unique(path: Path, parse: Parse) -> Iterator[Question]:
    seen: set[str] = set()
    for where, row in read_objects(path):
        id_ = text_of(row, "id", where)
        if id_ in seen:
            raise InputError(f'{where}: the id "{id_}" stands on an earlier line too')
        seen.add(id_)
        yield parse(row, id_, where)


def turns(question: Question, ask: Callable[[Question], str]) -> tuple[Message, ...]:
    """A conversation that ends with the question, its examples being earlier turns.

    Turns, because a chat model has seen dialogues, not lists of solved problems: lm-evaluation-harness does the same
    (`fewshot_as_multiturn`) where it applies chat templates.
    """
    shown = [m for e in question.examples for m in (Message("user", ask(e)), Message("assistant", e.solution))]
    return (*shown, Message("user", ask(question)))


def letter_of(index: int) -> str:
    """The letter of the choice at `index`: A for 0."""
    return chr(ord("A") + index)
