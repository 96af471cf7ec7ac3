"""The commands: parse, call the library, print; nothing else.

Replies and records go to stdout, everything else to stderr. Bad input ends with one line and status 2, a run that
failed with status 1, an interrupted one with 130.
"""

import errno
import logging
import os
import sys
from typing import Any

import click

from me_local.cli.bench import bench
from me_local.cli.chat import chat
from me_local.cli.eval import evaluate
from me_local.cli.fit import fit
from me_local.cli.generate import generate
from me_local.cli.inspect import inspect
from me_local.cli.interrupt import raises_once
from me_local.cli.score import score
from me_local.cli.serve import serve
from me_local.cli.verify import verify
from me_local.errors import MeLocalError, RunError


class Failure(click.ClickException):
    """Bad input, as one line on stderr."""

    exit_code = 2

    def __init__(self, error: MeLocalError) -> None:
        super().__init__(" ".join(str(error).split()))


class RunFailure(Failure):
    """A run that failed, as one line on stderr."""

    exit_code = 1


class Commands(click.Group):
    """The one place where me-local's errors become lines for the user."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; its MeLocalError becomes a Failure."""
        try:
            return super().invoke(ctx)
        except MeLocalError as error:
            raise (RunFailure if isinstance(error, RunError) else Failure)(error) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of stdout has gone; click knows what to do
                raise
            raise RunFailure(MeLocalError(f"{error.filename or 'output'}: {error.strerror}")) from None
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="me-local", prog_name="me-local")
@click.option("-v", "--verbose", count=True, help="Show llama.cpp's log on stderr; twice for all of it.")
def main(verbose: int) -> None:
    """One better answer from several local language models.

    Every option can also be set by an environment variable, shown with it; options go before the environment, the
    environment before models.toml.
    """
    level = [logging.CRITICAL, logging.INFO, logging.DEBUG][min(verbose, 2)]
    _open_missing_streams()
    raises_once()
    # The stream as it is now: what llama-cpp-python prints to stderr while it loads is caught on the way there.
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr, force=True)


def _open_missing_streams() -> None:
    """Put nothing in the place of standard streams that were closed before the start (`<&-`)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


main.add_command(bench)
main.add_command(chat)
main.add_command(evaluate)
main.add_command(fit)
main.add_command(generate)
main.add_command(inspect)
main.add_command(score)
main.add_command(serve)
main.add_command(verify)
