"""What could be changed about an ensemble, in a sentence each, where something is known to go wrong in practice.

Judges the reports of `inspection`; measures nothing itself.
"""

from collections.abc import Iterator, Sequence

from rich.filesize import decimal

from me_local.measuring.cost import SEVERAL
from me_local.measuring.inspection import MemberReport, PairReport

_SHORT = 2048  # tokens, which a conversation soon fills
_SLOW = 0.8  # of what tokens take one by one


def advise(members: Sequence[MemberReport], pairs: Sequence[PairReport], free: int | None) -> list[str]:
    """Sentences on members, on pairs and on all together; `free` is how many bytes of memory are, where that is known.

    The weights of members that are loaded may still count as free: their pages can go back to the file.
    """
    found = [sentence for member in members for sentence in _on_member(member)]
    found += [
        f"{pair.first} and {pair.second}: a model of the other's family in the place of one of them would cut a text "
        'as it does; or try unit = "word", by which each writes whole words'
        for pair in pairs
        if pair.risky
    ]
    return [*found, *_on_all(members, free)]


def _on_member(member: MemberReport) -> Iterator[str]:
    if member.base and member.template == "plain":
        yield (
            f"{member.name}: it seems to be a base model, as it has no chat template: for conversations its instruct "
            "version would do better; if it is one, name its template by chat_template"
        )
    if member.vocabulary == "BPE" and not member.pre_tokenizer:
        yield (
            f"{member.name}: its file names no pre-tokenizer, so llama.cpp may cut texts otherwise than in its "
            "training: take a file that was converted more recently, or its tokenizer.json (tokenizer in models.toml)"
        )
    if member.context < _SHORT:
        longer = min(member.trained_context, 4096)
        what = f"it was trained with {member.trained_context:,}" if longer <= member.context else f"n_ctx = {longer}"
        remedy = "no setting changes that" if longer <= member.context else "gives it more"
        yield f"{member.name}: {member.context:,} tokens of context are soon full: {what}, {remedy}"
    if (
        member.step_seconds
        and member.several_seconds
        and member.several_seconds > _SLOW * SEVERAL * member.step_seconds
    ):
        yield (
            f"{member.name}: {SEVERAL} tokens at once take {member.several_seconds / member.step_seconds:.1f} times as "
            f"long as one, so prompts, and what it missed while others wrote, are slow: {member.quantisation} seems to "
            "have no fast path for several tokens on this processor; others, such as Q4_0 or Q4_K_M, may have one"
        )
    if member.lost and member.lost.matters:
        yield (
            f"{member.name}: {member.lost.share:.0%} of what it would begin a reply with are control tokens that no "
            f"member can write here, first of all {member.lost.token}: another chat_template, template_args or a "
            "smaller weight"
        )


def _on_all(members: Sequence[MemberReport], free: int | None) -> Iterator[str]:
    thinking = [member.name for member in members if member.thinks]
    if 0 < len(thinking) < len(members):
        others = ", ".join(member.name for member in members if not member.thinks)
        yield (
            f"{', '.join(thinking)} may think before an answer, which {others} never learnt: template_args = "
            "{ enable_thinking = false }, where a template knows it, lets all answer at once"
        )
    contexts = sum((member.kv_cache_bytes or 0) + (member.working_bytes or 0) for member in members)
    weights = sum({member.path: member.weights_bytes or 0 for member in members}.values())
    if free is not None and weights > free:
        yield (
            f"all weights take {decimal(weights)}, and {decimal(free)} are free beside {decimal(contexts)} of "
            "contexts: they are read from the disk again and again; take smaller quantisations or smaller models"
        )
