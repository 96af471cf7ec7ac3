"""Options that several commands have, and what they make of them."""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from me_local.checks import argument
from me_local.cli.display import make_console
from me_local.cli.interrupt import leaves_at_once
from me_local.cli.shaping import Lines, Option, each_option, take_shaping
from me_local.config import Config, MemberConfig, Overrides, load_config, override
from me_local.engines.loading import Doing
from me_local.ensemble import Ensemble
from me_local.errors import ConfigError, InputError, LoadError
from me_local.llama.context import MOST_SEQUENCES
from me_local.llama.weights import Shelf
from me_local.measuring.cost import Way, choose_batch
from me_local.mixture.routing import Stretch
from me_local.settings import parse_weights
from me_local.stores.catalogue import entries
from me_local.stores.members import config_of

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

STANDARD = Path("-")
"""What a FilePath gives for "-": told by identity from a file of this name, which is given as ./-."""


class FilePath(click.Path):
    """The path of a file; ~ is the home also where no shell replaces it: behind "=" and in the environment."""

    def __init__(self, *, allow_dash: bool = False, dir_okay: bool = False) -> None:
        super().__init__(path_type=Path, allow_dash=allow_dash, dir_okay=dir_okay)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The value as a Path."""
        if value == "-" and self.allow_dash:
            return STANDARD
        return super().convert(os.path.expanduser(value), parameter, context)


class Duration(click.types.StringParamType):
    """A time such as 90s, 10m or 1h, in seconds; a number alone is seconds."""

    name = "time"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The value in seconds."""
        found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smhd]?)", str(value), re.ASCII)
        seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2] or "s"] if found else 0.0
        if not seconds:
            self.fail(f"{value!r} is no time: it looks like 90s, 10m or 1h", parameter, context)
        return seconds


def named(*names: str, **attributes: Any) -> Decorator:
    """An option that an environment variable of its name sets, too.

    So is each that describes models, replies or the server: what one would want to hold for many runs. What a single
    run reads, writes and prints is said on its command line.
    """
    kind = attributes.pop("cls", Option)
    return click.option(*names, cls=kind, envvar=variable_of(names[0]), show_envvar=True, **attributes)


def variable_of(name: str) -> str:
    """The environment variable of an option such as "--top-k" or "--parallel/--no-parallel"."""
    return "ME_LOCAL_" + name.split("/")[0].strip("-").replace("-", "_").upper()


def _read_arguments(_: click.Context, __: click.Parameter, given: Sequence[str]) -> dict[str, object] | None:
    """The values of --template-arg, by their names; None where there is none. Raises ConfigError."""
    return dict(argument(text, "--template-arg") for text in given) or None


_MODELS = named(
    "--models",
    type=FilePath(dir_okay=True),
    default=Path("models.toml"),
    show_default=True,
    help="The file that describes the ensemble.",
)

_WEIGHTS = named("--weights", metavar="W", help="Weights of the members: 0.7,0.3 or a=0.7,b=0.3.")

_TEMPLATE_ARG = named(
    "--template-arg",
    "template_args",
    metavar="NAME=VALUE",
    type=Lines(),
    multiple=True,
    callback=_read_arguments,
    help="A variable for chat templates, such as enable_thinking=false; may be given several times.",
)


class _PresetName(click.types.StringParamType):
    """The name of a preset; a shell completes those of the file that the line names."""

    name = "name"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        with suppress(ConfigError):
            names = load_config(Path(ctx.params.get("models") or "models.toml")).presets
            return [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return []


_SAMPLING: list[Decorator] = [
    named("--preset", type=_PresetName(), help="The settings [presets.NAME] of models.toml; options go before them."),
    named(
        "--strategy",
        type=click.Choice(["me", "ce", "union"]),
        help="me: one member per piece; ce: all of them, averaged; union: ce as UniTE does it, to compare; "
        "me cannot have its distribution.",
    ),
    named(
        "--unit",
        type=click.Choice(["token", "word"]),
        help="word: a member writes whole words, which vocabularies cut differently (me only).",
    ),
    _WEIGHTS,
    named("--seed", type=int, help="Makes a reply repeatable."),
    named("--decode", type=click.Choice(["sample", "argmax"]), help="argmax: the mixture's best piece (not for me)."),
    named(
        "--draft",
        metavar="[none|ngram|MEMBER]",
        help="What guesses how a reply goes on, so that one evaluation may give several pieces: ngram, that texts "
        "repeat; a member, what it would write itself. No guess changes what replies are like.",
    ),
    named("--max-tokens", type=int, help="The largest number of pieces in a reply."),
    named("--stop", type=Lines(), multiple=True, help="End the reply before this text; may be given several times."),
    named("--system", help="The system message."),
    _TEMPLATE_ARG,
    *each_option(named),
]

_PARALLEL = named(
    "--parallel/--no-parallel", default=None, help="CE's members at the same time, or in turn; else the faster."
)


_NO_MODELS = (
    "name them with -m MODEL (me-local models lists those on this machine), name a file that describes them with "
    "--models FILE, or let me-local init write a models.toml here"
)
_MEMBERS = "me_local.members"


class _MemberText(Lines):
    """A model as --member takes it; an environment variable holds several, parted and quoted as in a shell."""

    name = "model"

    def split_envvar_value(self, rv: str) -> list[str]:
        try:
            return shlex.split(rv)
        except ValueError as error:
            raise ConfigError(f"{variable_of('--member')}: {str(error).lower()}") from None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Models of the stores on this machine; else files, which would take away what else there is in bash."""
        return model_names(incomplete)


def model_names(incomplete: str) -> list[CompletionItem]:
    """What a shell offers as the name of a model that begins so."""
    found = [entry for entry in entries() if not entry.problem] if incomplete else []
    names = [entry.name for entry in found if entry.name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def _note_members(ctx: click.Context, _: click.Parameter, value: tuple[str, ...]) -> None:
    ctx.meta[_MEMBERS] = value


_MEMBER = named(
    "--member",
    "-m",
    type=_MemberText(),
    multiple=True,
    metavar="MODEL[:W]",
    expose_value=False,
    callback=_note_members,
    help="A model of the ensemble instead of a file, and its weight: a path, ollama:NAME, lmstudio:NAME, "
    "hf:OWNER/REPO:FILE, or URL=FILE; once for each.",
)

_NO_CHECK = "me_local.no_check"


def _note_no_check(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_NO_CHECK] = value


_CHECK = named(
    "--no-check",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_note_no_check,
    help="Do not try files that are used for the first time in a process of their own.",
)


def no_check_option(command: Command) -> Command:
    """Add --no-check."""
    return _CHECK(command)


def models_option(command: Command) -> Command:
    """Add --models and --member, and what holds wherever models are loaded."""
    return _MODELS(_MEMBER(_CHECK(command)))


def weights_option(command: Command) -> Command:
    """Add --weights."""
    return _WEIGHTS(command)


def template_option(command: Command) -> Command:
    """Add --template-arg."""
    return _TEMPLATE_ARG(command)


def raw_option(command: Command) -> Command:
    """Add --raw, for prompts in a file."""
    help_ = "Take prompts as they stand, without chat templates."
    return click.option("--raw", is_flag=True, help=help_)(command)


def sampling_options(command: Command) -> Command:
    """Add the options that override [ensemble] and [sampling] of models.toml."""
    return served_options(_PARALLEL(command))


def served_options(command: Command) -> Command:
    """The same without --parallel, which means something else to the server."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def described(models: Path) -> Config:
    """The ensemble that the options of `models_option` describe. Raises ConfigError."""
    context = click.get_current_context()
    source, of_members = (context.get_parameter_source(name) for name in ("models", "member"))
    if members := context.meta[_MEMBERS]:
        if source == of_members:
            raise ConfigError("--member and --models: name an ensemble by one of the two")
        if source != ParameterSource.COMMANDLINE:
            return config_of(members)
    if source == ParameterSource.DEFAULT and not models.exists():
        raise ConfigError(f"no models: {_NO_MODELS}")
    return load_config(models)


def configured(models: Path, given: dict[str, Any]) -> Config:
    """The configuration of `described`, with the options of `sampling_options` before it. Raises ConfigError."""
    config = described(models)
    given = take_shaping(given)
    weights, stop = given.pop("weights"), given.pop("stop")
    return override(with_weights(config, weights), Overrides(stop=stop or None, **given))


def with_weights(config: Config, weights: str | None) -> Config:
    """The configuration with the value of --weights, if it is given. Raises ConfigError."""
    if weights is None:
        return config
    return override(config, Overrides(weights=parse_weights(weights, [member.name for member in config.members])))


def batch_option(command: Command) -> Command:
    """Add --batch."""
    help_ = "So many replies at once; auto: as many as are worth while."
    return click.option("--batch", metavar="N", help=help_)(command)


def route_option(command: Command) -> Command:
    """Add --route."""
    help_ = "shared: replies at once draw the same members, which keeps ME's gain; own: each its own."
    return named("--route", type=click.Choice(["shared", "own"]), help=help_)(command)


@contextmanager
def load_many(
    config: Config, batch: str | None, count: int, earlier: Iterable[Stretch | None] = ()
) -> Iterator[Ensemble]:
    """Load an ensemble for the replies of --batch, of which there are `count` in all, and say how they are made.

    Where a run goes on that took a shared route (`earlier`), "auto" is what it was there.
    """
    if batch == "auto":
        batch = "1" if count == 1 else next((str(stretch.batch) for stretch in earlier if stretch), batch)
    if batch != "auto":
        wanted = min(_batch(batch or "1"), max(1, count))
        with load(config, batch=wanted) as ensemble:
            _tell(ensemble)
            yield ensemble
        return
    with closing(Shelf()) as shelf:
        with load(config, shelf=shelf) as single:
            weights = [member.weight for member in config.members]
            way: Way = "ce" if config.strategy != "me" else "me shared" if single.may_share_route(config) else "me own"
            wanted = choose_batch(single.members, weights, way, max(1, count))
        with _that_fits(config, wanted, shelf) as ensemble:
            _tell(ensemble)
            yield ensemble


def _that_fits(config: Config, wanted: int, shelf: Shelf) -> Ensemble:
    """An ensemble for so many replies at once, or half of them and so on. Raises LoadError where not even one fits."""
    try:
        return load(config, batch=wanted, shelf=shelf)
    except LoadError:
        if wanted == 1:
            raise
        return _that_fits(config, wanted // 2, shelf)


def _batch(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= MOST_SEQUENCES:
        raise InputError(f'--batch: must be a number from 1 to {MOST_SEQUENCES}, or "auto", got "{text}"')
    return int(text)


def _tell(ensemble: Ensemble) -> None:
    if ensemble.batch == 1:
        return
    how = ""
    if ensemble.config.strategy == "me":
        how = ", all by the same route" if ensemble.shares_route(ensemble.config) else ", each by a route of its own"
    click.echo(f"{ensemble.batch} replies at once{how}", err=True)


def load(config: Config, *, no_color: bool = False, batch: int = 1, shelf: Shelf | None = None) -> Ensemble:
    """Load an ensemble while stderr, if it is a terminal, shows which member is being loaded."""
    console = make_console(no_color=no_color, stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with (
        leaves_at_once(console),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        tasks: list[Any] = []

        def announce(member: MemberConfig, doing: Doing) -> None:
            if tasks:
                progress.stop_task(tasks[-1])
            source = member.path.name if member.path else member.hf
            number = config.members.index(member) + 1
            first = ", used for the first time" if doing == "checking" else ""
            of_all = f"({number} of {len(config.members)})"
            tasks.append(progress.add_task(f"{doing} {member.name} {of_all}: {source}{first}"))

        return Ensemble(config, announce, batch=batch, shelf=shelf, check=checks(click.get_current_context()))


def checks(context: click.Context) -> bool:
    """Whether files that are used for the first time are tried before: not where --no-check was given."""
    return not context.meta.get(_NO_CHECK)
