"""A models.toml of members that were chosen, with comments that say why and what to change."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import tomlkit

from me_local.cli.streams import printable
from me_local.config import Config, MemberConfig
from me_local.errors import InputError

_TOP = """\
# Written by me-local init. `me-local chat` in this folder begins a conversation, `me-local inspect` says more of the
# members, `me-local bench` how fast they are. docs/models-toml.md describes every key.

[ensemble]
strategy = "{strategy}"         # "me": one model per piece; "ce": all of them, averaged: the same distribution, slower

[sampling]
temperature = {temperature}       # 0: always the likeliest piece of each member
top_k = {top_k}
repeat_penalty = {repeat_penalty}    # small models loop without it at low temperatures; 1: off
max_tokens = {max_tokens}        # pieces in a reply at most
"""
_WIDTH = 118
_WEIGHT = "# shares: by `me-local fit --data FILE --write` those that predict texts of yours best"
_CONTEXT = "# tokens of a conversation that it sees; more take more memory"


def models_toml(config: Config, reasons: Sequence[str], folder: Path) -> str:
    """The file as text, for a folder, with a sentence on each member; "" where there is nothing to say.

    Raises InputError for a name that no TOML can hold.
    """
    sampling = config.members[0].sampling
    top = _TOP.format(
        strategy=config.strategy,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        repeat_penalty=sampling.repeat_penalty,
        max_tokens=config.max_tokens,
    )
    members = zip(config.members, reasons, strict=True)
    return "\n".join([top, *(_member(member, reason, folder) for member, reason in members)])


def _member(member: MemberConfig, reason: str, folder: Path) -> str:
    lines = wrap(printable(reason), _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    lines += ["[[members]]", f"name = {_quoted(member.name)}"]
    for key, path in (("path", member.path), ("lora", member.lora)):
        lines += [f"{key} = {_quoted(_below(path, folder))}"] if path else []
    for key, text in (("hf", member.hf), ("url", member.url)):
        lines += [f"{key} = {_quoted(text)}"] if text else []
    lines.append(f"weight = {round(member.weight, 6)}          {_WEIGHT}")
    if not member.url:
        lines.append(f"n_ctx = {member.n_ctx}          {_CONTEXT}")
    return "\n".join(lines) + "\n"


def _below(path: Path, folder: Path) -> str:
    """The path as it stands in a file of the folder: relative where it lies below."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _quoted(text: str) -> str:
    """The text in TOML, which is UTF-8. Raises InputError."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{text}: no models.toml can name it, as it is not UTF-8: give it another name")
    return tomlkit.string(text).as_string()
