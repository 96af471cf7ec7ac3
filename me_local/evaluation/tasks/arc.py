"""ARC (Clark et al. 2018): questions of natural science for schools, in a challenging and an easy set.

arc_challenge_test.jsonl and arc_easy_test.jsonl, a question per line; `answer` is one of `labels`, which are unique and
as many as the choices (in the public sets A to E, or 1 to 4):

    {"id": "Mercury_7175875", "question": "…", "choices": ["…", "…", "…"], "labels": ["A", "B", "C"], "answer": "C"}

arc_challenge_train.jsonl and arc_easy_train.jsonl, the solved examples for few-shot, in the same form: the first five.

Scoring by likelihood is that of lm-evaluation-harness (lm_eval/tasks/arc): "Question: …", "Answer:", and the texts of
the choices as continuations; accuracy by the likelihood, and by that per character. As there, few-shot examples stand
in front with the text of the right choice; there one says how many, and leaderboards commonly take 25, drawn by chance.
"""

import json
from pathlib import Path
from typing import Any

from me_local.errors import InputError
from me_local.evaluation.tasks.choices import as_example, extract, messages, read_choices, right_choice
from me_local.evaluation.tasks.task import Examples, Question, Scoring, Task, letter_of, read_rows
from me_local.jsonl import text_of

_SHOTS = 5


def _read(path: Path) -> list[Question]:
    return read_rows(path, _question)


def _question(row: dict[str, Any], id_: str, where: str) -> Question:
    choices, labels, answer = read_choices(row, where), row.get("labels"), text_of(row, "answer", where)
    if not isinstance(labels, list) or len(labels) != len(choices) or not all(isinstance(x, str) for x in labels):
        raise InputError(f"{where}: labels: must be a list of {len(choices)} texts, one per choice")
    if labels.count(answer) != 1:
        raise InputError(f'{where}: answer: "{answer}" must be one of the labels, once: {json.dumps(labels)}')
    return Question(id_, text_of(row, "question", where), letter_of(labels.index(answer)), choices=choices)


def _read_examples(path: Path) -> Examples:
    return {"": tuple(map(as_example, _read(path)[:_SHOTS]))}


def _scoring(question: Question) -> Scoring:
    shown = [_scored(example) + right_choice(example, _continuations(example)) for example in question.examples]
    return Scoring("\n\n".join([*shown, _scored(question)]), _continuations(question))


def _scored(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"


def _continuations(question: Question) -> tuple[str, ...]:
    return tuple(f" {choice}" for choice in question.choices)


def _task(name: str, description: str) -> Task:
    return Task(
        name=name,
        description=description,
        questions_file=f"{name}_test.jsonl",
        examples_file=f"{name}_train.jsonl",
        read=_read,
        read_examples=_read_examples,
        messages=messages,
        extract=extract,
        scoring=_scoring,
    )


CHALLENGE = _task("arc_challenge", "ARC-Challenge: multiple choice on science at school")
EASY = _task("arc_easy", "ARC-Easy: multiple choice on science at school, the easy ones")
