"""`me-local eval`: does the ensemble answer better than its members?"""

import json
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import click

from me_local.cli.display import print_json
from me_local.cli.options import (
    FilePath,
    batch_option,
    load_many,
    models_option,
    template_option,
    weights_option,
    with_weights,
)
from me_local.cli.progress import progress
from me_local.config import Config, MemberConfig, Overrides, load_config, override
from me_local.errors import InputError
from me_local.evaluation.questions import Job, Likelihood, Method, Record, Sampling, markdown, spread, tabulate
from me_local.evaluation.tasks import TASKS, find_tasks, read_questions
from me_local.records import Kind, open_records, stretch_of, write_record

_RECORDS = Kind((("task", "question", "settings", "correct"),))
_STRATEGIES = ("members", "me", "ce", "union")
_DEFAULT = "members,me,ce"
_NAMES = ", ".join([*TASKS, "arc"])


@click.command(name="eval")
@models_option
@weights_option
@click.option("--task", "tasks", required=True, help=f"A list with commas of {_NAMES} (both sets of ARC).")
@click.option("--data", type=FilePath(dir_okay=True), required=True, help="The folder of the questions.")
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
    help="Who replies: members (each alone), me, ce, union (ce as UniTE does it; me cannot have its distribution).",
)
@click.option("--top-k", type=click.IntRange(0), default=10, show_default=True, help="For replies, as in generate.")
@template_option
@click.option("--output", type=FilePath(), help="Where a record per answer goes.")
@click.option("--resume", is_flag=True, help="Go on after the records that --output already has.")
@batch_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def evaluate(
    models: Path,
    weights: str | None,
    tasks: str,
    data: Path,
    method: str,
    few_shot: bool,
    limit: int | None,
    runs: int,
    strategies: str,
    top_k: int,
    template_args: dict[str, object] | None,
    output: Path | None,
    resume: bool,
    batch: str | None,
    as_json: bool,
) -> None:
    """Put questions with known answers to the ensemble and to each member alone, and print who is right how often.

    Replies are sampled as in the paper: up to 512 pieces at temperature 1, no top-p. Accuracies are in per cent, ± a
    standard error, with the gain over the best member in parentheses.
    """
    if batch and method == "likelihood":
        raise click.UsageError("--batch goes with --method sampling")
    if resume and output is None:
        raise click.UsageError("--resume goes with --output")
    config = override(with_weights(load_config(models), weights), Overrides(template_args=template_args))
    chosen = _method(config, method, _listed(strategies), runs, top_k, few_shot)
    jobs = _jobs(chosen, tasks, data, few_shot, limit)
    with open_records(output, _RECORDS, resume=resume) if output else nullcontext((None, ())) as (file, earlier):
        done = _done(earlier, chosen.settings, output)
        records = _run(config, chosen, jobs, done, file, batch or ("auto" if method == "sampling" else "1"))
    names = [member.name for member in config.members]
    rows = tabulate(records, chosen.arms, [arm for arm in chosen.arms if arm in names])
    if as_json:
        print_json({"settings": chosen.settings, "rows": [asdict(row) for row in rows]})
    else:
        click.echo(markdown(rows, chosen.arms))
        if "UNION" in chosen.arms:
            click.echo(
                "\nUNION is CE over the union of the members' candidates (UniTE): ME cannot have its distribution."
            )


def _listed(strategies: str) -> list[str]:
    listed = list(dict.fromkeys(name.strip() for name in strategies.split(",")))
    for name in listed:
        if name not in _STRATEGIES:
            raise InputError(f'--strategies: there is no "{name}"; there are {", ".join(_STRATEGIES)}')
    return listed


def _method(config: Config, method: str, strategies: list[str], runs: int, top_k: int, few_shot: bool) -> Method:
    names = [member.name for member in config.members]
    members = {m.name: _described(config, m) for m in config.members}
    settings: dict[str, Any] = {"members": members, "few_shot": few_shot}
    if method == "likelihood":
        return Likelihood(names, settings)
    return Sampling(names, strategies, runs, top_k, settings)


def _described(config: Config, member: MemberConfig) -> dict[str, Any]:
    arguments = {**config.template_args, **member.template_args}
    described = {"model": member.path.name if member.path else member.hf, "weight": member.weight}
    return described | ({"template_args": arguments} if arguments else {})


def _jobs(method: Method, tasks: str, data: Path, few_shot: bool, limit: int | None) -> list[Job]:
    return [
        job
        for task in find_tasks(tasks)
        for job in method.jobs(task, spread(read_questions(task, data, few_shot=few_shot), limit))
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
    """The records of all jobs; models are loaded only where some is missing."""
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
    return [done.get(job.id) or made[job.id] for job in jobs]
