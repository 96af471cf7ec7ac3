"""A task of one's own: a TOML file that says what is asked, how the answer is found, and which answers are right.

    questions = "capitals.csv"           # beside this file; or .jsonl; the field `id` names a question, else its number
    prompt = "What is the capital of {country}? Answer with its name alone."
    system = "You know geography."       # optional, as are max_tokens, stop and examples
    max_tokens = 20
    stop = ["\n"]

    [answer]
    field = "capital"                    # has the right answer
    find = "text"                        # the whole reply; or "number", "letter", "regex", "json"
    compare = "case-insensitive"         # or "exact", "number"

    [[examples]]                         # solved before each question: fields as questions have them
    country = "Portugal"
    reply = "Lisbon"                     # what is answered; without it the field with the answer

`docs/evaluation.md` describes all keys.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict, TypeAdapter

from me_local.checks import by_rule, require_known
from me_local.errors import ConfigError, InputError
from me_local.evaluation.tasks.judging import Rule, parse_rule
from me_local.evaluation.tasks.rows import Row, Template, read_rows
from me_local.evaluation.tasks.task import Own, Question, Task, letter_of, turns
from me_local.text.messages import Message
from me_local.toml import read_toml

_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[tuple[_Text, ...], BeforeValidator(lambda raw: [raw] if isinstance(raw, str) else raw)]
KEYS: dict[str, Any] = {
    "questions": _Text,
    "prompt": _Text,
    "system": _Text,
    "max_tokens": Annotated[int, Strict(), Field(ge=1, le=2**31 - 1)],
    "stop": _Texts,
    "answer": dict[str, Any],
    "examples": list[dict[str, Any]],
}
_REPLY = "reply"


def read_task(path: Path) -> Task:
    """The task of a file, named as the file is, with its questions read and checked.

    Raises ConfigError that names the file and the key, and InputError that names the line of the questions.
    """
    values = _values(path)
    rule = parse_rule(values.get("answer", {}), f"{path}: [answer]")
    listed = rule.choices if isinstance(rule.choices, str) else None
    template = Template.parse(values["prompt"], f"{path}: prompt", listed)
    if not template.fields:
        raise ConfigError(f"{path}: prompt: names no field of the questions, such as {{question}}")
    rows = read_rows(path.parent / values["questions"])
    shown = [Row(f"{path}: examples[{i}]", fields) for i, fields in enumerate(values.get("examples", []))]
    examples = tuple(_example(row, template, rule) for row in shown)
    questions = _questions(rows, template, rule, examples)
    system = (Message("system", values["system"]),) if "system" in values else ()
    limits = values.get("max_tokens"), values.get("stop")
    return Task(
        name=path.stem,
        description="a task of one's own",
        questions_file=str(path),
        examples_file="",
        read=lambda _: questions,
        read_examples=lambda _: {},
        messages=lambda question: (*system, *turns(question, lambda asked: asked.text)),
        extract=lambda question, reply: rule.extract(reply, len(question.choices)),
        same=rule.same,
        own=Own(_digest(questions, system, rule, *limits), *limits),
    )


def _values(path: Path) -> dict[str, Any]:
    document = read_toml(path)
    for key in document:
        require_known(key, KEYS, f"{path}: ", "key")
    for key in ("questions", "prompt"):
        if key not in document:
            raise ConfigError(f"{path}: {key}: is missing")
    return {key: by_rule(_type(key), value, f"{path}: {key}") for key, value in document.items()}


def _questions(rows: list[Row], template: Template, rule: Rule, examples: tuple[Question, ...]) -> list[Question]:
    made: dict[str, Question] = {}
    for number, row in enumerate(rows, start=1):
        id_ = row.text("id").strip() if "id" in row.fields else str(number)
        if not id_ or id_ in made:
            problem = "is blank" if not id_ else f'"{id_}" stands on an earlier line too'
            raise InputError(f"{row.where}: id: {problem}")
        answer, count = rule.right(row)
        choices = tuple(letter_of(i) for i in range(count))
        made[id_] = Question(id_, _asked(template, row), answer, choices=choices, examples=examples)
    return list(made.values())


def _example(row: Row, template: Template, rule: Rule) -> Question:
    solution = row.text(_REPLY if _REPLY in row.fields else rule.field)
    if not solution.strip():
        raise InputError(f"{row.where}: its {_REPLY} is blank")
    return Question("", _asked(template, row), "", solution=solution)


def _asked(template: Template, row: Row) -> str:
    text = template.fill(row)
    if not text.strip():
        raise InputError(f"{row.where}: the prompt is blank")
    return text


def _digest(*parts: object) -> str:
    """One of what is asked and of how replies are judged, however the two files say it."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@cache
def _type(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(KEYS[key])
