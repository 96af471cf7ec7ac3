"""Guesses have no effect on replies: the same seeds give the same replies, byte by byte, with and without.

Members compute in full precision, where batches of other sizes change the low bits of logits and nothing that is drawn.
The source that is right knows the reply that was written without guesses; half of the others lead away from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from test_exact_replies import SETTINGS, Case, case, request

from me_local.arrays import FloatArray
from me_local.config import Constraint, Sampling, Strategy, Unit
from me_local.decoding.engine import Engine
from me_local.decoding.generation import Generation
from me_local.decoding.guessing import Repeats, Source
from me_local.llama.foresight import GUESS
from me_local.llama.member import Member
from me_local.llama.weights import Weights
from me_local.mixture.alignment import top_k
from me_local.text.unified import END

LENGTH = 40  # pieces of a reply
SEEDS = 200

OpenAll = Callable[[Case], list[Member]]
Make = Callable[[bytes, int], Source]


class Knowing:
    """A source that knows the reply, text in front included, and leads away from it where `wrong` says so."""

    def __init__(self, reply: bytes, seed: int, wrong: Callable[[np.random.Generator], bool]) -> None:
        self._reply, self._written, self._wrong = reply, 0, wrong
        self._random = np.random.default_rng(seed)

    def append(self, piece: bytes) -> None:
        self._written += len(piece)

    def guess(self) -> bytes:
        right = self._reply[self._written : self._written + 30]
        if not self._wrong(self._random):
            return right
        kept = int(self._random.integers(0, 1 + len(right) // 2))
        return right[:kept] + b"zq" + right[kept + 2 :]


SOURCES: dict[str, Make] = {
    "always right": lambda reply, seed: Knowing(reply, seed, lambda random: False),
    "right half of the time": lambda reply, seed: Knowing(reply, seed, lambda random: random.random() < 0.5),
    "always wrong": lambda reply, seed: Knowing(b"zq " * 200, seed, lambda random: False),
    "repeats": lambda reply, seed: Repeats(),
}


def by_last_byte(text: bytes, weights: FloatArray) -> FloatArray:
    """After a space only the second member; weights that do not sum to 1 after a letter."""
    if text.endswith(b" "):
        return np.array([0.0, 0.5])
    return np.array([2.0, 0.5]) if text[-1:].isalpha() else weights


@dataclass(frozen=True)
class Asked:
    """A case, and how its replies are drawn."""

    case: Case
    strategy: Strategy = "me"
    unit: Unit = "token"
    constraint: Constraint | None = None


ASKED = {
    "one vocabulary": Asked(case("bpe_a", "bpe_b")),
    "BPE and SPM": Asked(case("bpe_c", "spm", temperature=1.3, top_k=5)),
    "three members": Asked(case("bpe_b", "bpe_c", "spm", weights=(0.6, 0.2, 0.2), temperature=0.5)),
    "CE": Asked(case("bpe_c", "spm", temperature=0.7), "ce"),
    "CE of one vocabulary": Asked(case("bpe_a", "bpe_b"), "ce"),
    "words": Asked(case("bpe_c", "spm", temperature=0.7), unit="word"),
    "router": Asked(case("bpe_c", "spm", router=by_last_byte, weights=(0.1, 0.9))),
    "temperature 0": Asked(case("bpe_c", "spm", temperature=0.0)),
    "top-p": Asked(case("bpe_a", "bpe_c", top_k=0, top_p=0.7)),
    "other memories": Asked(case("hybrid", "recurrent", "swa", weights=(0.4, 0.3, 0.3), top_k=5)),
    "each its own": Asked(case("bpe_a", "spm", sampling=(Sampling(0.5), Sampling(1.3, top_p=0.8)))),
    "a constraint": Asked(case("bpe_c", "spm"), constraint=Constraint("regex", "( [a-z]{1,6}){12} the end")),
}


@pytest.fixture
def open_all(tiny: dict[str, object]) -> object:
    from contextlib import ExitStack, closing

    from me_local.config import MemberConfig

    with ExitStack() as stack:

        def open_one(name: str) -> Member:
            config = MemberConfig(name=name, path=tiny[name], n_ctx=512, n_threads=1, **SETTINGS)  # type: ignore[arg-type]
            weights = stack.enter_context(closing(Weights(config)))
            return stack.enter_context(Member(config, weights, outputs=GUESS + 1))

        yield lambda this: [open_one(name) for name in this.names]


def write(engine: Engine, asked: Asked, seed: int, source: Source | None) -> tuple[list[tuple[bytes, int]], Generation]:
    """The pieces of a reply, each with its member."""
    wanted = replace(
        request(engine.models, asked.case, asked.strategy, seed), unit=asked.unit, constraint=asked.constraint
    )
    running = Generation(engine, wanted, source=source)
    pieces: list[tuple[bytes, int]] = []
    while len(pieces) < LENGTH:
        draw = running.step()
        assert draw is not None
        if draw.number == END:
            break
        pieces.append((draw.piece, draw.member))
    return pieces, running


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ASKED)
def test_a_reply_does_not_depend_on_guesses(open_all: OpenAll, name: str, source: str) -> None:
    asked = ASKED[name]
    plain, guessing = (Engine(open_all(asked.case), asked.case.router, top_k) for _ in range(2))
    guessed = 0
    for seed in range(10):
        expected, running = write(plain, asked, seed, None)
        found, foreseen = write(guessing, asked, seed, SOURCES[source](running.text, seed))
        assert found == expected
        guessed += sum(work.guessed for work in foreseen.work)
        print(name, source, [(w.calls, w.guessed) for w in foreseen.work], [w.calls for w in running.work])
    assert guessed > 0 or source not in ("always right", "right half of the time")
