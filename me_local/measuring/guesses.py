"""What guesses (`draft`) gain on kinds of text: the same replies with them and without, in turn.

How much of a text repeats what was there before decides what guesses of that are worth, so each kind is measured by
itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from me_local.asking import guesses
from me_local.config import Config, Overrides, override
from me_local.decoding.reply import Reply
from me_local.ensemble import Ensemble
from me_local.llama.weights import Shelf
from me_local.measuring.turns import generation_seconds, write_in_turn
from me_local.model import LoadedModel

SEEDS = 2
PIECES = 64
"""Pieces of each reply that `bench_guesses` has written."""
_CELLS = 2048  # of a context: more than the texts below take
_PIECE = 2  # tokens of a member for a piece of a reply, on average, at most

PASSAGE = (
    "The harbour town of Ellmouth had three bridges and one clock. The clock was kept by a woman called Marian Oakes, "
    "who climbed the tower every morning at six and wound it with a brass key as long as her forearm. In the winter of "
    "the great frost the key broke, and for nineteen days the clock showed twenty past four. Fishermen went out late, "
    "the baker opened early, and the school bell rang whenever the teacher felt that it should. On the twentieth day a "
    "tinker from the hills came down with a new key, which he had made from the hinge of an old church door."
)
_CODE = '''def load(path):
    """Read the records of a file."""
    records = []
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, value = line.split("=", 1)
            records.append((name.strip(), value.strip()))
    return records


def total(records):
    """Sum the values of the records."""
    result = 0
    for name, value in records:
        result += int(value)
    return result
'''


@dataclass(frozen=True, slots=True)
class TextKind:
    """A kind of text, and a prompt that leads to it: completed as it stands, if `raw`, else replied to."""

    name: str
    prompt: str
    raw: bool = True


REPEATED = TextKind("repeated passage", f"{PASSAGE}\n\n{PASSAGE}\n\nThe harbour town of")
EDIT = TextKind(
    "edit of code",
    f"# before\n{_CODE}\n# after: a docstring for each function, otherwise the same\ndef load(path):\n"
    '    """Load the records of a file."""\n    records = []',  # without a space at its end, at which models ramble
)
FREE = TextKind("free text", "One morning in March the keeper of the lighthouse found a letter in a bottle.")
KINDS = (REPEATED, EDIT, FREE)
"""What `bench_guesses` measures."""


@dataclass(frozen=True, slots=True)
class Gain:
    """Of a kind of text: pieces per second with guesses and without (`plain`), their ratio `speed_up`, evaluations for
    each piece, and the share of the predictions that guesses brought.
    """

    kind: str
    pieces: float
    pieces_plain: float
    speed_up: float
    calls_per_piece: float
    calls_per_piece_plain: float
    guessed: float


def can_guess(ensemble: Ensemble) -> bool:
    """Whether something guesses in its replies, and a member can evaluate that."""
    source = guesses(ensemble.members, ensemble.config, b"")
    return source is not None and any(m.foreseeing for i, m in enumerate(ensemble.members) if i != source)


def bench_guesses(config: Config, advance: Callable[[], object]) -> tuple[Gain, ...]:
    """What guesses gain under ME on each of `KINDS`, end of generation never sampled; `advance` is called for each.

    Raises LoadError where the memory has no room for two contexts of each member.
    """
    endless = Overrides(strategy="me", decode="sample", ignore_eos=True, stop=())
    members = tuple(replace(member, n_ctx=min(member.n_ctx or _CELLS, _CELLS)) for member in config.members)
    found = []
    for gain in gains(override(replace(config, members=members), endless), KINDS, seeds=SEEDS, pieces=PIECES):
        found.append(gain)
        advance()
    return tuple(found)


def gains(config: Config, kinds: Iterable[TextKind], *, seeds: int, pieces: int) -> Iterator[Gain]:
    """What the guesses of `config.draft` gain on each kind for which all contexts have room. Raises LoadError."""
    with ExitStack() as stack:
        shelf = stack.enter_context(closing(Shelf()))
        pair = [
            stack.enter_context(Ensemble(override(config, given), shelf=shelf))
            for given in (Overrides(), Overrides(draft="none"))
        ]
        for kind in kinds:
            if all(_has_room(member, kind, pieces) for member in pair[0].members):
                yield _gain(kind, [_written(pair, kind, seed, pieces) for seed in range(seeds)])


def _has_room(member: LoadedModel, kind: TextKind, pieces: int) -> bool:
    tokens = len(member.vocabulary.encode(kind.prompt.encode(), at_start=True))
    return tokens + _PIECE * pieces <= member.n_ctx


def _written(pair: Sequence[Ensemble], kind: TextKind, seed: int, pieces: int) -> list[Reply]:
    settings = Overrides(seed=seed, max_tokens=pieces)
    return write_in_turn([ensemble.stream(kind.prompt, settings, raw=kind.raw) for ensemble in pair])


def _gain(kind: TextKind, written: Sequence[Sequence[Reply]]) -> Gain:
    """Of replies with guesses and without, pair by pair."""
    sides = [list(side) for side in zip(*written, strict=True)]
    pieces = [sum(len(reply.steps) for reply in side) for side in sides]
    calls = [sum(usage.calls for reply in side for usage in reply.usage) for side in sides]
    speeds = [count / generation_seconds(side) for count, side in zip(pieces, sides, strict=True)]
    guessed = sum(reply.guessed for reply in sides[0])
    return Gain(
        kind=kind.name,
        pieces=speeds[0],
        pieces_plain=speeds[1],
        speed_up=speeds[0] / speeds[1],
        calls_per_piece=calls[0] / pieces[0],
        calls_per_piece_plain=calls[1] / pieces[1],
        guessed=guessed / (calls[0] + guessed),
    )
