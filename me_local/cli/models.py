"""`me-local models`: what is on this machine, from all stores."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from me_local.cli.display import make_console, print_json
from me_local.stores.catalogue import Found, found
from me_local.stores.folders import VARIABLE

_NOTHING = f"""\
No GGUF models are on this machine where Ollama, LM Studio, Hugging Face and llama.cpp keep theirs.
{VARIABLE} names further folders, parted by {os.pathsep!r}; -m takes the path of a file anywhere."""
_UNFOLDED = 10_000  # columns


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list; sizes are in bytes, contexts in tokens.")
def models(as_json: bool) -> None:
    """List the models on this machine: those of Ollama, LM Studio, Hugging Face and llama.cpp.

    ME_LOCAL_MODEL_DIRS names further folders. -m takes the names that stand here, wherever models are loaded.
    """
    all_ = found()
    if as_json:
        print_json([_record(model) for model in all_])
        return
    if not all_:
        click.echo(_NOTHING, err=True)
        return
    console = make_console()
    if not console.is_terminal:
        console.width = _UNFOLDED
    _print_models(console, [model for model in all_ if not model.problem])
    _print_others(console, [model for model in all_ if model.problem])


def _record(model: Found) -> dict[str, Any]:
    entry = model.entry
    facts = {} if model.facts is None else asdict(model.facts)
    for key in ("unfit", "shape"):
        facts.pop(key, None)
    return {
        "name": entry.name,
        "store": entry.store,
        "files": [str(file) for file in entry.files],
        "lora": str(entry.lora) if entry.lora else None,
        "size": model.size,
        "problem": model.problem or None,
        **facts,
    }


def _print_models(console: Console, models: Sequence[Found]) -> None:
    """A row for each, or two where the terminal is narrow."""
    if not models:
        return
    table = _table(models)
    if Measurement.get(console, console.options.update(width=_UNFOLDED), table).maximum <= console.width:
        console.print(table)
        return
    for model in models:
        console.print(Text(shown_name(model.entry.name), style="bold"))
        architecture, count, quantisation, file, context, vocabulary, template = _cells(model)
        trained = f"context {context}" if context else ""
        parts = (f"{architecture} {count}", quantisation, file, trained, vocabulary, f"template: {template}")
        console.print(Text("  " + ", ".join(filter(None, parts))))


def _table(models: Sequence[Found]) -> Table:
    titles = ("model", "architecture", "size", "quantisation", "file", "context", "vocabulary", "template")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, no_wrap=True, justify="right" if title in ("size", "file", "context") else "left")
    for model in models:
        table.add_row(Text(shown_name(model.entry.name), style="bold"), *_cells(model))
    return table


def _cells(model: Found) -> tuple[str, ...]:
    facts = model.facts
    assert facts is not None
    template = "none" if facts.template is None else "thinks" if facts.thinks else "chat"
    return (
        facts.architecture,
        facts.count,
        facts.quantisation,
        decimal(model.size),
        f"{facts.context:,}" if facts.context else "",
        f"{facts.vocabulary} {facts.vocabulary_size:,}",
        template,
    )


def _print_others(console: Console, models: Sequence[Found]) -> None:
    if models:
        console.print(Text("\nNo members of an ensemble:"))
    for model in models:
        console.print(Text.assemble((f"  {shown_name(model.entry.name)}", "bold"), f": {model.problem}"))


def shown_name(name: str) -> str:
    """The name as it is typed in a shell."""
    home = os.path.expanduser("~/")
    return f"~/{shlex.quote(name.removeprefix(home))}" if name.startswith(home) else shlex.quote(name)
