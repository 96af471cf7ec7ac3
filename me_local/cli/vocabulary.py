"""`me-local vocabulary`: a GGUF file without its weights, for a member that runs elsewhere."""

from pathlib import Path

import click
from rich.filesize import decimal

from me_local.cli.options import FilePath
from me_local.errors import InputError, RunError
from me_local.llama.header import read_header
from me_local.system.files import replace_file


@click.command()
@click.argument("model", type=FilePath())
@click.argument("out", type=FilePath())
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def vocabulary(model: Path, out: Path, force: bool) -> None:
    """Write MODEL, a GGUF file, to OUT without its weights: a few MB with all that it says of text.

    That is what a member needs here whose weights are elsewhere: vocabulary, tokenizer and chat template. The
    beginning of MODEL is enough: the first part of a model in parts, or the first 50 MB of a download.
    """
    header = read_header(model)
    _check(model, out, force=force)
    try:
        replace_file(out, header.data)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{out}: {reason}") from None
    click.echo(
        f"{out}: the vocabulary of {model.name}, {header.tokens:,} tokens, {decimal(len(header.data))}", err=True
    )


def _check(model: Path, out: Path, *, force: bool) -> None:
    """Raise InputError where OUT cannot, or should not, be written."""
    try:
        if not out.exists():
            return
        if out.samefile(model):
            raise InputError(f"{out}: it is the model itself: give OUT another name")
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{out}: {reason}") from None
    if not out.is_file():  # a device must not be replaced by a file
        raise InputError(f"{out}: not a regular file")
    if not force:
        raise InputError(f"{out}: it exists already; --force replaces it")
