"""`me-local inspect`: what the members are and take up, and how well their vocabularies go together."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from me_local.cli.display import make_console, print_json
from me_local.cli.input import argument_text
from me_local.cli.options import described, load, models_option
from me_local.cli.prompts_shown import print_prompts, print_templates
from me_local.decoding.losses import Loss, first_loss
from me_local.errors import InputError
from me_local.llama.devices import free_gpu_memory
from me_local.llama.member import Member
from me_local.measuring.advice import advise
from me_local.measuring.cost import SEVERAL, steps
from me_local.measuring.inspection import MemberReport, PairReport, compare, inspect_member, longest_that_fits
from me_local.system.machine import available_memory

Room = dict[str, int | None]
"""How many bytes are free in memory, and on GPUs: None where nobody knows, or there are none."""

_UNFOLDED = 10_000  # columns; a table takes no more of them than it needs

_LEGEND = """\
shared     pieces that both have, of those that either has
a in b     pieces of a that b has too, of all that a has; b in a likewise
same cuts  places in a sample text where both cut it, of those where either does"""


@click.command()
@models_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes are in bytes, contexts in tokens.")
@click.option("--template", is_flag=True, help="Print each member's chat template instead.")
@click.option("--prompt", metavar="MESSAGE", help="Print what each member sees of this message instead.")
def inspect(models: Path, as_json: bool, template: bool, prompt: str | None) -> None:
    """Show what the members are and take up, how well their vocabularies go together, and what could be changed."""
    if template and prompt is not None:
        raise InputError("--template and --prompt: one of the two")
    if template:
        print_templates(described(models).members, as_json=as_json)
    elif prompt is not None:
        with load(described(models)) as ensemble:
            print_prompts(ensemble, argument_text(prompt, "--prompt"), as_json=as_json)
    else:
        _report(models, as_json=as_json)


def _report(models: Path, *, as_json: bool) -> None:
    with load(described(models)) as ensemble:
        writers = zip(ensemble.members, ensemble.writers, strict=True)
        members = [
            inspect_member(
                member, first_loss(member, writer), writer.kinds, steps(member) if isinstance(member, Member) else None
            )
            for member, writer in writers
        ]
        pairs = [compare(a, b) for a, b in combinations(ensemble.members, 2)]
        room = {"free": available_memory(), "free_on_gpus": free_gpu_memory()}
    advice = advise(members, pairs, room["free"] if room["free_on_gpus"] is None else None)
    if as_json:
        lists = {"members": [asdict(m) for m in members], "pairs": [asdict(p) for p in pairs]}
        print_json({**lists, "memory": room, "advice": advice})
    else:
        _print(members, pairs, room)
    for note in (*ensemble.notices, *(_warning(pair) for pair in pairs if pair.risky)):
        click.echo(note, err=True)
    for sentence in advice:
        click.echo(f"Advice: {sentence}", err=True)


def _print(members: Sequence[MemberReport], pairs: Sequence[PairReport], room: Room) -> None:
    console = make_console()
    if not console.is_terminal:
        console.width = _UNFOLDED
    for member in members:
        console.print(Text(member.name, style="bold"))
        console.print(_member_table(member, room))
        console.print()
    console.print(_together(members, room), soft_wrap=True)
    console.print()
    if pairs:
        _print_pairs(console, pairs)


def _together(members: Sequence[MemberReport], room: Room) -> str:
    """What all members take up, each file once, and how much is free beside it."""
    files = {member.path: member.weights_bytes or 0 for member in members}
    contexts = sum((member.kv_cache_bytes or 0) + (member.working_bytes or 0) for member in members)
    free = [f"{decimal(room['free'])} of memory"] if room["free"] is not None else []
    free += [f"{decimal(room['free_on_gpus'])} of GPUs"] if room["free_on_gpus"] is not None else []
    beside = f"; free beside them: {', '.join(free)}" if free else ""
    return f"together: {decimal(sum(files.values()))} of weights, {decimal(contexts)} of contexts{beside}"


def _print_pairs(console: Console, pairs: Sequence[PairReport]) -> None:
    console.print(_pair_table(pairs))
    console.print()
    console.print(_LEGEND)
    if all(pair.same_vocabulary for pair in pairs):
        console.print("One vocabulary: pieces are token ids.")


def _member_table(member: MemberReport, room: Room) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(member, room):
        table.add_row(f"  {label}", value)
    return table


def _rows(member: MemberReport, room: Room) -> list[tuple[str, str]]:
    return [
        ("file", Path(member.path).name),
        ("architecture", member.architecture),
        *(_rows_of_engine(member) if member.address else _rows_of_weights(member)),
        ("context", f"{member.context:,} tokens, trained with {member.trained_context:,}"),
        ("vocabulary", f"{member.vocabulary}, {member.vocabulary_size:,} tokens{_pre_tokenizer(member)}"),
        ("template", f"{Path(member.template).name}{' (a base model?)' if member.base else ''}"),
        ("ends a reply", "  ".join(member.end_tokens) or "-"),
        ("thinks", ", ".join(f"{opening} … {closing}" for opening, closing in member.thinks) or "-"),
        ("writes", "  ".join(member.writes) or "-"),
        *([] if member.address else _rows_of_memory(member, room)),
    ]


def _pre_tokenizer(member: MemberReport) -> str:
    if member.vocabulary != "BPE":
        return ""
    return f", parted as {member.pre_tokenizer} does" if member.pre_tokenizer else ", no pre-tokenizer"


def _rows_of_engine(member: MemberReport) -> list[tuple[str, str]]:
    cache = {True: "on", False: "off", None: "it does not say"}[member.prefix_cache]
    return [
        ("engine", f"{member.engine} at {member.address}"),
        ("slots", f"{member.slots:,}"),
        ("a step", f"{_step(member)}, the way there and back included"),
        ("prefix cache", cache),
    ]


def _rows_of_weights(member: MemberReport) -> list[tuple[str, str]]:
    return [
        ("size", f"{_size(member.weights_bytes)}, {member.parameters:,} parameters"),
        ("quantisation", str(member.quantisation)),
    ]


def _rows_of_memory(member: MemberReport, room: Room) -> list[tuple[str, str]]:
    return [
        ("cannot write", _lost(member.lost)),
        ("attention", str(member.memory)),
        ("KV cache", _size(member.kv_cache_bytes)),
        ("batch buffer", _size(member.working_bytes)),
        ("memory", _size(member.total_bytes)),
        ("a step", _step(member)),
        ("room for", _room_for(member, room)),
    ]


def _step(member: MemberReport) -> str:
    """What a token takes and gives, and what several at once take."""
    if not member.step_seconds:
        return "-"
    several = f", {SEVERAL} tokens at once {1e3 * member.several_seconds:.1f}" if member.several_seconds else ""
    speed = f"{member.bytes_per_token:.1f} bytes of text, {member.bytes_per_token / member.step_seconds:,.0f} a second"
    return f"{1e3 * member.step_seconds:.1f} ms{several}; {speed}"


def _room_for(member: MemberReport, room: Room) -> str:
    free = room["free"] if room["free_on_gpus"] is None else room["free_on_gpus"]
    longest = None if free is None else longest_that_fits(member, free)
    if longest is None:
        return "-"
    return f"{longest:,} tokens{', all that it was trained with' if longest == member.trained_context else ''}"


def _lost(loss: Loss | None) -> str:
    if loss is None or not loss.token:
        return "-"
    return f"{loss.share:.1%} of its first prediction: control tokens, first of all {loss.token}"


def _pair_table(pairs: Sequence[PairReport]) -> Table:
    table = Table("a", "b", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("shared", "a in b", "b in a", "same cuts"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for pair in pairs:
        shares = (pair.shared_pieces, pair.first_in_second, pair.second_in_first, pair.agreement)
        remark = "one vocabulary" if pair.same_vocabulary else "risky" if pair.risky else ""
        table.add_row(pair.first, pair.second, *(f"{share:.1%}" for share in shares), remark)
    return table


def _warning(pair: PairReport) -> str:
    return (
        f"Warning: {pair.first} and {pair.second} cut a text at the same places only {pair.agreement:.0%} of the time: "
        "where one has written a piece, the other often has to go on from inside a word that it would never cut there"
    )


def _size(count: int | None) -> str:
    return "-" if count is None else decimal(count)
