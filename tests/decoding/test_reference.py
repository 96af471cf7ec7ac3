"""The engine against `_reference`, reply by reply: the same pieces from the same distributions.

Both make replies with the same seeds, each in its own way and on contexts of its own, in full precision. Logits differ
in their low bits with the size of a batch. So a step counts as different where a probability is off by more than
`TOLERANCE`, or where another piece comes out; but where logits that differ by less than `LOW_BITS` may leave another
set of ids, or the random number lies at the border of two pieces, that decides nothing, and the reply is compared no
further. Such close calls must be rare. That the comparison finds faults is tested too.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selection import slow_but
from test_exact_replies import one_number_for_route_and_piece, pieces_tokenised_one_by_one, write_lacking

from me_local import Ensemble, Overrides, _reference
from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.asking import Ask
from me_local.config import MemberConfig, load_config
from me_local.decoding.reply import Reply, Step
from me_local.llama.member import Member
from me_local.mixture.alignment import Distribution, top_k
from me_local.model import Evaluated
from me_local.sampling import Sampling

WriteModels = Callable[..., Path]
LoadReference = Callable[[MemberConfig], _reference.Member]
Compare = Callable[..., "Comparison"]

TOLERANCE = 1e-4  # of probabilities; 1e-5 was the most that was seen
LOW_BITS = 1e-4  # of logits
ALL = 1 << 20  # pieces of a distribution, more than there are
PROMPT = "the cat"
THE_END = Step(b"", "", "", 0.0, ())
FULL_PRECISION = 'type_k = "f32"\ntype_v = "f32"\n'


@dataclass(frozen=True)
class Case:
    """An ensemble, and what is asked of it; `settings` are some of its members', by their index."""

    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    sampling: str = ""
    member: str = ""
    settings: Mapping[int, Mapping[str, object]] | None = None
    prompt: str = PROMPT
    raw: bool = True
    router: _reference.Router = lambda text, weights: weights
    batch: int = 1
    max_tokens: int = 25


def by_last_byte(text: bytes, weights: FloatArray) -> FloatArray:
    """After a space only the second member; weights that do not sum to 1 after a letter."""
    if text.endswith(b" "):
        return np.array([0.0, 0.5])
    return np.array([2.0, 0.5]) if text[-1:].isalpha() else weights


CASES = {
    "BPE and SPM": Case(("bpe_c", "spm")),
    "one vocabulary": Case(("bpe_a", "bpe_b"), weights=(0.3, 0.7)),
    "a conversation": Case(("bpe_a", "spm"), raw=False, settings={1: {"system": "Be brief."}}),
    "one without weight": Case(("bpe_b", "bpe_c", "spm"), weights=(0.6, 0.4, 0.0)),
    "sliding window": Case(("swa", "bpe_c"), member="swa_full = false", max_tokens=40),
    "recurrent and hybrid": Case(("recurrent", "hybrid"), weights=(0.6, 0.4)),
    "temperature 0": Case(("bpe_b", "spm"), sampling="temperature = 0.0"),
    "top-p and min-p": Case(("bpe_c", "spm"), sampling="top_k = 0\ntop_p = 0.8\nmin_p = 0.02"),
    "each its own": Case(
        ("bpe_a", "spm"), settings={0: {"sampling": Sampling(0.5)}, 1: {"sampling": Sampling(1.7, 40, 0.9)}}
    ),
    "cut characters": Case(("bpe_c", "lacking"), prompt="é", sampling="top_k = 0\ntemperature = 2.0"),
    "router": Case(("bpe_c", "spm"), weights=(0.1, 0.9), router=by_last_byte),
    "full context": Case(("bpe_b", "spm"), prompt="the cat " * 80, settings={1: {"n_ctx": 256}}, max_tokens=30),
    "several at once": Case(("bpe_c", "spm", "recurrent"), batch=3),
}


@pytest.fixture(scope="module")
def tiny(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models, and one that lacks bytes."""
    path = write_lacking(tmp_path_factory.mktemp("lacking") / "lacking.gguf")
    return tiny | {"lacking": path}


@pytest.fixture(scope="module")
def load_reference() -> Iterator[LoadReference]:
    """Loads a member for the reference; each file once."""
    loaded: dict[tuple[Path | None, int], _reference.Member] = {}
    with ExitStack() as stack:

        def load(config: MemberConfig) -> _reference.Member:
            key = config.path, config.n_ctx
            if key not in loaded:
                loaded[key] = _reference.load_member(config)
                stack.callback(loaded[key].model.close)
            return replace(loaded[key], weight=config.weight, sampling=config.sampling)

        yield load


@dataclass
class Comparison:
    """`differences` says where replies differ; `close` counts the close calls, `steps` those that are the same.

    `ends` has the replies by how they ended: "stop", "length", or "full" for those that a context had no room for.
    """

    differences: list[str] = field(default_factory=list)
    close: int = 0
    steps: int = 0
    ends: Counter[str] = field(default_factory=Counter)


class Calls(list[tuple[LogitArray, IntArray, Sampling]]):
    """What the reference has aligned since they were last cleared."""

    def undecided(self) -> bool:
        """Whether logits that differ in their low bits may leave other ids, in one of them."""
        return any(self._undecided(*call) for call in self)

    def _undecided(self, logits: LogitArray, numbers: IntArray, sampling: Sampling) -> bool:
        scores = np.sort(logits[numbers >= 0].astype(np.float64))[::-1]
        k = 1 if sampling.temperature == 0 else sampling.top_k
        if 0 < k < len(scores) and scores[k - 1] - scores[k] < LOW_BITS:
            return True
        odds = np.exp((scores[: k or None] - scores[0]) / (sampling.temperature or 1.0))
        within = np.cumsum(odds) / odds.sum()
        near_top_p = sampling.top_p < 1 and (np.abs(within - sampling.top_p) < LOW_BITS).any()
        near_min_p = sampling.min_p > 0 and (np.abs(odds - sampling.min_p) < LOW_BITS).any()
        return bool(near_top_p or near_min_p)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The reference's alignments, from now on."""
    calls, align = Calls(), _reference.align

    def spy(*call: Any) -> Any:
        calls.append(call)
        return align(*call)

    monkeypatch.setattr(_reference, "align", spy)
    return calls


@pytest.fixture
def compare(write_models: WriteModels, load_reference: LoadReference, calls: Calls) -> Compare:
    """Compares the replies of a case to some seeds; `change` may do something to the engine's ensemble before."""

    def run(
        this: Case, seeds: Sequence[int], *strategies: Any, change: Callable[[Ensemble], None] = lambda _: None
    ) -> Comparison:
        found = Comparison()
        with open_case(this, write_models) as ensemble:
            head, prompts, _ = ensemble.prompter.asked(this.prompt, ensemble.config, raw=this.raw)
            loaded = [load_reference(config) for config in ensemble.config.members]
            members = [replace(m, prompt=ids.tolist()) for m, ids in zip(loaded, prompts, strict=True)]
            change(ensemble)
            for fast in chain.from_iterable(replies(ensemble, this, strategy, seeds) for strategy in strategies):
                settings: Any = {"strategy": fast.strategy, "max_tokens": this.max_tokens, "router": this.router}
                slow = _reference.reply(members, head, seed=fast.seed, **settings)
                is_full = fast.finish_reason == "length" and len(fast.steps) < this.max_tokens
                found.ends["full" if is_full else fast.finish_reason] += 1
                compare_replies(found, fast, slow, ensemble.engine.unified.pieces, calls)
        return found

    return run


def open_case(this: Case, write_models: WriteModels) -> Ensemble:
    """The ensemble of the engine."""
    top = f'[ensemble]\nroute = "own"\n[sampling]\n{this.sampling}'
    path = write_models(*this.names, weights=this.weights or None, top=top, member=FULL_PRECISION + this.member)
    config, own = load_config(path), this.settings or {}
    members = tuple(replace(m, **own.get(i, {})) for i, m in enumerate(config.members))  # type: ignore[arg-type]
    ensemble = Ensemble(replace(config, members=members), batch=this.batch)
    ensemble.engine.router = this.router
    return ensemble


def replies(ensemble: Ensemble, this: Case, strategy: Any, seeds: Sequence[int]) -> list[Reply]:
    """The engine's, in the order of the seeds."""
    options = Overrides(strategy=strategy, max_tokens=this.max_tokens)
    asks = [Ask(this.prompt, Overrides(seed=seed), top=ALL) for seed in seeds]
    finished = sorted(ensemble.generate_many(asks, options, raw=this.raw), key=lambda one: one.index)
    assert [one.error for one in finished] == [None] * len(seeds)
    return [one.reply for one in finished if one.reply]


def compare_replies(
    found: Comparison, fast: Reply, slow: Iterator[_reference.Step], pieces: Sequence[bytes], calls: Calls
) -> None:
    """Compare two replies up to a close call, or to the first difference."""
    calls.clear()
    uniforms = np.random.default_rng(np.random.SeedSequence(fast.seed).spawn(2)[1])
    ended = [THE_END] if fast.finish_reason == "stop" else []
    for at, (mine, theirs) in enumerate(zip_longest([*fast.steps, *ended], slow)):
        uniform = uniforms.random()
        if mine is None or theirs is None:
            found.differences.append(f"{fast.strategy}, seed {fast.seed}: one reply has {at} steps, and the other more")
            return
        alike = mine is THE_END or equal(mine, theirs, pieces)
        if not alike or mine.piece != theirs.piece:
            if calls.undecided() or (alike and at_border(mine.piece, theirs.distribution, pieces, uniform)):
                found.close += 1
            else:
                what = f"{mine.piece!r} for {theirs.piece!r}" if alike else "another distribution"
                found.differences.append(f"{fast.strategy}, seed {fast.seed}, step {at}: {what}")
            return
        found.steps += 1
        calls.clear()


def equal(mine: Step, theirs: _reference.Step, pieces: Sequence[bytes]) -> bool:
    """Whether two steps have the same distribution and, for the same piece, the same parts of members in it."""
    gap: defaultdict[bytes, float] = defaultdict(float)
    for piece, probability in mine.top:
        gap[piece] += probability
    for number in np.flatnonzero(theirs.distribution):
        gap[pieces[number]] -= theirs.distribution[number]
    parts = mine.probability * np.array(mine.shares) - theirs.distribution[theirs.number] * theirs.shares
    return max(map(abs, gap.values())) < TOLERANCE and (mine.piece != theirs.piece or np.abs(parts).max() < TOLERANCE)


def at_border(piece: bytes, distribution: FloatArray, pieces: Sequence[bytes], uniform: float) -> bool:
    """Whether a number that differs in its low bits would have drawn this piece."""
    ends = np.cumsum(distribution)
    numbers = [number for number in np.flatnonzero(distribution) if pieces[number] == piece]
    return any(ends[n] - distribution[n] - TOLERANCE < uniform < ends[n] + TOLERANCE for n in numbers)


QUICK = ("one vocabulary", "a conversation", "each its own", "cut characters", "full context", "several at once")


@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
def test_the_engine_makes_the_replies_of_the_reference(compare: Compare, name: str) -> None:
    found = compare(CASES[name], range(2), "me", "ce")
    assert found.differences == []
    assert found.close <= 1
    assert found.steps >= 20
    assert found.ends["full"] == 0 or name == "full context"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_engine_makes_many_replies_of_the_reference(compare: Compare, name: str) -> None:
    found = compare(CASES[name], range(2, 32), "me", "ce")
    assert found.differences == []
    assert found.close <= 6
    assert found.steps >= 600
    assert (found.ends["full"] >= 10) == (name == "full context")
    assert found.ends["stop"] >= 2 or name == "temperature 0"


def the_alignment_leaves_nine(ensemble: Ensemble, patch: pytest.MonkeyPatch) -> None:
    def top_9(logits: LogitArray, numbers: IntArray, sampling: Sampling) -> Distribution:
        return top_k(logits, numbers, replace(sampling, top_k=9))

    ensemble.engine.alignment = top_9


def the_router_is_a_little_off(ensemble: Ensemble, patch: pytest.MonkeyPatch) -> None:
    ensemble.engine.router = lambda text, weights: weights * [1.01, 0.99]


def a_member_misses_a_token(ensemble: Ensemble, patch: pytest.MonkeyPatch) -> None:
    sync = Member.sync

    def missing(self: Member, ids: IntArray, *args: Any, **kwargs: Any) -> Evaluated:
        return sync(self, np.delete(ids, -2), *args, **kwargs)

    patch.setattr(Member, "sync", missing)


def pieces_are_tokenised_one_by_one(ensemble: Ensemble, patch: pytest.MonkeyPatch) -> None:
    pieces_tokenised_one_by_one(patch)


def one_number_for_both(ensemble: Ensemble, patch: pytest.MonkeyPatch) -> None:
    one_number_for_route_and_piece(patch)


FAULTS = {
    the_alignment_leaves_nine: "ce",
    the_router_is_a_little_off: "ce",
    a_member_misses_a_token: "me",
    pieces_are_tokenised_one_by_one: "me",
    one_number_for_both: "me",
}


@pytest.mark.parametrize("fault", slow_but(FAULTS, the_alignment_leaves_nine))
def test_a_broken_engine_is_found_out(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Ensemble, pytest.MonkeyPatch], None]
) -> None:
    found = compare(CASES["BPE and SPM"], range(5), FAULTS[fault], change=lambda ensemble: fault(ensemble, monkeypatch))
    assert found.differences


@pytest.mark.parametrize(
    ("sampling", "logits", "undecided"),
    [
        (Sampling(top_k=2), [2.0, 1.0, 1.00001], True),
        (Sampling(top_k=2), [2.0, 1.0, 0.999], False),
        (Sampling(top_k=3), [2.0, 1.0, 1.00001], False),
        (Sampling(temperature=0.0), [2.0, 2.00001, 1.0], True),
        (Sampling(temperature=0.0), [2.0, 1.0, 1.00001], False),
        (Sampling(top_p=0.5), [0.0, 0.00001], True),  # the first has half of it, or less
        (Sampling(top_p=0.6), [0.0, 0.00001], False),
        (Sampling(min_p=0.5), [math.log(2), 0.00001], True),
        (Sampling(min_p=0.4), [math.log(2), 0.00001], False),
    ],
)
def test_what_low_bits_may_decide(sampling: Sampling, logits: list[float], undecided: bool) -> None:
    row = np.array([*logits, 9.0], dtype=np.float32)
    assert Calls([(row, np.array([*range(len(logits)), -1]), sampling)]).undecided() == undecided


@pytest.mark.parametrize(("uniform", "pieces"), [(0.1, [b"a"]), (0.30001, [b"a", b"b"]), (0.9, [b"c"])])
def test_what_lies_at_a_border(uniform: float, pieces: list[bytes]) -> None:
    distribution = np.array([0.3, 0.5, 0.0, 0.2])
    names = [b"a", b"b", b"x", b"c"]
    near = [piece for piece in names if at_border(piece, distribution, names, uniform)]
    assert near == pieces
