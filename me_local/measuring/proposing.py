"""Which of the models on a machine make an ensemble: chosen by their headers, the memory and how they cut a text.

Reckons; loads no weights. Sizes are in bytes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

from rich.filesize import decimal

from me_local.config import MemberConfig
from me_local.llama.memory import allocated_context, kv_cache_bytes
from me_local.measuring.inspection import RISKY_AGREEMENT
from me_local.stores.catalogue import Found
from me_local.stores.facts import Facts

Agreement = Callable[["Candidate", "Candidate"], float | None]
"""How often two cut a text at the same places, as `inspection.compare` has it; None where that cannot be told."""

CONTEXT = MemberConfig("").n_ctx
_BUFFERS = 200_000_000  # what llama.cpp takes for a batch besides: 60 to 400 MB
_UNKNOWN_CACHE = 0.1  # of the weights, for memories whose size the header does not tell
_BARELY_QUANTISED = 4.0  # bits for each number; files below lose much
_NEAR = 4  # times as many parameters; a small model beside a much larger one hardly helps it
_QUICK = 10_000_000_000  # of weights, that a processor reads some two to four times in a second
_SAME_VOCABULARY = 1.25  # so much smaller may the members be: no text is cut twice
_OF_A_BASE_MODEL = 0.25
_LOOKED_AT = 12  # pairs whose vocabularies are read


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that can be a member, its facts, and what it `needs` in memory with a context of CONTEXT tokens."""

    name: str
    label: str
    facts: Facts
    size: int
    needs: int
    found: Found

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return self.facts.template is not None


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that is free: of GPUs if there are some, of the machine otherwise; None where nobody knows."""

    free: int | None
    gpu: bool

    def holds(self, members: Iterable[Candidate]) -> bool:
        """Whether they all fit."""
        return self.free is None or sum(member.needs for member in members) <= self.free

    def __str__(self) -> str:
        """In words, for a sentence."""
        return f"{decimal(self.free or 0)} {'of GPU memory ' if self.gpu else ''}are free"


@dataclass(frozen=True, slots=True)
class Proposal:
    """The members, none where no model fits; and a sentence on each thing that is to be said of the choice."""

    members: tuple[Candidate, ...]
    notes: tuple[str, ...]


def candidate(model: Found) -> Candidate:
    """A model that has facts, as a candidate."""
    facts = model.facts
    assert facts is not None
    cells = allocated_context(CONTEXT, facts.context)
    metadata, architecture = facts.shape, facts.architecture
    window = metadata.get(f"{architecture}.attention.sliding_window", "0") != "0"
    hybrid = any(key.startswith(f"{architecture}.ssm.") for key in metadata)
    memory = "hybrid" if hybrid else "sliding window" if window else "full"
    cache = kv_cache_bytes(metadata, memory, MemberConfig(""), cells)
    cache = int(model.size * _UNKNOWN_CACHE) if cache is None else cache
    needs = model.size + cache + min(_BUFFERS, model.size)
    return Candidate(model.entry.name, model.entry.label, facts, model.size, needs, model)


def candidates(models: Iterable[Found]) -> list[Candidate]:
    """Those that can be members, the likeliest choices first: that can chat, and are large."""
    fit = [candidate(model) for model in models if model.facts and not model.problem]
    return sorted(fit, key=lambda one: (not one.chats, -one.facts.parameters, one.size))


def distinct(models: Sequence[Candidate]) -> list[Candidate]:
    """One file of each model: of several quantisations the smallest with four bits for a number, if there is one."""
    best: dict[tuple[str, str, int], Candidate] = {}
    for one in models:
        key = (one.facts.title or one.label, one.facts.architecture, one.facts.parameters)
        if key not in best or _file_key(one) < _file_key(best[key]):
            best[key] = one
    return [one for one in models if one in best.values()]


def _file_key(one: Candidate) -> tuple[bool, float]:
    bits = 8 * one.size / max(1, one.facts.parameters)
    return (True, -bits) if bits < _BARELY_QUANTISED else (False, bits)


def propose(models: Sequence[Candidate], room: Room, agreement: Agreement) -> Proposal:
    """The two that make the best ensemble here; one, where no two fit."""
    single = distinct(models)
    pairs = sorted(combinations(single, 2), key=lambda pair: _value(pair, room), reverse=True)
    fitting = [pair for pair in pairs if room.holds(pair)]
    notes = [_too_large(pairs[0], room)] if pairs and not room.holds(pairs[0]) else []
    if fitting:
        pair = _well_matching(fitting, agreement)
        return Proposal(pair, (*notes, _why(pair, room, agreement), *_remarks(pair, agreement)))
    alone = [one for one in single if room.holds([one])]
    if not alone:
        smallest = min(single, key=lambda one: one.needs, default=None)
        what = f"{smallest.label}, the smallest model here, needs {decimal(smallest.needs)}" if smallest else ""
        return Proposal((), (f"nothing fits: {what}, and {room}",) if smallest else ())
    notes.append("one model alone: it is no ensemble yet; a second one of its size would make one")
    return Proposal((alone[0],), tuple(notes))


def _value(pair: Sequence[Candidate], room: Room) -> tuple[object, ...]:
    """What is compared: first of all that members can chat, think alike, have like sizes and are quick enough here."""
    a, b = pair
    sizes = sorted(one.facts.parameters for one in pair)
    quick = room.gpu or sum(one.size for one in pair) <= _QUICK
    alike = a.facts.thinks == b.facts.thinks
    bonus = _SAME_VOCABULARY if _same(a, b) else 1.0
    return a.chats + b.chats, alike, sizes[1] <= _NEAR * sizes[0], quick, bonus * sqrt(sizes[0] * sizes[1])


def _well_matching(pairs: Sequence[tuple[Candidate, Candidate]], agreement: Agreement) -> tuple[Candidate, ...]:
    """The first of the pairs that cut a text alike; if none does, the first."""
    for pair in pairs[:_LOOKED_AT]:
        if (agreement(*pair) or 0) >= RISKY_AGREEMENT:
            return pair
    return pairs[0]


def _too_large(pair: Sequence[Candidate], room: Room) -> str:
    names = " and ".join(one.label for one in pair)
    needed = decimal(sum(one.needs for one in pair))
    return f"{names} would be the better choice, but need {needed} together, and {room}"


def _why(pair: Sequence[Candidate], room: Room, agreement: Agreement) -> str:
    """What speaks for a pair."""
    a, b = pair
    cuts = agreement(a, b) or 0
    like = f"cut a text alike in {cuts:.0%} of the places" if cuts >= RISKY_AGREEMENT else ""
    sizes = sorted(one.facts.parameters for one in pair)
    parts = [
        "share a vocabulary" if _same(a, b) else like,
        "both have chat templates" if a.chats and b.chats else "",
        "are near in size" if sizes[1] <= _NEAR * sizes[0] else "",
        f"need {decimal(a.needs + b.needs)} where {room}",
    ]
    return f"proposed are {a.label} and {b.label}, which {', '.join(filter(None, parts))}"


def _remarks(pair: Sequence[Candidate], agreement: Agreement) -> list[str]:
    """What may go wrong with a pair."""
    a, b = pair
    remarks = []
    cuts = agreement(a, b)
    if cuts is not None and cuts < RISKY_AGREEMENT:
        remarks.append(
            f"no two models here cut a text alike: {a.label} and {b.label} do so in {cuts:.0%} of the places, where "
            f"language models mostly have {RISKY_AGREEMENT:.0%} and more"
        )
    if not (a.chats and b.chats):
        remarks.append("two models with chat templates would chat better: not all of these have one")
    if a.facts.thinks != b.facts.thinks:
        remarks.append(f"{(a if a.facts.thinks else b).label} thinks before it answers, and the other does not")
    return remarks


def reasons(chosen: Sequence[Candidate], agreement: Agreement) -> list[str]:
    """A sentence on each: what it is, and how it goes with the first of them."""
    return [_reason(one, chosen[0], agreement if i else None) for i, one in enumerate(chosen)]


def _reason(one: Candidate, first: Candidate, agreement: Agreement | None) -> str:
    facts = one.facts
    kind = "no chat template: a base model, which sees a plain transcript"
    if one.chats:
        kind = "a chat template, and it may think first" if facts.thinks else "a chat template"
    parts = [f"{facts.count} parameters as {facts.quantisation or 'GGUF'}, {decimal(one.needs)} in memory"]
    parts.append(f"it has {kind}")
    if agreement:
        cuts = agreement(one, first)
        if _same(one, first):
            parts.append(f"it shares the vocabulary of {first.label}")
        elif cuts is not None:
            parts.append(f"it cuts a text where {first.label} does in {cuts:.0%} of the places")
        parts.append(_speed(one, first))
    return "; ".join(parts)


def _speed(one: Candidate, first: Candidate) -> str:
    times = one.size / max(1, first.size)
    if 1 / 1.5 <= times <= 1.5:
        return "about as fast"
    return f"{times:.1f} times as much to read for a piece" if times > 1 else f"{1 / times:.1f} times as fast"


def weights_of(chosen: Sequence[Candidate]) -> list[float]:
    """Weights in tenths, by the numbers of parameters; a base model beside one that chats counts for a quarter."""
    some = any(one.chats for one in chosen)
    shares = [one.facts.parameters * (1.0 if one.chats or not some else _OF_A_BASE_MODEL) for one in chosen]
    tenths = [max(1, round(10 * share / (sum(shares) or 1))) for share in shares]
    largest = tenths.index(max(tenths))
    tenths[largest] = max(1, tenths[largest] + 10 - sum(tenths))
    return [tenth / 10 for tenth in tenths]


def _same(a: Candidate, b: Candidate) -> bool:
    return bool(a.facts.vocabulary_id) and a.facts.vocabulary_id == b.facts.vocabulary_id
