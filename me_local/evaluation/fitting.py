"""The weights of an ensemble, fitted to texts by expectation-maximisation.

The likelihood of a text under a mixture is concave in the weights, so there is one best value. Each step gives every
unit (a token or a word) to the members in proportion to λ_i P_i, and takes the mean shares as the new weights: the
likelihood never falls. The members are run once; the rest is arithmetic on stored log-probabilities.

Every fourth block of the data is held out, so that what is reported there was not fitted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from me_local.arrays import FloatArray
from me_local.decoding.likelihoods import UnitScores, bits, mixed
from me_local.ensemble import Ensemble
from me_local.errors import InputError
from me_local.evaluation.corpus import Block

HELD_OUT = 4
"""One block in so many is held out."""

_GAP = 1e-7  # nats a unit that a fit may lack
_STEPS = 100_000


@dataclass(frozen=True, slots=True)
class Row:
    """Bits per byte of one choice of weights, float64 (members,), on the part fitted to and on that held out."""

    name: str
    weights: FloatArray
    fitted: float
    held_out: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A row for each member alone, one for equal weights and one for the fitted ones, in this order.

    `bytes` and `units` are those of the part fitted to and of the part held out.
    """

    rows: tuple[Row, ...]
    bytes: tuple[int, int]
    units: tuple[int, int]

    @property
    def weights(self) -> FloatArray:
        """The fitted weights, float64 (members,)."""
        return self.rows[-1].weights


def score_blocks(ensemble: Ensemble, blocks: Sequence[Block], advance: Callable[[], None]) -> list[UnitScores]:
    """The members' scores of all blocks. Raises InputError that names the block's place; RunError."""
    return [_score(ensemble, block, advance) for block in blocks]


def _score(ensemble: Ensemble, block: Block, advance: Callable[[], None]) -> UnitScores:
    try:
        scores = ensemble.unit_scores(ensemble.passage(block.prompt, block.continuation, raw=block.raw))
    except InputError as error:
        raise InputError(f"{block.where}: {error}") from None
    advance()
    return scores


def require_parts(blocks: Sequence[Block], name: str) -> None:
    """Raise InputError when the blocks of the file `name` are too few to hold some out."""
    if len(blocks) < HELD_OUT:
        raise InputError(
            f"{name}: too little to fit weights to: blocks: {len(blocks)}, at least {HELD_OUT} are needed, because one "
            f"in {HELD_OUT} is held out to show what the weights are worth on other text"
        )


def fit(names: Sequence[str], scores: Sequence[UnitScores]) -> Fit:
    """Fit weights to the scores of at least `HELD_OUT` blocks but for every `HELD_OUT`-th of them."""
    parts = (
        [part for i, part in enumerate(scores, start=1) if i % HELD_OUT],
        [part for i, part in enumerate(scores, start=1) if i % HELD_OUT == 0],
    )
    logs = [np.concatenate([part.log_probabilities for part in parts_], axis=1) for parts_ in parts]
    sizes = [sum(part.size for part in parts_) for parts_ in parts]
    count = len(names)
    choices = [*zip(names, np.eye(count), strict=True), ("equal", np.full(count, 1 / count))]
    choices.append(("fitted", fit_weights(logs[0])))
    rows = [Row(name, weights, *map(_rate, logs, sizes, [weights] * 2)) for name, weights in choices]
    return Fit(tuple(rows), (sizes[0], sizes[1]), (logs[0].shape[1], logs[1].shape[1]))


def fit_weights(log_probabilities: FloatArray) -> FloatArray:
    """The weights under which a mixture gives units the highest likelihood, float64 (members,), sum 1.

    `log_probabilities` float64 (members, units), finite for at least one member of each unit. Ends when no weights can
    be better by more than `_GAP` nats a unit, and is never worse than the best member alone.
    """
    count = len(log_probabilities)
    likelihoods = np.exp(log_probabilities - log_probabilities.max(axis=0))
    weights = np.full(count, 1 / count)
    for _ in range(_STEPS):
        gains = (likelihoods / (weights @ likelihoods)).mean(axis=1)
        # The likelihood is concave: its slope towards each member bounds what is still to be had.
        if gains.max() <= 1 + _GAP:
            break
        weights = weights * gains
        weights /= weights.sum()
    vertices = [weights, *np.eye(count)]
    return max(vertices, key=lambda candidate: float(mixed(log_probabilities, candidate[:, None]).sum()))


def _rate(log_probabilities: FloatArray, size: int, weights: FloatArray) -> float:
    return bits(float(mixed(log_probabilities, weights[:, None]).sum())) / size
