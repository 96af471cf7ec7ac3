"""What the ensemble needs of a member, whatever runs it.

A `Model` brings its cache to hold exactly the ids that it is given, and gives the logits after them. llama.cpp in this
process runs one kind (`llama.member`), servers run others (`engines`). Knows nothing of how they do it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from me_local.arrays import IntArray
from me_local.config import MemberConfig
from me_local.errors import MeLocalError, RunError
from me_local.text.vocabulary import Vocabulary


class EvaluationInterruptedError(MeLocalError):
    """The user stopped an evaluation between two batches; the member's cache and its mirror are in order."""


class Evaluated(NamedTuple):
    """What it took to bring a member's cache up to date: `tokens` evaluated, and `seconds` inside `llama_decode`."""

    tokens: int
    seconds: float


class Shortlist(NamedTuple):
    """The largest logits after a token, float32 (k,), and whose they are: `ids` int32 (k,), ascending."""

    ids: IntArray
    logits: npt.NDArray[np.float32]


Row: TypeAlias = npt.NDArray[np.float32] | Shortlist
"""The logits after a token: all of them, (vocabulary,), or the largest."""


def split(row: Row, numbers: IntArray) -> tuple[npt.NDArray[np.float32], IntArray]:
    """The logits of a row, (k,), and the numbers of their pieces, (k,); `numbers` has those of the whole vocabulary."""
    return (row.logits, numbers[row.ids]) if isinstance(row, Shortlist) else (row, numbers)


class Target(NamedTuple):
    """What a cache is to hold: `ids`, int32 (tokens,), of which the first `final` stay as they are in this reply."""

    ids: IntArray
    final: int


class Outcome(NamedTuple):
    """What became of one sequence: `tokens` evaluated, and its share of the `seconds` that llama.cpp took.

    `logits`, after the last of the ids where they were asked for, are a view that the next evaluation overwrites; with
    an `error` there are none.
    """

    tokens: int
    seconds: float
    logits: Row | None = None
    error: RunError | None = None


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an `engine`, named for errors, can do.

    `most_logits`: it gives so many of the largest logits and no more; None: all of them. `raw_logits`: they are those
    of the model, not the logarithms of probabilities, from which they differ by a constant. `likelihoods`: it can
    score a text that is there already.
    """

    engine: str = "llama.cpp"
    most_logits: int | None = None
    raw_logits: bool = True
    likelihoods: bool = True


class Foreseeing(Protocol):
    """What can evaluate a guess of the next tokens, at most `ahead` of them, and go back cheaply where it is wrong."""

    @property
    def ahead(self) -> int:
        """The most tokens of a guess."""

    @property
    def size(self) -> int:
        """Bytes of the model, all of which an evaluation reads."""

    @property
    def picks(self) -> bool:
        """Whether without guesses it would hand over the largest logits alone, which costs less."""

    def foresee(
        self, ids: IntArray, guess: IntArray, wanted: Sequence[int], interrupted: Callable[[], bool] = ...
    ) -> tuple[Evaluated, list[Row]]:
        """Bring the cache to `ids` and a guess of what follows; copies of the logits after both.

        The first are those after `ids`, the others those after so many tokens of the guess as `wanted` has.
        """


class Model(Protocol):
    """What one reply needs of a member."""

    name: str
    n_ctx: int
    vocabulary: Vocabulary

    def prepare(
        self, ids: IntArray, interrupted: Callable[[], bool] = ..., *, final: int = 0, alone: bool = False
    ) -> Evaluated:
        """Bring the member's cache to exactly `ids`; with `alone`, by an evaluation of nothing else.

        The first `final` ids stay as they are in this reply.
        """

    def sync(self, ids: IntArray, interrupted: Callable[[], bool] = ..., *, final: int = 0) -> Evaluated:
        """Bring the member's cache to exactly `ids`; `final` as in `prepare`."""

    def shorten(self, count: int, numbers: IntArray) -> None:
        """From now on so many of the largest logits are enough, of ids whose number is not negative; 0: all of them."""

    @property
    def foreseeing(self) -> Foreseeing | None:
        """The same as one that can evaluate guesses, if it can."""

    def logits(self) -> Row:
        """The logits after the last `sync`, once they are there; more of them than are enough may come."""

    @property
    def divisible(self) -> bool:
        """Whether numbers do not depend on the number of threads; see `schedule`."""

    def share_cores(self, parts: int) -> None:
        """Evaluate with a part of the cores, one of so many, from now on, where it is divisible."""

    @property
    def local(self) -> bool:
        """Whether it is evaluated on the cores of this machine, which it then shares with others."""


class Places(Protocol):
    """The caches of several replies in one member, each by its number; see `llama.sequences`."""

    def holds(self, sequence: int, ids: IntArray) -> bool:
        """Whether the cache of a sequence has `ids` and no more."""

    def prefill(self, prompts: Mapping[int, Target], most: int) -> dict[int, Outcome]:
        """Bring sequences closer to holding their prompts, by at most `most` tokens; the outcomes have no logits."""

    def sync(self, wanted: Mapping[int, Target], others: Mapping[int, Target] | None = None) -> dict[int, Outcome]:
        """Make caches hold exactly these ids, one at least; those of `others` may come closer to what they are to hold.

        The outcomes of those that are wanted have the logits after the last id.
        """


class LoadedModel(Model, Protocol):
    """What an ensemble needs of its members: each can make `places` replies at once, and is closed in the end.

    `summary` says in a few words what it is; `wire_seconds` is the time that its predictions took on the way to an
    engine and back, so far.
    """

    config: MemberConfig
    abilities: Abilities
    summary: str
    wire_seconds: float

    @property
    def places(self) -> int:
        """How many replies at once it has caches for."""

    def twin(self) -> "LoadedModel":
        """Another context on the same model, which finds nothing in any cache but what it evaluated itself."""

    def keep_states(self, states: Any) -> None:
        """Keep what caches held (`llama.states`), for prompts that may come again, where the engine does not do so."""

    def several(self) -> Places:
        """Its caches, all empty, for several replies at once."""

    def forget(self) -> None:
        """Empty the cache of a single reply."""

    def close(self) -> None:
        """Let go of what it uses; what is asked of it then raises RunError."""
