"""`me-local generate`: one prompt, or a file of them, without a conversation."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import click

from me_local.batch import RECORDS, Job, finished_jobs, read_jobs, run
from me_local.cli.constraint import constraint_options, take_constraint
from me_local.cli.display import Notices, print_json, print_reply
from me_local.cli.input import argument_text, read_text
from me_local.cli.interrupt import cancels
from me_local.cli.options import (
    STANDARD,
    FilePath,
    batch_option,
    configured,
    load_many,
    models_option,
    route_option,
    sampling_options,
)
from me_local.cli.progress import progress
from me_local.cli.shaping import Sectioned
from me_local.cli.thoughts import ended_in_thought
from me_local.config import Overrides
from me_local.decoding.reply import Reply, ReplyStream
from me_local.ensemble import Ensemble, Finished
from me_local.errors import InputError
from me_local.mixture.routing import Stretch
from me_local.records import open_records, standard_output, write_record


@click.command(cls=Sectioned)
@click.argument("prompt", required=False)
@models_option
@click.option("--raw", is_flag=True, help="Complete the prompt as it stands, without chat templates.")
@click.option("-n", "count", type=click.IntRange(1), default=1, help="Replies; the i-th has the seed + i.")
@click.option("--json", "as_json", is_flag=True, help="Print each reply as a line of JSON, with all its pieces.")
@click.option(
    "--input", "source", type=FilePath(allow_dash=True), help="Prompts, a JSON object per line; -: standard input."
)
@click.option("--output", type=FilePath(allow_dash=True), help="Where --input's records go; -: standard output.")
@click.option("--resume", is_flag=True, help="Skip ids that --output already has.")
@constraint_options
@batch_option
@route_option
@sampling_options
def generate(
    prompt: str | None,
    models: Path,
    raw: bool,
    count: int,
    as_json: bool,
    source: Path | None,
    output: Path | None,
    resume: bool,
    batch: str | None,
    **given: Any,
) -> None:
    """Reply to PROMPT, or complete it with --raw. PROMPT is read from standard input if it is - or left out.

    Of a reply that begins with a thought, the answer is printed; --json and --output have both.

    With --input and --output, reply to each line of a JSON Lines file: {"prompt": "..."} or {"messages": [...]},
    optionally with "id", "seed", "max_tokens", and what the reply has to be: "json_schema" (an object), "json_object"
    (true), "regex", "choice" (a list) or "grammar". A line that cannot be used becomes a record with "error", and the
    status is 1 in the end.
    """
    config = configured(models, given | {"constraint": take_constraint(given)})
    if source is None:
        if output or resume:
            raise click.UsageError("--output and --resume go with --input")
        text = _prompt(prompt)
        with load_many(config, batch, count) as ensemble:
            reply = _replies_at_once if ensemble.batch > 1 else _replies
            reply(ensemble, text, count, raw=raw, as_json=as_json)
        return
    if prompt is not None or output is None or count > 1:
        raise click.UsageError("--input goes with --output, and not with a PROMPT or -n")
    if output is STANDARD and resume:
        raise click.UsageError("--resume goes with an --output that is a file")
    jobs = _jobs(source, output)
    opened = standard_output() if output is STANDARD else open_records(output, RECORDS, resume=resume)
    with opened as (records, earlier):
        done = _done(jobs, earlier)
        with load_many(config, batch, len(jobs), done.values()) as ensemble:
            _batch(ensemble, jobs, done, records, raw=raw)


def _prompt(argument: str | None) -> str:
    text = read_text() if argument is None or argument == "-" else argument_text(argument, "PROMPT")
    if not text.strip():
        raise InputError("the prompt is empty; give it as an argument or on standard input")
    return text


def _replies(ensemble: Ensemble, text: str, count: int, *, raw: bool, as_json: bool) -> None:
    notices = Notices(ensemble, raw=raw)
    notices.tell()
    for i in range(count):
        seed = ensemble.config.seed
        stream = ensemble.stream(text, Overrides(seed=None if seed is None else seed + i), raw=raw)
        with cancels(stream.cancel):
            if as_json:
                print_json(stream.finish().as_dict())
            else:
                _print(stream)
        notices.tell()
        if stream.reply.finish_reason == "cancelled":
            click.get_current_context().exit(130)


def _replies_at_once(ensemble: Ensemble, text: str, count: int, *, raw: bool, as_json: bool) -> None:
    """The replies in their order, each as soon as it and those before it are finished."""
    notices = Notices(ensemble, raw=raw)
    notices.tell()
    shown, errors = 0, []
    finished: dict[int, Finished] = {}
    try:
        for one in ensemble.generate_many([text] * count, raw=raw):
            finished[one.index] = one
            errors += [one.error] if one.error else []
            while shown in finished:
                _show(finished.pop(shown).reply, as_json=as_json)
                shown += 1
    finally:  # also those that wait for an earlier one
        for index in sorted(finished):
            _show(finished[index].reply, as_json=as_json)
    notices.tell()
    if errors:
        raise errors[0]


def _show(reply: Reply | None, *, as_json: bool) -> None:
    if reply and as_json:
        print_json(reply.as_dict())
    elif reply:
        print_reply(reply.answer.removesuffix("\n") + "\n")
        _tell_of_cut(reply)


def _print(stream: ReplyStream) -> None:
    try:
        for step in stream:
            print_reply(step.answer)
    finally:
        reply = stream.reply
        print_reply(reply.rest.answer + ("" if reply.answer.endswith("\n") else "\n"))
        _tell_of_cut(reply)


def _tell_of_cut(reply: Reply) -> None:
    if ended_in_thought(reply):
        note = "the reply ended inside its thought: raise --max-tokens, or try --template-arg enable_thinking=false"
        click.echo(note, err=True)


def _jobs(source: Path, output: Path) -> list[Job]:
    name = "standard input" if source is STANDARD else str(source)
    try:
        with nullcontext(sys.stdin.buffer) if source is STANDARD else source.open("rb") as file:
            jobs = list(read_jobs(file, name))
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    if not jobs:
        raise InputError(f"{name}: it has no line with a prompt")
    if source is not STANDARD and output is not STANDARD and output.exists() and output.samefile(source):
        raise InputError(f"{output}: --output is the same file as --input")
    return jobs


def _done(jobs: Sequence[Job], records: Sequence[dict[str, Any]]) -> dict[str | int, Stretch | None]:
    """Those of the jobs that are in the records of an earlier run."""
    done = finished_jobs(records)
    return {job.id: done[job.id] for job in jobs if job.id in done}


def _batch(
    ensemble: Ensemble, jobs: list[Job], done: dict[str | int, Stretch | None], records: IO[bytes], *, raw: bool
) -> None:
    failed = 0
    notices = Notices(ensemble, raw=raw)
    notices.tell()
    on_screen = records is sys.stdout.buffer and sys.stdout.isatty()
    with progress("prompts", len(jobs), len(done), hidden=on_screen) as advance:
        for record in run(ensemble, jobs, done, raw=raw):
            write_record(records, record)
            failed += "error" in record
            advance()
    notices.tell()
    if failed:
        click.echo(f"{failed} of {len(jobs) - len(done)} prompts failed; their records say why", err=True)
        click.get_current_context().exit(1)
