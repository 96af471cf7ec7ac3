"""`me-local bench`: how fast the ensemble is on this machine, and how fast it could be."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from me_local.cli.display import make_console, print_json
from me_local.cli.options import FilePath, described, load, models_option, weights_option
from me_local.config import Config, Overrides, override
from me_local.ensemble import Ensemble
from me_local.errors import ConfigError, InputError, MeLocalError
from me_local.llama.context import MOST_SEQUENCES
from me_local.measuring.bench import BatchSpeed, Report, Speed, work
from me_local.measuring.bench import bench as run_bench
from me_local.measuring.bench_batch import batch_work, bench_batches
from me_local.measuring.guesses import KINDS, Gain, bench_guesses, can_guess
from me_local.settings import parse_weights


@click.command()
@models_option
@weights_option
@click.option("--members", "count", type=click.IntRange(1, 64), help="The first member so many times, equal weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; times are in seconds, sizes in bytes.")
@click.option("--batch", metavar="N,N,...", help="Measure so many replies at once, too, such as 1,2,4,8.")
@click.option("--plot", type=FilePath(), help="Write bars and curves, as PNG.")
def bench(
    models: Path, weights: str | None, count: int | None, as_json: bool, batch: str | None, plot: Path | None
) -> None:
    """Measure the speed of each member alone, of CE and of ME, and the limit that ME could reach.

    With guesses (draft), also what these gain on three kinds of text. End of generation is never sampled, so that all
    write equally long.
    """
    config = described(models)
    if weights is not None:
        names = [member.name for member in config.members]
        config = override(config, Overrides(weights=parse_weights(weights, names)))
    config = repeated(config, count) if count else config
    counts = _counts(batch) if batch else []
    with load(config) as ensemble:
        report = _run(ensemble)
        guessing = can_guess(ensemble)
    if config.draft not in (None, "none") and not guessing:
        click.echo(f"guesses ({config.draft}) are left out: no member can evaluate any", err=True)
    failure: MeLocalError | None = None
    try:
        if guessing:
            report = replace(report, draft=config.draft or "ngram", guesses=_run_guesses(config))
        if counts:
            report = replace(report, batches=_run_batches(config, counts))
    except MeLocalError as error:
        failure = error
    if plot:
        _plot(report, plot)
    if as_json:
        print_json(report.as_dict())
    else:
        _print(make_console(), report)
    if failure:
        raise failure


def repeated(config: Config, count: int) -> Config:
    """The first member so many times."""
    first = config.members[0]
    members = tuple(replace(first, name=f"{first.name}-{i + 1}", weight=1 / count) for i in range(count))
    return replace(config, members=members, draft=config.draft if config.draft in ("none", "ngram") else None)


def _run(ensemble: Ensemble) -> Report:
    with _measuring(work(ensemble)) as advance:
        return run_bench(ensemble, advance)


@contextmanager
def _measuring(total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("measuring"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=make_console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        yield lambda: progress.advance(task)


def _counts(text: str) -> list[int]:
    counts = [int(part) if part.strip().isdecimal() and len(part) < 9 else 0 for part in text.split(",")]
    if not all(1 <= count <= MOST_SEQUENCES for count in counts):
        raise InputError(f'--batch: must be numbers from 1 to {MOST_SEQUENCES} with commas, got "{text}"')
    return counts


def _run_batches(config: Config, counts: list[int]) -> tuple[BatchSpeed, ...]:
    with _measuring(batch_work(config, counts)) as advance:
        return bench_batches(config, counts, advance)


def _run_guesses(config: Config) -> tuple[Gain, ...]:
    with _measuring(len(KINDS)) as advance:
        return bench_guesses(config, advance)


def _plot(report: Report, path: Path) -> None:
    try:
        from me_local.measuring.plots import plot_bench
    except ImportError:
        raise ConfigError('--plot needs matplotlib: pip install "me-local[plot]"') from None
    try:
        plot_bench(report, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _print(console: Console, report: Report) -> None:
    if not console.is_terminal:
        console.width = 10_000
    machine = report.machine
    console.print(f"{machine['processor']}, {machine['cores']} cores, load {machine['load']:.1f}")
    console.print()
    console.print(_speeds(report))
    console.print()
    console.print(_calls(report))
    console.print()
    if report.batches:
        console.print(_batches(report.batches))
        console.print()
    if report.guesses:
        console.print(_guesses(report))
        console.print()
    for line in remarks(report):
        console.print(line)


def _speeds(report: Report) -> Table:
    several = len(report.weights) > 1
    ce, best = report.speed("ce" if several else "single"), report.speed("single")
    titles = ["", "pieces/s", "bytes/s", "to CE", "to best single", "in decode", "prompt s"]
    away = any(speed.wire_seconds for speed in report.speeds)
    titles += ["on the wire"] if away else []
    table = Table(*titles, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for speed in report.speeds:
        wire = f"{1e3 * speed.wire_seconds:.1f} ms" if speed.wire_seconds else ""
        table.add_row(*_speed_row(speed, ce, best), *([wire] if away else []))
    return table


def _speed_row(speed: Speed, ce: Speed, best: Speed) -> list[str]:
    share = "" if speed.decode_share is None else f"{speed.decode_share:.1%}"
    figures = [f"{speed.pieces:.1f}", f"{speed.bytes:.0f}", f"{speed.pieces / ce.pieces:.2f}"]
    return [speed.name, *figures, f"{speed.pieces / best.pieces:.2f}", share, f"{speed.prompt_seconds:.2f}"]


def _calls(report: Report) -> Table:
    tokens = sorted({call.tokens for call in report.calls})
    titles = ["ms for k tokens", "context", *map(str, tokens)]
    table = Table(*titles, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    rows: dict[tuple[str, int], list[str]] = {}
    for call in report.calls:
        rows.setdefault((call.member, call.context), []).append(f"{1000 * call.seconds:.1f}")
    for (member, context), figures in rows.items():
        table.add_row(member, str(context), *figures)
    return table


def _batches(speeds: Sequence[BatchSpeed]) -> Table:
    counts = list(dict.fromkeys(speed.batch for speed in speeds))
    titles = ["pieces/s of N at once", *map(str, counts)]
    table = Table(*titles, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in dict.fromkeys(speed.name for speed in speeds):
        of_name = [speed for speed in speeds if speed.name == name]
        table.add_row(name, *(f"{speed.pieces:.1f}" for speed in of_name))
        table.add_row("  by t(k)", *(f"{speed.predicted:.1f}" for speed in of_name))
    return table


def _guesses(report: Report) -> Table:
    titles = [f"guesses: {report.draft}", "pieces/s", "without", "ratio", "evaluations a piece", "without"]
    table = Table(*titles, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for gain in report.guesses:
        figures = [f"{gain.pieces:.1f}", f"{gain.pieces_plain:.1f}", f"{gain.speed_up:.2f}"]
        table.add_row(gain.kind, *figures, f"{gain.calls_per_piece:.2f}", f"{gain.calls_per_piece_plain:.2f}")
    return table


def remarks(report: Report) -> list[str]:
    """What the figures say, in sentences."""
    several, lines = len(report.weights) > 1, []
    if several:
        lines.append(
            f"ME is {report.speed_up:.2f} times as fast as CE; the limit on this machine is {report.limit:.2f}, "
            f"so it reaches {report.speed_up / report.limit:.0%} of it."
        )
    lines += _on_guesses(report)
    if several:
        faster = "at the same time" if report.speed("ce parallel").pieces > report.speed("ce").pieces else "in turn"
        lines.append(f"CE is faster with its members {faster}.")
    lines.append(f"A step of ME spends {1e6 * report.outside_seconds:.0f} µs outside llama.cpp's decode.")
    if report.memory_bytes is not None:
        lines.append(f"Weights, caches and buffers take {decimal(report.memory_bytes)}.")
    if several and report.limit < 1.2:
        lines.append(_little_to_gain(report))
    return lines


def _on_guesses(report: Report) -> list[str]:
    if report.draft == "none":
        return []
    figures = {gain.kind: f"{gain.kind} {gain.speed_up:.2f}" for gain in report.guesses}
    of_limit = ", of which that limit knows nothing," if len(report.weights) > 1 else ""
    lines = []
    if figures:
        speeds = ", ".join(figures.values())
        lines.append(f"Guesses ({report.draft}){of_limit} make it so many times as fast: {speeds}.")
    if lacking := [kind.name for kind in KINDS if kind.name not in figures]:
        lines.append(f"A context is too short to measure guesses on: {', '.join(lacking)}.")
    return lines


def _little_to_gain(report: Report) -> str:
    name, weight = max(report.weights.items(), key=lambda item: item[1])
    if weight > 0.85:
        return f"There is little to gain: {name} has {weight:.0%} of the weight and is drawn nearly always."
    return (
        "There is little to gain: on this machine several tokens at once cost nearly as much as one by one, so that "
        "what ME leaves for later is hardly cheaper then."
    )
