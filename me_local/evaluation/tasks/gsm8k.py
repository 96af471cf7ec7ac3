r"""GSM8K (Cobbe et al. 2021): word problems of school mathematics, answered by a number.

gsm8k_test.jsonl, a problem per line, as openai/grade-school-math has them, with an id:

    {"id": "gsm8k-test-0", "question": "…", "answer": "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18"}

`answer` ends with `####` and the number. gsm8k_fewshot.jsonl, the solved examples for few-shot: the same, but `answer`
ends with "The answer is 18."; all of them are shown, in the file's order. (Commonly the eight of Wei et al. 2022, which
lm-evaluation-harness has in gsm8k-cot.yaml.)

The prompt is the paper's, in other words: the instruction, a blank line, the problem. The answer of a reply is its last
number, in a box or not.
"""

import re
from pathlib import Path
from typing import Any

from me_local.errors import InputError
from me_local.evaluation.tasks.answers import box_ending, number
from me_local.evaluation.tasks.task import Examples, Question, Task, read_rows, turns
from me_local.jsonl import text_of
from me_local.text.messages import Message

_INSTRUCTION = "Reason step by step, then put the final answer into \\boxed{}."
_TARGET = re.compile(r"####[ ]*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*\Z")


def _read(path: Path) -> list[Question]:
    return read_rows(path, _question)


def _question(row: dict[str, Any], id_: str, where: str) -> Question:
    target = _TARGET.search(text_of(row, "answer", where))
    if target is None:
        raise InputError(f"{where}: answer: must end with #### and a number")
    return Question(id_, text_of(row, "question", where), str(number(target[1])))


def _read_examples(path: Path) -> Examples:
    return {"": tuple(read_rows(path, _example))}


def _example(row: dict[str, Any], id_: str, where: str) -> Question:
    solution, target = box_ending(text_of(row, "answer", where), where)
    answer = number(target)
    if answer is None:
        raise InputError(f"{where}: answer: must end with a number")
    return Question(id_, text_of(row, "question", where), answer, solution=solution)


def _messages(question: Question) -> tuple[Message, ...]:
    return turns(question, lambda asked: f"{_INSTRUCTION}\n\n{asked.text}")


def _extract(question: Question, reply: str) -> str | None:
    return number(reply)


TASK = Task(
    name="gsm8k",
    description="GSM8K: word problems of school mathematics",
    questions_file="gsm8k_test.jsonl",
    examples_file="gsm8k_fewshot.jsonl",
    read=_read,
    read_examples=_read_examples,
    messages=_messages,
    extract=_extract,
)
