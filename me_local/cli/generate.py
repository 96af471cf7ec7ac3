"""`me-local generate`: one prompt, or a file of them, without a conversation."""

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

import click

from me_local.batch import Job, finished_jobs, read_jobs, run
from me_local.cli.display import Notices
from me_local.cli.interrupt import cancels
from me_local.cli.options import (
    batch_option,
    configured,
    load_many,
    models_option,
    route_option,
    sampling_options,
)
from me_local.cli.progress import progress
from me_local.config import Overrides
from me_local.ensemble import Ensemble, Finished
from me_local.errors import InputError
from me_local.records import open_records, require_new, write_record
from me_local.reply import Reply, ReplyStream
from me_local.routing import Stretch


@click.command()
@click.argument("prompt", required=False)
@models_option
@click.option("--raw", is_flag=True, help="Complete the prompt as it stands, without chat templates.")
@click.option("-n", "count", type=click.IntRange(1), default=1, help="Replies; the i-th has the seed + i.")
@click.option("--json", "as_json", is_flag=True, help="Print each reply as a line of JSON, with all its pieces.")
@click.option(
    "--input", "source", type=click.Path(path_type=Path, dir_okay=False), help="Prompts, a JSON object per line."
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Where --input's records go.")
@click.option("--resume", is_flag=True, help="Skip ids that --output already has.")
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

    With --input and --output, reply to each line of a JSON Lines file: {"prompt": "..."} or {"messages": [...]},
    optionally with "id", "seed" and "max_tokens". A line that cannot be used becomes a record with "error", and the
    status is 1 in the end.
    """
    config = configured(models, given)
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
    jobs, done = _open_jobs(source, output, resume)
    with open_records(output) as records, load_many(config, batch, len(jobs), done.values()) as ensemble:
        _batch(ensemble, jobs, done, records, raw=raw)


def _prompt(argument: str | None) -> str:
    given = argument is not None and argument != "-"
    data = os.fsencode(str(argument)) if given else sys.stdin.buffer.read().removesuffix(b"\n")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        where = "PROMPT" if given else "standard input"
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1}") from None
    if not text.strip():
        raise InputError("the prompt is empty; give it as an argument or on standard input")
    return text


def _replies(ensemble: Ensemble, text: str, count: int, *, raw: bool, as_json: bool) -> None:
    notices = Notices(ensemble, lambda text: click.echo(text, err=True))
    notices.tell()
    for i in range(count):
        seed = ensemble.config.seed
        stream = ensemble.stream(text, Overrides(seed=None if seed is None else seed + i), raw=raw)
        with cancels(stream.cancel):
            if as_json:
                click.echo(json.dumps(stream.finish().as_dict(), ensure_ascii=False))
            else:
                _print(stream)
        notices.tell()
        if stream.reply.finish_reason == "cancelled":
            click.get_current_context().exit(130)


def _replies_at_once(ensemble: Ensemble, text: str, count: int, *, raw: bool, as_json: bool) -> None:
    """The replies in their order, each as soon as it and those before it are finished."""
    notices = Notices(ensemble, lambda text: click.echo(text, err=True))
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
    if reply:
        click.echo(json.dumps(reply.as_dict(), ensure_ascii=False) if as_json else reply.text.removesuffix("\n"))


def _print(stream: ReplyStream) -> None:
    try:
        for step in stream:
            click.echo(step.text, nl=False)
    finally:
        click.echo("" if stream.reply.text.endswith("\n") else "\n", nl=False)


def _open_jobs(source: Path, output: Path, resume: bool) -> tuple[list[Job], dict[str | int, Stretch | None]]:
    """All jobs, and those that are done."""
    try:
        with source.open("rb") as file:
            jobs = list(read_jobs(file, str(source)))
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from None
    if not jobs:
        raise InputError(f"{source}: it has no line with a prompt")
    if output.exists() and output.samefile(source):
        raise InputError(f"{output}: --output is the same file as --input")
    require_new(output, resume=resume)
    done = finished_jobs(output)
    return jobs, {job.id: done[job.id] for job in jobs if job.id in done}


def _batch(
    ensemble: Ensemble, jobs: list[Job], done: dict[str | int, Stretch | None], records: IO[bytes], *, raw: bool
) -> None:
    failed = 0
    notices = Notices(ensemble, lambda text: click.echo(text, err=True))
    notices.tell()
    with progress("prompts", len(jobs), len(done)) as advance:
        for record in run(ensemble, jobs, done, raw=raw):
            write_record(records, record)
            failed += "error" in record
            advance()
    notices.tell()
    if failed:
        click.echo(f"{failed} of {len(jobs) - len(done)} prompts failed; their records say why", err=True)
        click.get_current_context().exit(1)
