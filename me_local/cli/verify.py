"""`me-local verify`: check on the user's own models that ME samples the distribution that CE does."""

from contextlib import ExitStack
from pathlib import Path

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from me_local.cli.display import make_console, print_json
from me_local.cli.interrupt import leaves_at_once
from me_local.cli.options import described, load, models_option
from me_local.ensemble import Ensemble
from me_local.measuring.verify import DRAWS, FACTOR, FALSE_ALARM, PROMPTS, ROUNDING, Report, work
from me_local.measuring.verify import verify as run_checks
from me_local.model import LoadedModel

_LEGEND = f"""\
cache fidelity     total-variation distance of a prediction in the middle of ME from a fresh evaluation: mean and
                   largest, and those of llama.cpp's own rounding when tokens come one by one; fails beyond {FACTOR:g}
                   times that + {ROUNDING:g}
strategy equality  {DRAWS} pieces drawn by ME after each of {len(PROMPTS)} texts against the mixture of CE, G-test;
                   fails by chance in 1 of {1 / FALSE_ALARM:,.0f} runs; for unit "token" only, since CE has no words
canonical context  after each step, the ids of each member against its tokenizer's ids for the whole text"""


@click.command()
@models_option
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another one writes other texts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(models: Path, seed: int, as_json: bool) -> None:
    """Check that ME samples the distribution of CE, on these members. The status is 1 when a check fails.

    Each member gets a second context, which evaluates anew what the first has in its cache.
    """
    config = described(models)
    with load(config) as ensemble, ExitStack() as stack:
        with leaves_at_once(make_console(stderr=True)):
            references = [_twin(member, stack) for member in ensemble.members]
        report = _run(ensemble, references, seed)
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)
    if not report.passed:
        click.get_current_context().exit(1)


def _twin(member: LoadedModel, stack: ExitStack) -> LoadedModel:
    twin = member.twin()
    stack.callback(twin.close)
    return twin


def _run(ensemble: Ensemble, references: list[LoadedModel], seed: int) -> Report:
    columns = (TextColumn("verifying"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=make_console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying", total=work(ensemble))
        return run_checks(ensemble, references, seed, lambda: progress.advance(task))


def _print(report: Report) -> None:
    console = make_console()
    if not console.is_terminal:
        console.width = 10_000
    table = Table("check", "on", "found", "allowed", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    console.print()
    console.print(_LEGEND)


def _rows(report: Report) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for f in report.fidelity:
        where = f", at prompt {f.prompt}, step {f.step}" if f.compared else ""
        allowed = (ROUNDING + FACTOR * figure for figure in (f.stepping_mean, f.stepping_largest))
        rows.append(
            (
                "cache fidelity",
                f"{f.member}: {f.compared} steps" + (f", {f.guessed} guessed" if f.guessed else ""),
                f"mean {f.mean:.4f}, largest {f.largest:.4f}{where}",
                "mean {:.4f}, largest {:.4f}".format(*allowed),
                _verdict(f.passed),
            )
        )
    e, c = report.equality, report.canonical
    strangers = f", {e.strangers} that CE never draws" if e.strangers else ""
    found = f"G = {e.statistic:.1f} with {e.freedom} degrees of freedom, p = {e.p_value:.2g}{strangers}"
    rows.append(("strategy equality", f"{e.draws} draws", found, f"p ≥ {FALSE_ALARM:g}", _verdict(e.passed)))
    found = "{} differs at prompt {}, step {}".format(*c.different) if c.different else "all equal"
    rows.append(("canonical context", f"{c.steps} steps", found, "all equal", _verdict(c.passed)))
    return rows


def _verdict(passed: bool) -> str:
    return "ok" if passed else "FAILED"
