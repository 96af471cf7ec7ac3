"""The program with all its commands: parse, call the library, print; nothing else.

Replies and records go to stdout, everything else to stderr. Bad input ends with one line and status 2, a run that
failed with status 1, an interrupted one with 130. A fault of the program itself is one line and status 1, too; where it
came from is shown at -v.
"""

import errno
import logging
import sys
from typing import Any

import click

from me_local.cli.bench import bench
from me_local.cli.chat import chat
from me_local.cli.eval import evaluate
from me_local.cli.fit import fit
from me_local.cli.generate import generate
from me_local.cli.init import init
from me_local.cli.inspect import inspect
from me_local.cli.interrupt import raises_once
from me_local.cli.models import models
from me_local.cli.score import score
from me_local.cli.serve import serve
from me_local.cli.streams import printable, safe_streams
from me_local.cli.verify import verify
from me_local.cli.vocabulary import vocabulary
from me_local.errors import CrashError, MeLocalError, RunError

log = logging.getLogger(__name__)


class Failure(click.ClickException):
    """Bad input, as one line on stderr."""

    exit_code = 2

    def __init__(self, error: MeLocalError) -> None:
        super().__init__(printable(" ".join(str(error).split())))


class RunFailure(Failure):
    """A run that failed, as one line on stderr."""

    exit_code = 1


class Commands(click.Group):
    """The one place where errors become lines for the user."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line, on streams that take every text."""
        with safe_streams():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error becomes a Failure, or passes where click knows what to do."""
        try:
            return super().invoke(ctx)
        except MeLocalError as error:
            raise (RunFailure if isinstance(error, RunError | CrashError) else Failure)(error) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of stdout has gone; click knows what to do
                raise
            raise RunFailure(MeLocalError(f"{error.filename or 'output'}: {error.strerror}")) from None
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(130)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:  # of the program itself, or of a library
            log.info("the error in full", exc_info=error)
            what = f"an error of the program: {type(error).__name__}: {error}"
            raise RunFailure(MeLocalError(f"{what}; me-local -v shows where, please report it")) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="me-local", prog_name="me-local")
@click.option("-v", "--verbose", count=True, help="Show llama.cpp's log on stderr; twice for all of it.")
def main(verbose: int) -> None:
    """One better answer from several local language models.

    The environment variable that an option shows sets it, too; options go before the environment, the environment
    before models.toml.
    """
    level = [logging.CRITICAL, logging.INFO, logging.DEBUG][min(verbose, 2)]
    raises_once()
    # The stream as it is now: what llama-cpp-python prints to stderr while it loads is caught on the way there.
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr, force=True)


main.add_command(bench)
main.add_command(chat)
main.add_command(evaluate)
main.add_command(fit)
main.add_command(generate)
main.add_command(init)
main.add_command(inspect)
main.add_command(models)
main.add_command(score)
main.add_command(serve)
main.add_command(verify)
main.add_command(vocabulary)
