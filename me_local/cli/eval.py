"""`me-local eval`: does the ensemble answer better than its members?"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import click
from click.shell_completion import CompletionItem

from me_local.cli.display import print_json
from me_local.cli.options import (
    FilePath,
    batch_option,
    described,
    load_many,
    models_option,
    template_option,
    weights_option,
    with_weights,
)
from me_local.cli.progress import progress
from me_local.config import Config, MemberConfig, Overrides, override
from me_local.errors import InputError
from me_local.evaluation.questions import Job, Likelihood, Method, Sampling, spread
from me_local.evaluation.tables import Record, markdown, tabulate
from me_local.evaluation.tasks import TASKS, Task, find_tasks, read_questions
from me_local.records import Kind, open_records, stretch_of, write_record

_RECORDS = Kind((("task", "question", "settings", "correct"),))
_STRATEGIES = ("members", "me", "ce", "vote", "union")
_DEFAULT = "members,me,ce"
_NAMES = ", ".join([*TASKS, "arc"])


def _complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """In a shell: the tasks that the last name of a list begins, else files."""
    before, comma, last = incomplete.rpartition(",")
    names = [before + comma + name for name in (*TASKS, "arc") if name.startswith(last)]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


@click.command(name="eval")
@models_option
@weights_option
@click.option(
    "--task",
    "tasks",
    required=True,
    shell_complete=_complete,
    help=f"A list with commas of {_NAMES} (both sets of ARC), and files FILE.toml of tasks of one's own.",
)
@click.option(
    "--data", type=FilePath(dir_okay=True), help="The folder of the questions; a task of one's own says where its are."
)
@click.option(
    "--method",
    type=click.Choice(["sampling", "likelihood"]),
    default="sampling",
    show_default=True,
    help="likelihood: score the choices of MMLU and ARC; quick, and the same every time.",
)
@click.option("--few-shot", is_flag=True, help="Show solved examples before each question.")
@click.option("--limit", type=click.IntRange(1), help="Questions of each task, evenly spread over its file.")
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="Replies to each question.")
@click.option(
    "--strategies",
    default=_DEFAULT,
    show_default=True,
    help="Who replies: members (each alone), me, ce, vote (the weighted majority of the members' own answers), union "
    "(ce as UniTE does it; me cannot have its distribution).",
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    help="For replies, as in generate; else 10, and models.toml's for tasks of one's own.",
)
@template_option
@click.option("--output", type=FilePath(), help="Where a record per answer goes.")
@click.option("--resume", is_flag=True, help="Go on after the records that --output already has.")
@batch_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def evaluate(
    models: Path,
    weights: str | None,
    tasks: str,
    data: Path | None,
    method: str,
    few_shot: bool,
    limit: int | None,
    runs: int,
    strategies: str,
    top_k: int | None,
    template_args: dict[str, object] | None,
    output: Path | None,
    resume: bool,
    batch: str | None,
    as_json: bool,
) -> None:
    """Put questions with known answers to the ensemble and to each member alone, and print who is right how often.

    Replies are sampled as in the paper: up to 512 pieces at temperature 1, no top-p; to a task of one's own, as
    models.toml says. Accuracies are in per cent, ± a standard error, with the gain over the best member in parentheses;
    pieces, evaluations, tokens and seconds are those of a reply.
    """
    _require_partners(method, batch, output, resume=resume)
    config = override(with_weights(described(models), weights), Overrides(template_args=template_args))
    found = _tasks(tasks, data, few_shot)
    settings = _settings(config, found, few_shot)
    weighted = {member.name: member.weight for member in config.members}
    chosen: Method = Likelihood(list(weighted), settings)
    if method == "sampling":
        chosen = Sampling(weighted, _listed(strategies), runs, top_k, settings)
    jobs = _jobs(chosen, found, data, few_shot, limit)
    with open_records(output, _RECORDS, resume=resume) if output else nullcontext((None, ())) as (file, earlier):
        done = _done(earlier, chosen.settings, output)
        records = _run(config, chosen, jobs, done, file, batch or ("auto" if method == "sampling" else "1"))
    rows = tabulate(records, chosen.arms, [arm for arm in chosen.arms if arm in weighted])
    if as_json:
        print_json({"settings": chosen.settings, "rows": [asdict(row) for row in rows]})
    else:
        click.echo("\n\n".join([markdown(rows, chosen.arms), *_notes(chosen, records)]))


def _require_partners(method: str, batch: str | None, output: Path | None, *, resume: bool) -> None:
    """Raise UsageError for an option without the one that it goes with."""
    if batch and method == "likelihood":
        raise click.UsageError("--batch goes with --method sampling")
    if resume and output is None:
        raise click.UsageError("--resume goes with --output")


def _notes(method: Method, records: Sequence[Record]) -> Iterator[str]:
    """What is to be known beside a table."""
    if any(record.get("route") for record in records if record.get("arm") == "ME"):
        yield (
            "ME's replies drew the same members where they were made at once; its standard errors, made for "
            'independent ones,\nare too small. --batch 1, or route = "own" in models.toml, makes them independent.'
        )
    if "UNION" in method.arms:
        yield "UNION is CE over the union of the members' candidates (UniTE): ME cannot have its distribution."


def _listed(strategies: str) -> list[str]:
    listed = list(dict.fromkeys(name.strip() for name in strategies.split(",")))
    for name in listed:
        if name not in _STRATEGIES:
            raise InputError(f'--strategies: there is no "{name}"; there are {", ".join(_STRATEGIES)}')
    return listed


def _tasks(names: str, data: Path | None, few_shot: bool) -> list[Task]:
    """The tasks of --task. Raises click.UsageError where --data or --few-shot does not go with them."""
    found = find_tasks(names)
    for task in found:
        if not task.own and data is None:
            raise click.UsageError(f"--data is missing: the folder of the questions of {task.name}")
        if task.own and few_shot:
            raise click.UsageError(f"--few-shot does not go with {task.questions_file}: write its [[examples]] there")
    return found


def _settings(config: Config, tasks: Sequence[Task], few_shot: bool) -> dict[str, Any]:
    """What makes records those of one run: with tasks of one's own also these, and what models.toml says of replies."""
    members = {m.name: _described(config, m) for m in config.members}
    settings: dict[str, Any] = {"members": members, "few_shot": few_shot}
    own = {task.name: task.own.digest for task in tasks if task.own}
    if not own:
        return settings
    reply = {
        key: getattr(config, key) for key in ("unit", "decode", "system", "max_tokens", "min_tokens", "ignore_eos")
    }
    shaped = {m.name: asdict(m.sampling) | {"system": m.system} for m in config.members}
    shaped = json.loads(json.dumps(shaped))  # as it is read back from a record, where tuples are lists
    return settings | {"own": own, "replies": reply | {"stop": list(config.stop), "members": shaped}}


def _described(config: Config, member: MemberConfig) -> dict[str, Any]:
    arguments = {**config.template_args, **member.template_args}
    described = {"model": member.path.name if member.path else member.hf, "weight": member.weight}
    return described | ({"template_args": arguments} if arguments else {})


def _jobs(method: Method, tasks: Sequence[Task], data: Path | None, few_shot: bool, limit: int | None) -> list[Job]:
    return [
        job
        for task in tasks
        for job in method.jobs(task, spread(read_questions(task, data or Path(), few_shot=few_shot), limit))
    ]


def _done(records: Sequence[Record], settings: dict[str, Any], output: Path | None) -> dict[str, Record]:
    """The records that there are already, by their ids. Raises InputError for those of another run."""
    for number, record in enumerate(records, start=1):
        if record.get("settings") != settings:
            was, now = json.dumps(record.get("settings")), json.dumps(settings)
            raise InputError(f"{output}, line {number}: made with other settings: {was}, not {now}")
    return {record["id"]: record for record in records}


def _run(
    config: Config, method: Method, jobs: Sequence[Job], done: dict[str, Record], file: IO[bytes] | None, batch: str
) -> list[Record]:
    """The records of all jobs and of what follows from them; models are loaded only where some is missing."""
    missing = [job for job in jobs if job.id not in done]
    made: dict[str, Record] = {}
    if missing:
        with ExitStack() as stack:
            ensemble = stack.enter_context(load_many(config, batch, len(jobs), map(stretch_of, done.values())))
            advance = stack.enter_context(progress("answers", len(jobs), len(jobs) - len(missing)))
            for record in method.records(ensemble, jobs, done):
                made[record["id"]] = record
                if file:
                    write_record(file, record)
                advance()
    records = {job.id: done.get(job.id) or made[job.id] for job in jobs}
    for record in list(method.conclusions(jobs, records)):
        if file and record["id"] not in done:
            write_record(file, record)
        records[record["id"]] = record
    return list(records.values())
