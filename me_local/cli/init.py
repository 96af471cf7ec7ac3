"""`me-local init`: from the models on this machine to a models.toml that works."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import click
from click.shell_completion import CompletionItem
from rich.filesize import decimal
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from me_local.chat import Chat
from me_local.cli.display import Painter, make_console
from me_local.cli.menu import Menu
from me_local.cli.models import shown_name
from me_local.cli.models_toml import models_toml
from me_local.cli.options import FilePath, load, model_names, no_check_option
from me_local.cli.session import Session
from me_local.config import Config, Overrides, normalised, override
from me_local.errors import InputError, LoadError, RunError
from me_local.gguf import part_names
from me_local.llama.devices import free_gpu_memory
from me_local.measuring.cuts import Cuts
from me_local.measuring.inspection import compare
from me_local.measuring.proposing import Candidate, Room, candidate, candidates, propose, reasons, weights_of
from me_local.stores.catalogue import found, look
from me_local.stores.entry import Entry
from me_local.stores.facts import Reader
from me_local.stores.folders import VARIABLE
from me_local.stores.members import config_of
from me_local.system.machine import available_memory

_NOTHING = (
    "no models are on this machine: `ollama pull qwen3:4b`, LM Studio or `hf download OWNER/REPO FILE.gguf` bring "
    f"some, and {VARIABLE} names folders with GGUF files (me-local models shows what is found)"
)
_COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
_TEMPERATURE = 0.7
_SMALL, _PENALTY = 1_000_000_000, 1.1  # parameters; models below it loop at this temperature
_QUESTION, _MOST_PIECES = "What is the capital of France?", 48


class _Names(click.types.StringParamType):
    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return model_names(incomplete)


@click.command()
@click.argument("names", nargs=-1, type=_Names(), metavar="[MODEL[:W]]...")
@click.option("--yes", is_flag=True, help="Take the proposal without asking.")
@click.option("--output", type=FilePath(), default=Path("models.toml"), show_default=True, help="The file to write.")
@no_check_option
def init(names: tuple[str, ...], yes: bool, output: Path) -> None:
    """Choose an ensemble from the models on this machine, try it, and write a models.toml.

    Proposes two models that fit this machine's memory and go well together; on a terminal the arrow keys choose others.
    With names, as -m takes them, these are the members, and nothing is asked. A file that exists is left as it is.
    """
    _require_new(output)
    cuts = Cuts()
    room = _room()
    models = candidates(found())
    chosen = names or _chosen(models, room, cuts, yes=yes)
    config = config_of(chosen)
    known = _known(config, models)
    if not names:
        weighted = zip(config.members, weights_of(known), strict=True)
        members = tuple(replace(member, weight=weight) for member, weight in weighted)
        config = replace(config, members=normalised(members, "init"))
    config = _fitted(config, known)
    why = _explained(config, known, room, cuts)
    text = models_toml(config, why, Path.cwd() / output.parent)
    _try(config)
    _write(output, text)


def _require_new(output: Path) -> None:
    """Raise InputError where the file cannot, or must not, be written."""
    if output.exists() or output.is_symlink():
        raise InputError(
            f"{output}: it exists already, and is left as it is: move it away, or name another by --output"
        )
    if not output.parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}")


def _room() -> Room:
    gpu = free_gpu_memory()
    return Room(available_memory(), gpu=False) if gpu is None else Room(gpu, gpu=True)


def _chosen(models: Sequence[Candidate], room: Room, cuts: Cuts, *, yes: bool) -> list[str]:
    """The names of the models that are proposed, or of those that the user chooses."""
    if not models:
        raise InputError(_NOTHING)
    console = make_console(stderr=True)
    with Progress(*_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task("comparing the models on this machine")
        proposal = propose(models, room, cuts.agreement)
    for note in proposal.notes:
        _say(f"Note: {note}")
    if yes:
        if not proposal.members:
            raise InputError("there is no ensemble to propose")
        return [one.name for one in proposal.members]
    picked = _menu(models, [models.index(one) for one in proposal.members], room).choose()
    if picked is None:
        click.echo("nothing is written", err=True)
        click.get_current_context().exit(130)
    return [models[i].name for i in picked]


def _menu(models: Sequence[Candidate], proposed: list[int], room: Room) -> Menu:
    names = [shown_name(one.name) for one in models]
    width = max(map(len, names))

    def row(name: str, one: Candidate) -> str:
        kind = "base model" if not one.chats else "thinks" if one.facts.thinks else ""
        return f"{name:<{width}}  {one.facts.count:>7}  {one.facts.quantisation:<7} {decimal(one.needs):>9}  {kind}"

    def sums(chosen: Sequence[int]) -> str:
        members = [models[i] for i in chosen]
        few = "" if room.holds(members) else ": too much"
        needed = decimal(sum(one.needs for one in members))
        return f"{len(members)} chosen, {needed} in memory, and {room}{few}"

    return Menu(
        [row(*pair) for pair in zip(names, models, strict=True)],
        proposed,
        lambda i: reasons([models[i]], lambda *_: None)[0],
        sums,
    )


def _known(config: Config, models: Sequence[Candidate]) -> list[Candidate]:
    """Those of the members whose headers can be read: in their order."""
    by_path = {_path(one): one for one in models}
    here = [(member.path, member.name) for member in config.members if member.path and not member.url]
    known = [by_path.get(str(path)) or _of_file(path, name) for path, name in here]
    return [one for one in known if one]


def _of_file(path: Path, label: str) -> Candidate | None:
    """A file that is in no store; what is wrong with it, its loader says."""
    files = tuple(path.with_name(name) for name in part_names(path.name))
    model = look(Entry("", str(path), label, files), Reader())
    return candidate(model) if model.facts else None


def _fitted(config: Config, known: Sequence[Candidate]) -> Config:
    """The members, sampled as their sizes want it and without more context than they were trained with."""
    small = any(one.facts.parameters < _SMALL for one in known)
    config = override(config, Overrides(temperature=_TEMPERATURE, repeat_penalty=_PENALTY if small else 1.0))
    trained = {_path(one): one.facts.context for one in known}
    lengths = [min(member.n_ctx, trained.get(str(member.path), 0) or member.n_ctx) for member in config.members]
    members = zip(config.members, lengths, strict=True)
    return replace(config, members=tuple(replace(member, n_ctx=length) for member, length in members))


def _explained(config: Config, known: Sequence[Candidate], room: Room, cuts: Cuts) -> list[str]:
    """A sentence on each member, which are shown, too."""
    sentences = reasons(known, cuts.agreement)
    of_path = {_path(one): f"{shown_name(one.name)}: {why}" for one, why in zip(known, sentences, strict=True)}
    why = [of_path.get(str(member.path), "") for member in config.members]
    for member, reason in zip(config.members, why, strict=True):
        _say(f"{member.weight:.2f}  {reason or f'{member.name}: named by you'}")
    if not room.holds(known):
        _say(f"Note: they need {decimal(sum(one.needs for one in known))} together, and {room}")
    return why


def _say(text: str) -> None:
    console = make_console(stderr=True)
    console.print(text, soft_wrap=not console.is_terminal)


def _path(one: Candidate) -> str:
    return os.path.abspath(one.found.entry.files[0])


def _try(config: Config) -> None:
    """Let the members write a reply together, and say how they cut a text."""
    try:
        ensemble = load(override(config, Overrides(max_tokens=_MOST_PIECES)))
    except LoadError as error:
        raise type(error)(f"{error}; nothing is written: choose other models, me-local init MODEL MODEL") from None
    with ensemble:
        session = Session(Chat(ensemble), Painter(make_console(), ensemble.names), make_console(stderr=True))
        session.note(f"> {_QUESTION}")
        session.show(session.chat.say(_QUESTION))
        if session.last and session.last.finish_reason == "cancelled":
            session.note("nothing is written")
            click.get_current_context().exit(130)
        for pair in (compare(a, b) for a, b in combinations(ensemble.members, 2)):
            how = f"cut a text at the same places {pair.agreement:.0%} of the time{': risky' if pair.risky else ''}"
            session.note(f"{pair.first} and {pair.second} {'have one vocabulary' if pair.same_vocabulary else how}")


def _write(output: Path, text: str) -> None:
    """Write the file as a whole, or none."""
    try:
        with output.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                output.unlink()
                raise
    except OSError as error:
        raise RunError(f"{output}: {error.strerror}") from None
    named = "" if output == Path("models.toml") else f" --models {shlex.quote(str(output))}"
    click.echo(f"{output} is written. A conversation: me-local chat{named}", err=True)
