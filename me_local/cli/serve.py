"""`me-local serve`: the ensemble behind the OpenAI protocol, and a page to chat with it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from me_local.cli.display import Notices
from me_local.cli.options import Duration, checks, configured, load, models_option, named, served_options
from me_local.cli.shaping import Sectioned
from me_local.config import Config
from me_local.ensemble import Ensemble
from me_local.errors import ConfigError
from me_local.llama.context import MOST_SEQUENCES

if TYPE_CHECKING:
    from me_local.server.keeping import Source


class _Port(click.Option):
    """--port; beside a service called me-local, Kubernetes sets the variable to an address such as tcp://10.0.0.7:8000."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value of the variable, if it is meant for this option."""
        value = super().resolve_envvar_value(ctx)
        return None if value and value.startswith(("tcp://", "udp://", "sctp://")) else value


@click.command(cls=Sectioned)
@models_option
@named("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@named("--port", cls=_Port, type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@named("--api-key", help="What clients must give as key; better in the environment, where others do not see it.")
@named("--insecure", is_flag=True, help="Listen without a key where other machines reach it.")
@named("--allow-host", multiple=True, metavar="NAME", help="A name by which clients may call this machine.")
@named("--alias", multiple=True, metavar="NAME", help="A further name of the ensemble, for clients that have theirs.")
@named("--cors", multiple=True, metavar="ORIGIN", help="A site whose pages may ask, such as https://example.org.")
@click.option(
    "--parallel",
    metavar="N",
    type=click.IntRange(1, MOST_SEQUENCES),
    default=1,
    show_default=True,
    help="So many replies at once, each by a route of its own.",
)
@named("--queue", type=click.IntRange(0), default=64, show_default=True, help="Replies that may wait.")
@named(
    "--cache-mb",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Room for earlier conversations; for one reply at a time.",
)
@named(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True, help="Seconds for a request."
)
@named(
    "--grace", type=click.FloatRange(0), default=30, show_default=True, help="Seconds for running replies at the end."
)
@named(
    "--keep-alive",
    type=click.IntRange(1, 86_400),
    default=75,
    show_default=True,
    metavar="SECONDS",
    help="So long a connection stays open without a request; longer than a proxy in front keeps it.",
)
@named(
    "--idle",
    type=Duration(),
    metavar="TIME",
    help="Unload the models after so long without a request, such as 10m; the next one loads them again.",
)
@served_options
def serve(
    models: Path,
    host: str,
    port: int,
    api_key: str | None,
    insecure: bool,
    allow_host: tuple[str, ...],
    alias: tuple[str, ...],
    cors: tuple[str, ...],
    parallel: int,
    queue: int,
    cache_mb: int,
    timeout: float,
    grace: float,
    keep_alive: int,
    idle: float | None,
    **given: Any,
) -> None:
    """Serve the ensemble by the OpenAI protocol, and a page to chat with it at /.

    The sampling options are what holds for requests that do not say otherwise. SIGTERM and Ctrl-C let running replies
    finish; SIGHUP, or POST /admin/reload with the key, takes a changed models.toml. With --parallel, numbers depend a
    little on what is evaluated together: a seed then says a reply only up to llama.cpp's rounding, which with quantised
    models is enough to change most of them.
    """
    try:
        from me_local.server.app import Access
        from me_local.server.keeping import Keeper, Limits
        from me_local.server.serving import Loading, Server, address_of, bind
    except ImportError as error:
        raise ConfigError(f'serve needs {error.name}: pip install "me-local[server]"') from None
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
        raise ConfigError("--api-key: must be printable ASCII, and not empty")
    config = configured(models, dict(given))
    access = Access(api_key, allow_host, cors, alias)
    limits = Limits(queue, cache_mb * 2**20, timeout, grace, keep_alive, idle)
    with bind(host, port, guarded=insecure or api_key is not None) as listener:
        with Loading(listener):
            ensemble = load(config, batch=parallel)
        told = _once(partial(click.echo, err=True))
        keeper = Keeper(_noticed(ensemble, told), _source(models, given, parallel, told), limits)
        del ensemble  # it is the keeper's, and may be unloaded

        def ready() -> None:
            many = f"{parallel} replies at once; " if parallel > 1 else ""
            names, address = " + ".join(keeper.about.names), address_of(listener)
            click.echo(f"serving {names} at {address} ({many}Ctrl-C ends)", err=True)

        Server(keeper, access, limits, ready).serve_on(listener)


def _source(models: Path, given: dict[str, Any], parallel: int, told: Callable[[str], None]) -> "Source":
    """Where the server has its models from when it loads them again, in threads."""
    from me_local.server.keeping import Source

    context = click.get_current_context()

    def read() -> Config:
        with context.scope(cleanup=False):
            return configured(models, dict(given))

    def loaded(config: Config) -> tuple[Ensemble, Callable[[], None]]:
        return _noticed(Ensemble(config, batch=parallel, check=checks(context)), told)

    return Source(read, loaded, partial(click.echo, err=True))


def _once(write: Callable[[str], None]) -> Callable[[str], None]:
    """Writes each line the first time: models that are loaded again have no news."""
    written: set[str] = set()

    def tell(line: str) -> None:
        if line not in written:
            written.add(line)
            write(line)

    return tell


def _noticed(ensemble: Ensemble, told: Callable[[str], None]) -> tuple[Ensemble, Callable[[], None]]:
    """An ensemble, after its notices, and what tells those that its replies add."""
    notices = Notices(ensemble, told)
    notices.tell()
    return ensemble, notices.tell
