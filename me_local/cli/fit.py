"""`me-local fit`: the weights under which the ensemble predicts a text best."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from me_local.cli.display import print_json, print_table
from me_local.cli.options import FilePath, described, load, models_option, raw_option
from me_local.cli.progress import progress
from me_local.ensemble import Ensemble
from me_local.errors import ConfigError
from me_local.evaluation.corpus import read_blocks
from me_local.evaluation.fitting import Fit, require_parts, score_blocks
from me_local.evaluation.fitting import fit as fit_to
from me_local.evaluation.weights_file import write_weights

_PARTS = ("fitted_part", "held_out_part")


@click.command()
@models_option
@click.option(
    "--data",
    type=FilePath(),
    required=True,
    help='A text, or JSON Lines of {"prompt": "...", "continuation": "..."}.',
)
@raw_option
@click.option("--write", is_flag=True, help="Write the weights into the file of --models; comments stay.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fit(models: Path, data: Path, raw: bool, write: bool, as_json: bool) -> None:
    """Find the weights under which the ensemble predicts --data best, by expectation-maximisation.

    Shows the bits per byte of each member, of equal weights and of the fitted ones, on the part of the data that was
    fitted to and on the part that was held out (every fourth block). All at temperature 1 without truncation.
    """
    config = described(models)
    if write and not config.path:
        raise ConfigError("--write: there is no file to write to where members are named with --member")
    if config.router != "constant":
        raise ConfigError(f'{config.place}[ensemble].router: weights that are fitted hold with "constant" alone')
    with load(config) as ensemble:
        blocks = read_blocks(data, raw=raw, room=min(member.n_ctx for member in ensemble.members))
        require_parts(blocks, str(data))
        with progress("blocks", len(blocks)) as advance:
            scores = score_blocks(ensemble, blocks, advance)
        result = fit_to(ensemble.names, scores)
        report = _report(ensemble, result)
    if as_json:
        print_json(report)
    else:
        _print(report)
    if write:
        write_weights(models, report["weights"])
        click.echo(f"{models} has these weights now", err=True)


def _report(ensemble: Ensemble, result: Fit) -> dict[str, Any]:
    *members, equal, fitted = [dict(zip(_PARTS, (row.fitted, row.held_out), strict=True)) for row in result.rows]
    return {
        "weights": dict(zip(ensemble.names, result.weights.tolist(), strict=True)),
        "members": dict(zip(ensemble.names, members, strict=True)),
        "equal": equal,
        "fitted": fitted,
        "bytes": dict(zip(_PARTS, result.bytes, strict=True)),
        "units": dict(zip(_PARTS, result.units, strict=True)),
        "unit": ensemble.unit,
    }


def _print(report: dict[str, Any]) -> None:
    table = Table("bits per byte", "fitted part", "held-out part", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    named = report["members"].items()
    for name, rates in (*named, ("equal weights", report["equal"]), ("fitted weights", report["fitted"])):
        table.add_row(name, *(f"{rates[part]:.4f}" for part in _PARTS))
    table.add_row("", *(f"{report['bytes'][part]:,} bytes" for part in _PARTS))
    table.add_row("", *(f"{report['units'][part]:,} {report['unit']}s" for part in _PARTS))
    print_table(table)
    weights = ", ".join(f"{name} {weight:.4g}" for name, weight in report["weights"].items())
    click.echo(f"\nfitted weights: {weights}")
