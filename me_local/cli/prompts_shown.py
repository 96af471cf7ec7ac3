"""What members see: their chat templates, and their prompts with control tokens made visible."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.text import Text

from me_local.cli.display import make_console, print_json
from me_local.config import MemberConfig, is_template_file
from me_local.ensemble import Ensemble
from me_local.errors import LoadError
from me_local.gguf import DamagedError
from me_local.llama.weights import checked_file
from me_local.model import LoadedModel
from me_local.stores.facts import Reader

_LEFT, _RIGHT = "⟦", "⟧"
_LEGEND = f"{_LEFT}…{_RIGHT} is a control token; all else is text."


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a prompt: a control token by its name, or the text of `tokens` tokens between two of them."""

    text: str
    control: bool
    tokens: int


def print_templates(members: Sequence[MemberConfig], *, as_json: bool) -> None:
    """Print each member's chat template. Raises LoadError."""
    templates = [_template(member) for member in members]
    if as_json:
        names = ("name", "from", "template")
        print_json(
            [dict(zip(names, (m.name, *found), strict=True)) for m, found in zip(members, templates, strict=True)]
        )
        return
    console = make_console()
    for member, (source, text) in zip(members, templates, strict=True):
        console.print(Text(f"{member.name}: {source}", style="bold"))
        if text is not None:
            click.echo(text.removesuffix("\n"))
        console.print()


def _template(member: MemberConfig) -> tuple[str, str | None]:
    """Where it is from, and its source, if it has one."""
    wanted = member.chat_template
    if wanted and is_template_file(wanted):
        try:
            return wanted, Path(wanted).read_text("utf-8", "replace")
        except OSError as error:
            raise LoadError(f'member "{member.name}": chat_template = {wanted}: {error.strerror}') from None
    if wanted:
        return ("a plain transcript, as models.toml has it" if wanted == "plain" else f"llama.cpp's {wanted}"), None
    path = checked_file(member)
    try:
        template = Reader().read([path]).template
    except DamagedError as error:
        raise LoadError(f'member "{member.name}": {path}: {error}') from None
    return ("in the GGUF", template) if template else ("none in the GGUF, so it sees a plain transcript", None)


def print_prompts(ensemble: Ensemble, message: str, *, as_json: bool) -> None:
    """Print what each member sees of a conversation that begins with the message. Raises InputError."""
    prompts = ensemble.prompter.asked(message, ensemble.config, raw=False)
    head = prompts.head.decode("utf-8", "replace")
    seen = [list(_parts(member, ids.tolist())) for member, ids in zip(ensemble.members, prompts.ids, strict=True)]
    if as_json:
        pairs = zip(ensemble.names, seen, strict=True)
        print_json([{"name": name, "parts": [asdict(part) for part in parts], "reply": head} for name, parts in pairs])
        return
    console = make_console()
    for name, parts in zip(ensemble.names, seen, strict=True):
        console.print(Text(f"{name}: {sum(part.tokens for part in parts):,} tokens", style="bold"))
        marked = [(f"{_LEFT}{p.text}{_RIGHT}", "cyan") if p.control else (p.text, "") for p in parts]
        console.print(Text.assemble(*marked), soft_wrap=True)
        console.print()
    if head:
        console.print(f"All replies begin with: {head}", soft_wrap=True)
    console.print(_LEGEND)


def _parts(member: LoadedModel, ids: Sequence[int]) -> Iterator[Part]:
    vocabulary = member.vocabulary
    control = set(vocabulary.control.values()) | set(vocabulary.end_ids)
    start = 0
    for i, token in enumerate([*ids, None]):
        if token is not None and token not in control:
            continue
        if start < i:
            yield Part(vocabulary.joined(ids[start:i]).decode("utf-8", "replace"), control=False, tokens=i - start)
        if token is not None:
            yield Part(vocabulary.text_of(token), control=True, tokens=1)
        start = i + 1
