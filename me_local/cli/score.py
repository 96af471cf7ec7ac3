"""`me-local score`: how well the members and the ensemble predict a text."""

from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from me_local.cli.display import print_json, print_table
from me_local.cli.options import FilePath, described, load, models_option, raw_option, weights_option, with_weights
from me_local.cli.progress import progress
from me_local.decoding.likelihoods import bits, mixed, unit_weights
from me_local.ensemble import Ensemble
from me_local.evaluation.corpus import Block, read_blocks
from me_local.evaluation.fitting import score_blocks


@click.command()
@click.argument("file", type=FilePath())
@models_option
@weights_option
@raw_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with bits per byte.")
def score(file: Path, models: Path, weights: str | None, raw: bool, as_json: bool) -> None:
    """Bits per byte of FILE under each member and under the ensemble: the fewer, the better it is predicted.

    FILE is a text, or JSON Lines of {"prompt": "...", "continuation": "..."}, whose continuations are scored, with
    prompts as messages or, with --raw, as plain text. All at temperature 1 without truncation.
    """
    config = with_weights(described(models), weights)
    with load(config) as ensemble:
        blocks = read_blocks(file, raw=raw, room=min(member.n_ctx for member in ensemble.members))
        report = _score(ensemble, blocks)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _score(ensemble: Ensemble, blocks: list[Block]) -> dict[str, Any]:
    with progress("blocks", len(blocks)) as advance:
        scores = score_blocks(ensemble, blocks, advance)
    weights = np.array([member.weight for member in ensemble.config.members])
    passages = [ensemble.passage(block.prompt, block.continuation, raw=block.raw) for block in blocks]
    mixtures = [
        mixed(part.log_probabilities, unit_weights(ensemble.engine.router, passage, part, weights)).sum()
        for passage, part in zip(passages, scores, strict=True)
    ]
    totals = np.sum([part.log_probabilities.sum(axis=1) for part in scores], axis=0)
    size = sum(part.size for part in scores)
    rates = {name: bits(total) / size for name, total in zip(ensemble.names, totals.tolist(), strict=True)}
    return {
        "members": rates,
        "ensemble": bits(float(sum(mixtures))) / size,
        "weights": dict(zip(ensemble.names, weights.tolist(), strict=True)),
        "bytes": size,
        "blocks": len(blocks),
        "unit": ensemble.unit,
        "units": sum(len(part.starts) for part in scores),
    }


def _print(report: dict[str, Any]) -> None:
    table = Table("", "bits per byte", "weight", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, rate in report["members"].items():
        table.add_row(name, f"{rate:.4f}", f"{report['weights'][name]:.4g}")
    table.add_row("ensemble", f"{report['ensemble']:.4f}")
    print_table(table)
    click.echo(f"\n{report['bytes']:,} bytes in {report['blocks']} blocks, {report['units']:,} {report['unit']}s")
