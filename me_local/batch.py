"""Many prompts, read from a JSON Lines file, and a record made for each reply as soon as it is there.

An input line is an object with `prompt` (a text) or `messages` (objects with `role` and `content`), and optionally
`id`, `seed`, `max_tokens`, and one of `json_schema`, `json_object`, `regex`, `choice` and `grammar`, which say what the
reply has to be; without an id, a line's number is its id. A line that cannot be used becomes an error record, and the
run goes on.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, get_args

from me_local.asking import Ask
from me_local.chat import parse_messages
from me_local.config import Constraint, ConstraintKind, Overrides
from me_local.ensemble import Ensemble
from me_local.errors import InputError
from me_local.jsonl import parse_object
from me_local.mixture.routing import Stretch
from me_local.records import Kind, route_record, stretch_of
from me_local.text import constraints
from me_local.text.messages import Message

_CONSTRAINTS = get_args(ConstraintKind)
_KEYS = ("id", "prompt", "messages", "seed", "max_tokens", *_CONSTRAINTS)

RECORDS = Kind((("text", "finish_reason"), ("error",)))
"""What `run` makes."""


@dataclass(frozen=True, slots=True)
class Job:
    """One line of the input: a prompt or a conversation with its settings, or the reason why it is none."""

    id: str | int
    prompt: str | tuple[Message, ...] = ""
    overrides: Overrides = field(default_factory=Overrides)
    error: str | None = None


def read_jobs(source: IO[bytes], name: str) -> Iterator[Job]:
    """The jobs of a JSON Lines file, one for each line that is not blank. `name` stands for it in errors."""
    seen: set[str | int] = set()
    for number, line in enumerate(source, start=1):
        if not line.strip():
            continue
        job = _parse(line, number, f"{name}, line {number}")
        if job.id in seen:
            job = Job(job.id, error=f"{name}, line {number}: the id {job.id!r} stands on an earlier line too")
        seen.add(job.id)
        yield job


def run(
    ensemble: Ensemble, jobs: Sequence[Job], done: Mapping[str | int, Stretch | None], *, raw: bool
) -> Iterator[dict[str, Any]]:
    """A record for each job that is not `done`: `id` with the reply's `as_dict`, or `id` with `error`.

    They come in the order in which they are finished, those of jobs that are none at the end. Where the route was
    shared, `route` has the part of it that the reply took, so that a run can be continued as if it had not been
    interrupted.
    """
    earlier = {i: None if job.error else done[job.id] for i, job in enumerate(jobs) if job.error or job.id in done}
    asks = [Ask(job.prompt, job.overrides) for job in jobs]
    for finished in ensemble.generate_many(asks, raw=raw, earlier=earlier):
        record: dict[str, Any] = {"id": jobs[finished.index].id}
        record |= finished.reply.as_dict() if finished.reply else {"error": str(finished.error)}
        yield record | route_record(finished.stretch)
    # One that repeats an id comes after the reply to the first, which would otherwise count as done when it is not.
    yield from ({"id": job.id, "error": job.error} for job in jobs if job.error and job.id not in done)


def finished_jobs(records: Iterable[dict[str, Any]]) -> dict[str | int, Stretch | None]:
    """The ids of the records of an earlier run, with the part of its route that the replies took."""
    return {record["id"]: stretch_of(record) for record in records}


def _parse(line: bytes, number: int, where: str) -> Job:
    id_: str | int = number
    try:
        record = _record(line, where)
        given = number if record.get("id") is None else record["id"]
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise InputError(f"{where}: id: must be a text or an integer, got {json.dumps(given)}")
        id_ = given
        return Job(id_, _prompt(record, where), _overrides(record, where))
    except InputError as error:
        return Job(id_, error=str(error))


def _record(line: bytes, where: str) -> dict[str, Any]:
    record = parse_object(line, where)
    unknown = [key for key in record if key not in _KEYS]
    if unknown:
        raise InputError(f'{where}: unknown key "{unknown[0]}"; there are {", ".join(_KEYS)}')
    return record


def _prompt(record: dict[str, Any], where: str) -> str | tuple[Message, ...]:
    if ("prompt" in record) == ("messages" in record):
        raise InputError(f'{where}: either "prompt" or "messages" is needed')
    if "messages" in record:
        try:
            return tuple(parse_messages(record["messages"]))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if not isinstance(record["prompt"], str):
        raise InputError(f"{where}: prompt: must be a text")
    return record["prompt"]


def _overrides(record: dict[str, Any], where: str) -> Overrides:
    for key in ("seed", "max_tokens"):
        value = record.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise InputError(f"{where}: {key}: must be an integer of at least 0, got {json.dumps(value)}")
    constraint = _constraint(record, where)
    return Overrides(seed=record.get("seed"), max_tokens=record.get("max_tokens"), constraint=constraint)


def _constraint(record: dict[str, Any], where: str) -> Constraint | None:
    """What the reply has to be; null and false ask for nothing, as a schema that is false would."""
    asked = [kind for kind in _CONSTRAINTS if record.get(kind) not in (None, False)]
    if not asked:
        return None
    if len(asked) > 1:
        raise InputError(f"{where}: {asked[0]} and {asked[1]} do not go together")
    kind, value = asked[0], record[asked[0]]
    if kind == "json_object" and value is not True:
        raise InputError(f"{where}: json_object: must be true")
    if kind in ("regex", "grammar") and not isinstance(value, str):
        raise InputError(f"{where}: {kind}: must be a text")
    text = value if isinstance(value, str) and kind != "choice" else json.dumps(value)
    constraint = Constraint(kind, "" if kind == "json_object" else text)
    try:
        constraints.start(constraint)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return constraint
