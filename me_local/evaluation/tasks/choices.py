r"""What the multiple-choice tasks share: reading choices, asking for a letter, and finding it.

The prompt is the paper's, in other words: the instruction, a blank line, the question, "Options:" and a line for each
choice. Choices are (A), (B), … by their position whatever labels the data have. (The authors' code shows ARC's labels
1 to 4 as they are, and looks for A to D in the reply.)

Few-shot examples of these tasks have no reasoning to show, so where there are some, none is asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from me_local.errors import InputError
from me_local.evaluation.tasks.answers import letter
from me_local.evaluation.tasks.task import Question, letter_of, turns
from me_local.jsonl import checked_text
from me_local.text.messages import Message

_ANSWER = "the final answer (the letter of your choice, such as (A), (B) or (C)) into \\boxed{}."
_STEPS = f"Reason step by step, then put {_ANSWER}"
_DIRECT = f"Put {_ANSWER}"
_MOST = 26


def read_choices(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The field `choices`: 2 to 26 texts. Raises InputError."""
    listed = row.get("choices")
    if not isinstance(listed, list) or not 2 <= len(listed) <= _MOST:
        raise InputError(f"{where}: choices: must be a list of 2 to {_MOST} texts, got {json.dumps(listed)}")
    return tuple(checked_text(choice, f"choices[{i}]", where) for i, choice in enumerate(listed))


def as_example(question: Question) -> Question:
    """The question with its answer as the solution."""
    return replace(question, solution=f"\\boxed{{({question.answer})}}")


def messages(question: Question) -> tuple[Message, ...]:
    """The question with its choices, behind its examples."""
    instruction = _DIRECT if question.examples else _STEPS
    return turns(question, lambda asked: f"{instruction}\n\n{_listed(asked)}")


def extract(question: Question, reply: str) -> str | None:
    """The letter that a reply chooses."""
    return letter(reply, len(question.choices))


def right_choice(question: Question, texts: Sequence[str]) -> str:
    """The one of `texts`, which stand for the choices, that stands for the right one."""
    return next(text for i, text in enumerate(texts) if letter_of(i) == question.answer)


def _listed(question: Question) -> str:
    options = (f"({letter_of(i)}) {choice}" for i, choice in enumerate(question.choices))
    return "\n".join([question.text, "Options:", *options])
