r"""BIG-Bench Hard (Suzgun et al. 2022): 27 subtasks that language models were worse at than people.

bbh.jsonl, a question per line; `task` is the subtask, `target` the answer:

    {"id": "bbh-navigate-0", "task": "navigate", "input": "…", "target": "No"}

A target is a letter in brackets, which the lines "(A) …" of the input must have; True or False, Yes or No, yes or no,
valid or invalid; an integer; or another text. bbh_cot/SUBTASK.txt, the solved examples for few-shot, are the files of
suzgunmirac/BIG-Bench-Hard, cot-prompts/, as they are: a notice, a line "-----", what the subtask is, and for each
example a blank line, "Q: …" and "A: …", which ends "So the answer is X."

The prompt is the paper's, in other words: the input, and on the next line the instruction, which names the form of the
target. The answer of a reply is found by that form too. What the subtask is opens the first example's question, and
the examples end in a box, so that replies do.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from me_local.errors import InputError
from me_local.evaluation.tasks.answers import box_ending, boxed, letter, number, plain, word
from me_local.evaluation.tasks.task import Examples, Question, Task, letter_of, read_rows, turns
from me_local.jsonl import text_of
from me_local.text.messages import Message

_PAIRS = (("True", "False"), ("Yes", "No"), ("yes", "no"), ("valid", "invalid"))
_OPTION = re.compile(r"^\(([A-Z])\)[ ]?(.*)$", re.MULTILINE)
_LETTER = re.compile(r"\(([A-Z])\)")
_INTEGER = re.compile(r"-?[0-9]+")
_BRACKETS = re.compile(r"[()\[\]{}<> ]+")
# The braces of such an answer need not be balanced: the box ends with the last one.
_BOXED_BRACKETS = re.compile(r"boxed\{([()\[\]{}<>\\ $]+)\}")


def _read(path: Path) -> list[Question]:
    return read_rows(path, _parse)


def _parse(row: dict[str, Any], id_: str, where: str) -> Question:
    subtask, text, target = (text_of(row, key, where) for key in ("task", "input", "target"))
    return _question(id_, subtask, text, target, where)


def _question(id_: str, subtask: str, text: str, target: str, where: str) -> Question:
    if match := _LETTER.fullmatch(target):
        options = _OPTION.findall(text)
        letters = [option for option, _ in options]
        if letters != [letter_of(i) for i in range(len(letters))] or match[1] not in letters:
            raise InputError(f'{where}: target: "{target}" must be one of the options in the input, (A), (B), …')
        return Question(id_, text, match[1], subtask, tuple(choice for _, choice in options))
    answer = number(target) if _INTEGER.fullmatch(target) else plain(target)
    return Question(id_, text, str(answer), subtask)


def _read_examples(path: Path) -> Examples:
    files = sorted(path.glob("*.txt"))
    if not files:
        raise InputError(f"{path}: there are no examples: files SUBTASK.txt in this folder are wanted")
    return {file.stem: _examples(file) for file in files}


def _examples(path: Path) -> tuple[Question, ...]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: cannot be read: {reason}") from None
    _, _, body = text.partition("-----\n")
    description, *listed = body.split("\n\nQ: ")
    if not listed:
        raise InputError(f'{path}: there are no examples: "-----" and then "Q: …" and "A: …" are wanted')
    first, *others = (_example(part, path, i) for i, part in enumerate(listed))
    return (replace(first, text=f"{description.strip()}\n\n{first.text}"), *others)


def _example(part: str, path: Path, index: int) -> Question:
    where = f"{path}, example {index + 1}"
    text, found, solution = part.partition("\nA: ")
    if not found:
        raise InputError(f'{where}: a line that begins with "A: " is missing')
    solution, target = box_ending(solution, where)
    return replace(_question(f"{path.stem}-{index}", path.stem, text, target, where), solution=solution)


def _messages(question: Question) -> tuple[Message, ...]:
    return turns(question, _ask)


def _ask(question: Question) -> str:
    return f"{question.text}\nReason step by step, then put the final answer{_hint(question)} into \\boxed{{}}."


def _hint(question: Question) -> str:
    if question.choices:
        return " (the letter of your choice, such as (A), (B) or (C))"
    pair = _pair(question)
    return f" ({pair[0]} or {pair[1]})" if pair else ""


def _extract(question: Question, reply: str) -> str | None:
    if question.choices:
        return letter(reply, len(question.choices))
    box = boxed(reply)
    text = reply if box is None else box
    if pair := _pair(question):
        return word(text, pair) or box
    if _INTEGER.fullmatch(question.answer):
        return number(text) or box
    if _BRACKETS.fullmatch(question.answer) and (found := _BOXED_BRACKETS.findall(reply)):
        text = found[-1]
    return plain(text) or None


def _pair(question: Question) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if question.answer in pair), None)


TASK = Task(
    name="bbh",
    description="BIG-Bench Hard: 27 subtasks on logic, language and common sense",
    questions_file="bbh.jsonl",
    examples_file="bbh_cot",
    read=_read,
    read_examples=_read_examples,
    messages=_messages,
    extract=_extract,
)
