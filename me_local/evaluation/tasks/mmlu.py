"""MMLU (Hendrycks et al. 2021): questions on 57 subjects, each with four choices.

mmlu_test.jsonl, a question per line; `answer` is the place of the right choice, from 0:

    {"id": "…", "subject": "abstract_algebra", "question": "…", "choices": ["0", "4", "2", "6"], "answer": 1}

mmlu_dev.jsonl, the solved examples for few-shot, in the same form: the first five of the question's subject.

Scoring by likelihood is that of lm-evaluation-harness (lm_eval/tasks/mmlu/default): a line that names the subject, the
question, lines "A. …" to "D. …", "Answer:", and the letters as continuations. As there, few-shot examples stand in
front with their letters, and zero-shot is the default (the paper of MMLU itself uses five examples).
"""

import json
from pathlib import Path
from typing import Any

from me_local.errors import InputError
from me_local.evaluation.tasks.choices import as_example, extract, messages, read_choices, right_choice
from me_local.evaluation.tasks.task import Examples, Question, Scoring, Task, letter_of, read_rows
from me_local.jsonl import text_of

_LETTERS = (" A", " B", " C", " D")
_SHOTS = 5


def _read(path: Path) -> list[Question]:
    return read_rows(path, _question)


def _question(row: dict[str, Any], id_: str, where: str) -> Question:
    choices, answer = read_choices(row, where), row.get("answer")
    if len(choices) != len(_LETTERS):
        raise InputError(f"{where}: choices: must be {len(_LETTERS)}, got {len(choices)}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(f"{where}: answer: must be an integer from 0 to {len(choices) - 1}, got {json.dumps(answer)}")
    subject = text_of(row, "subject", where)
    return Question(id_, text_of(row, "question", where), letter_of(answer), subject, choices)


def _read_examples(path: Path) -> Examples:
    by_subject: dict[str, tuple[Question, ...]] = {}
    for question in _read(path):
        shown = by_subject.get(question.group, ())
        by_subject[question.group] = (*shown, as_example(question))[:_SHOTS]
    return by_subject


def _scoring(question: Question) -> Scoring:
    subject = question.group.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {subject}."
    shown = [_scored(example) + right_choice(example, _LETTERS) for example in question.examples]
    return Scoring("\n\n".join([header, *shown, _scored(question)]), _LETTERS)


def _scored(question: Question) -> str:
    lines = (f"{letter_of(i)}. {choice}" for i, choice in enumerate(question.choices))
    return "\n".join([question.text.strip(), *lines, "Answer:"])


TASK = Task(
    name="mmlu",
    description="MMLU: multiple choice on 57 subjects",
    questions_file="mmlu_test.jsonl",
    examples_file="mmlu_dev.jsonl",
    read=_read,
    read_examples=_read_examples,
    messages=messages,
    extract=extract,
    scoring=_scoring,
)
