"""The options that say what a reply has to be: JSON, a pattern, one of some texts, or a grammar."""

import json
from pathlib import Path
from typing import Any

import click

from me_local.cli.input import argument_text
from me_local.cli.options import Command, FilePath
from me_local.config import Constraint, ConstraintKind
from me_local.errors import InputError
from me_local.text import constraints

_OPTIONS: dict[ConstraintKind, dict[str, Any]] = {
    "json_schema": {"type": FilePath(), "help": "The reply is JSON that follows the schema in this file."},
    "json_object": {"is_flag": True, "help": "The reply is a JSON object."},
    "regex": {"metavar": "R", "help": "The reply matches this regular expression as a whole."},
    "choice": {"metavar": "A,B,...", "help": "The reply is one of these texts, which commas part."},
    "grammar": {"type": FilePath(), "help": "The reply follows the grammar in this file (GBNF or Lark)."},
}


def constraint_options(command: Command) -> Command:
    """Add them."""
    for kind, attributes in reversed(_OPTIONS.items()):
        command = click.option(_name(kind), kind, **attributes)(command)
    return command


def take_constraint(given: dict[str, Any]) -> Constraint | None:
    """The constraint of the options, which are taken out of those that are given. Raises InputError and UsageError."""
    wanted = {kind: value for kind in _OPTIONS if (value := given.pop(kind)) not in (None, False)}
    if len(wanted) > 1:
        raise click.UsageError(f"{' and '.join(map(_name, wanted))} do not go together")
    for kind, value in wanted.items():
        text, place = _text(kind, value)
        constraint = Constraint(kind, text)
        try:
            constraints.start(constraint)
        except InputError as error:
            raise InputError(f"{place}: {str(error).removeprefix(f'{kind}: ')}") from None
        return constraint
    return None


def _name(kind: ConstraintKind) -> str:
    return "--" + kind.replace("_", "-")


def _text(kind: ConstraintKind, value: Any) -> tuple[str, str]:
    """The text of a constraint, and where it stands."""
    if isinstance(value, Path):
        return _read(value, _name(kind)), f"{_name(kind)}: {value}"
    if kind == "json_object":
        return "", _name(kind)
    text = argument_text(value, _name(kind))
    if kind == "choice":
        text = json.dumps([choice.strip() for choice in text.split(",")])
    return text, _name(kind)


def _read(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(constraints.LONGEST + 1)
    except OSError as error:
        raise InputError(f"{name}: {path}: cannot be read: {error.strerror}") from None
    if len(data) > constraints.LONGEST:
        raise InputError(f"{name}: {path}: has more than {constraints.LONGEST} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: {path}: not UTF-8 at byte {error.start + 1}") from None
