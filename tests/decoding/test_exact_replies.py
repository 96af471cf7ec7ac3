"""Whole replies of ME have exactly the probabilities that the definition of CE gives them.

For each ensemble of tiny models, the tree of all replies up to a length (or to the end of generation, END) is worked
out from the definition of the mixture: each member's logits by a fresh evaluation of its canonical ids in an empty
cache, an alignment in plain Python, a mixture of dictionaries. Then 20,000 replies, one seed each, are drawn through
the product's own loop (route, sync, align, sample, append), and a G-test compares the counts with the tree. It pools
cells that expect fewer than 20 replies with their neighbours in the tree; the tree is not worked out below those. A
test has odds of at most 1e-6 of a false alarm over the choice of seeds. The seeds are fixed, so it never comes and
goes. That the test can fail is tested too, on replies of engines that are broken on purpose.

To be quick, `Remembered` keeps a member's logits for each context that has come up, and the alignment of them. Each
still came out of a real `sync`, of a cache that some random history had left; but a context that comes up again does
not see a second history, and `prepare` is never called. `test_an_ensemble_as_users_run_it` remembers nothing, and
test_memory_kinds.py checks logits after any history.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import make_tiny_models
import numpy as np
import pytest
from conftest import logits_of
from scipy import stats
from selection import slow_but
from tiny_architectures import llama_model
from tiny_vocabularies import chatml_vocab

from me_local import Ensemble, Overrides
from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.decoding import generation, strategies
from me_local.decoding.engine import Engine, Request
from me_local.decoding.generation import Generation
from me_local.decoding.strategies import Sampler
from me_local.llama.member import Member
from me_local.mixture import alignment
from me_local.mixture.alignment import Distribution, top_k
from me_local.mixture.noise import Noise
from me_local.mixture.routing import Router, constant
from me_local.model import Evaluated, Model
from me_local.sampling import Sampling
from me_local.text.growing import SampledText
from me_local.text.unified import END
from me_local.text.vocabulary import Vocabulary

OpenMember = Callable[..., Member]
OpenEnsemble = Callable[..., Ensemble]
# The pieces of a reply in their order, or the ids where all members share one vocabulary; None is END. REST at the end
# of one stands for all replies that begin so and have no cell of their own.
Reply = tuple[bytes | int | str | None, ...]
REST = "rest"

COUNT = 20_000  # replies of a case
LEAST = 20  # replies that a cell expects: with so many the statistic follows its limit far into the tail
EXACT = 5e-7  # half of 1e-6, because the statistic follows its limit closely but not exactly
SETTINGS = {"type_k": "f32", "type_v": "f32"}  # batches of different sizes then differ by 1e-5, so ranks stay


@dataclass(frozen=True)
class Case:
    """An ensemble, and the replies to look at: up to `length` pieces after `head`."""

    names: tuple[str, ...]
    sampling: tuple[Sampling, ...]
    weights: tuple[float, ...] = (0.5, 0.5)
    router: Router = constant
    head: bytes = b"the cat"
    length: int = 3


def case(*names: str, **values: object) -> Case:
    """A case whose members all have the default sampling, but for the settings named here."""
    shared = {key: values.pop(key) for key in ("temperature", "top_k", "top_p", "min_p") if key in values}
    return Case(names, **({"sampling": (Sampling(**shared),) * len(names)} | values))  # type: ignore[arg-type]


def by_last_byte(text: bytes, weights: FloatArray) -> FloatArray:
    """After a space only the second member; weights that do not sum to 1 after a letter."""
    if text.endswith(b" "):
        return np.array([0.0, 0.5])
    return np.array([2.0, 0.5]) if text[-1:].isalpha() else weights


CASES = {
    "one vocabulary": case("bpe_a", "bpe_b"),
    "BPE and BPE, temperature 0.5": case("bpe_a", "bpe_c", temperature=0.5),
    "BPE and SPM, temperature 1.3": case("bpe_c", "spm", temperature=1.3, top_k=5),
    "three members": case("bpe_b", "bpe_c", "spm", weights=(0.7, 0.2, 0.1), top_k=5),
    "other memories": case("hybrid", "recurrent", "swa", weights=(0.4, 0.3, 0.3), top_k=5),
    "temperature 0": case("bpe_c", "spm", temperature=0.0),
    "no top-k": case("bpe_c", "spm", top_k=0, length=2),
    "top-p": case("bpe_a", "bpe_c", top_k=0, top_p=0.7, length=2),
    "min-p": case("bpe_c", "spm", top_k=0, min_p=0.1, length=2),
    "each its own": case(
        "bpe_a", "spm", weights=(0.3, 0.7), sampling=(Sampling(0.5), Sampling(1.3, top_p=0.8)), length=2
    ),
    "router": case("bpe_c", "spm", router=by_last_byte, weights=(0.1, 0.9)),
    "lacking bytes": case("bpe_c", "lacking", head="é".encode()),
}
BROKEN = case("bpe_c", "spm", temperature=0.5, weights=(0.9, 0.1))


def write_lacking(path: Path) -> Path:
    """Write a model that lacks every other byte from 0x80, so that it cannot write all cut characters."""
    whole = chatml_vocab()
    vocab = replace(whole, tokens=[t for t in whole.tokens if len(t.piece) != 1 or t.piece[0] < 0x80 or t.piece[0] % 2])
    make_tiny_models.write_model(path, vocab=vocab, model=llama_model(vocab, 8))
    return path


@pytest.fixture(scope="module")
def tiny(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models, and one that lacks bytes."""
    path = write_lacking(tmp_path_factory.mktemp("lacking") / "lacking.gguf")
    return tiny | {"lacking": path}


class Remembered:
    """A member that evaluates each context once."""

    def __init__(self, member: Member) -> None:
        self.name, self.n_ctx, self.vocabulary = member.name, member.n_ctx, member.vocabulary
        self.divisible, self.local = member.divisible, member.local
        self._member = member
        self._known: dict[bytes, LogitArray] = {}
        self._last = b""

    def prepare(self, ids: IntArray, interrupted: Callable[[], bool], *, final: int, alone: bool) -> Evaluated:
        return Evaluated(0, 0.0)

    def sync(self, ids: IntArray, interrupted: Callable[[], bool], *, final: int) -> Evaluated:
        self._last = ids.tobytes()
        if self._last not in self._known:
            self._known[self._last] = logits_of(self._member, ids).copy()
        return Evaluated(0, 0.0)

    def logits(self) -> LogitArray:
        return self._known[self._last]

    def share_cores(self, parts: int) -> None:
        self._member.share_cores(parts)

    def shorten(self, count: int, numbers: IntArray) -> None:
        """All logits are more than enough."""


def remembered_top_k() -> Callable[[LogitArray, IntArray, Sampling], Distribution]:
    """The default alignment, for arrays that stay where they are: a pure function, so once for each is enough."""
    known: dict[int, Distribution] = {}

    def align(logits: LogitArray, numbers: IntArray, sampling: Sampling) -> Distribution:
        if id(logits) not in known:
            known[id(logits)] = top_k(logits, numbers, sampling)
        return known[id(logits)]

    return align


def remembering(members: Sequence[Member], this: Case) -> Engine:
    return Engine([Remembered(member) for member in members], this.router, remembered_top_k())


def draw(ensemble: Engine, this: Case, strategy: str = "me", count: int = COUNT) -> Counter[Reply]:
    """Replies of the product, with the seeds from 0 on."""
    drawn: Counter[Reply] = Counter()
    for seed in range(count):
        running = Generation(ensemble, request(ensemble.models, this, strategy, seed), lambda: False)
        drawn[reply_of(running, ensemble.unified.same, this.length)] += 1
    return drawn


def request(models: Sequence[Model], this: Case, strategy: str, seed: int) -> Request:
    prompts = tuple(np.array(start(model), dtype=np.int32) for model in models)
    return Request(prompts, np.array(this.weights), this.sampling, strategy, False, seed, this.head)  # type: ignore[arg-type]


def start(model: Model) -> list[int]:
    """The ids in front of every context of a member."""
    return [] if model.vocabulary.bos is None else [model.vocabulary.bos]


def reply_of(running: Generation, same: bool, length: int) -> Reply:
    reply: Reply = ()
    while len(reply) < length and reply[-1:] != (None,):
        step = running.step()
        assert step is not None
        reply += (None if step.number == END else step.number - 1 if same else step.piece,)
    return reply


class Tree:
    """The probabilities of all replies of a case by the definition of CE."""

    def __init__(self, members: Sequence[Member], this: Case) -> None:
        self._members, self._case = members, this
        self._same = all(m.vocabulary.pieces == members[0].vocabulary.pieces for m in members)
        self._known: dict[Reply | bytes, dict[bytes | int | None, float]] = {}

    def cells(self, count: int = COUNT) -> dict[Reply, float]:
        """The cells of a test with `count` replies, and their probabilities, which sum to 1."""
        cells: dict[Reply, float] = {}
        rest = self._add_cells(cells, (), 1.0, LEAST / count)
        if rest > 1e-9:
            cells[REST,] = rest
        return cells

    def _add_cells(self, cells: dict[Reply, float], reply: Reply, probability: float, least: float) -> float:
        """Add the cells of all replies that begin with this one; give the probability of those left without."""
        if probability < least:
            return probability
        if self._complete(reply):
            cells[reply] = probability
            return 0.0
        following = self.following(reply).items()
        rest = sum(self._add_cells(cells, (*reply, piece), probability * p, least) for piece, p in following)
        if rest < least:
            return rest
        cells[(*reply, REST)] = rest
        return 0.0

    def _complete(self, reply: Reply) -> bool:
        return len(reply) == self._case.length or reply[-1:] == (None,)

    def possible(self, reply: Reply) -> bool:
        """Whether a reply has any probability at all."""
        return all(reply[i] in self.following(reply[:i]) for i in range(len(reply)))

    def following(self, reply: Reply) -> dict[bytes | int | None, float]:
        """The mixture after the beginning of a reply: the probability of each next piece."""
        text = self.text(reply)
        state = reply if self._same else text  # how the text was cut matters only where ids are the context
        if state not in self._known:
            mixture: defaultdict[bytes | int | None, float] = defaultdict(float)
            for member, weight, sampling in zip(self._members, self.weights(text), self._case.sampling, strict=True):
                aligned = self._aligned(member, reply, sampling) if weight else {}
                for piece, probability in aligned.items():
                    mixture[piece] += weight * probability
            self._known[state] = dict(mixture)
        return self._known[state]

    def text(self, reply: Reply) -> bytes:
        """Head and the pieces of a reply, with or without an END."""
        pieces = self._members[0].vocabulary.pieces
        return self._case.head + b"".join(pieces[p] if isinstance(p, int) else p for p in reply if p is not None)  # type: ignore[misc]

    def weights(self, text: bytes) -> list[float]:
        """The router's, without the members that lack a token for a byte that is not part of a whole character."""
        strays = [bytes([ord(c) - 0xDC00]) for c in text.decode(errors="surrogateescape") if "\udc80" <= c <= "\udcff"]
        weights = self._case.router(text, np.array(self._case.weights)).tolist()
        able = [self._same or set(strays) <= set(m.vocabulary.pieces) for m in self._members]
        weights = [weight if can else 0.0 for weight, can in zip(weights, able, strict=True)]
        return [weight / sum(weights) for weight in weights]

    def _aligned(self, member: Member, reply: Reply, sampling: Sampling) -> dict[bytes | int | None, float]:
        vocabulary, logits, ends = member.vocabulary, self._logits(member, reply), set(member.vocabulary.end_ids)
        best = sorted((i for i, piece in enumerate(vocabulary.pieces) if piece or i in ends), key=lambda i: -logits[i])
        probabilities = truncated([logits[i] for i in best], sampling)
        aligned: defaultdict[bytes | int | None, float] = defaultdict(float)
        for i, probability in zip(best, probabilities, strict=False):
            aligned[None if i in ends else i if self._same else vocabulary.pieces[i]] += probability
        return aligned

    def _logits(self, member: Member, reply: Reply) -> list[float]:
        """After the whole context, evaluated in one go in an empty cache."""
        encode = member.vocabulary.encode
        if self._same:
            ids = [*start(member), *encode(self._case.head, at_start=True), *reply]
        else:
            ids = [*start(member), *encode(self.text(reply), at_start=True)]
        member.forget()
        return logits_of(member, np.array(ids, dtype=np.int32)).tolist()


def truncated(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities of the first of logits that descend: temperature, top-k, top-p, min-p."""
    if sampling.temperature == 0:
        return [1.0]
    odds = [math.exp((logit - logits[0]) / sampling.temperature) for logit in logits[: sampling.top_k or None]]
    probabilities = [value / sum(odds) for value in odds]
    kept: list[float] = []
    for probability in probabilities:
        if sum(kept) < sampling.top_p and probability >= sampling.min_p * probabilities[0]:
            kept.append(probability)
    return [value / sum(kept) for value in kept]


def g_test(drawn: Counter[Reply], cells: dict[Reply, float]) -> float:
    """The p-value of the counts under the probabilities of the cells, with Williams' correction."""
    counts: Counter[Reply] = Counter()
    for reply, count in drawn.items():
        counts[cell_of(reply, cells)] += count
    order = sorted(cells, key=lambda cell: cells[cell])
    observed, expected = [counts[cell] for cell in order], [cells[cell] * drawn.total() for cell in order]
    if expected[0] < LEAST:  # what is left over of the whole tree
        observed[:2], expected[:2] = [sum(observed[:2])], [sum(expected[:2])]
    free = len(expected) - 1
    g = 2 * sum(o * math.log(o / e) for o, e in zip(observed, expected, strict=True) if o)
    correction = 1 + (sum(drawn.total() / e for e in expected) - 1) / (6 * drawn.total() * free)
    return float(stats.chi2.sf(g / correction, free))


def cell_of(reply: Reply, cells: dict[Reply, float]) -> Reply:
    if reply in cells:
        return reply
    rests = ((*reply[:length], REST) for length in range(len(reply) - 1, 0, -1))
    return next((cell for cell in rests if cell in cells), (REST,))


def check(drawn: Counter[Reply], tree: Tree) -> None:
    assert drawn.total() == COUNT
    assert [reply for reply in drawn if not tree.possible(reply)] == []
    cells = tree.cells()
    assert sum(cells.values()) == pytest.approx(1, abs=1e-9)
    assert g_test(drawn, cells) > EXACT


@pytest.fixture
def open_all(open_member: OpenMember) -> Callable[[Case], list[Member]]:
    """The members of a case."""
    return lambda this: [open_member(name, **SETTINGS) for name in this.names]


OpenAll = Callable[[Case], list[Member]]


@pytest.mark.parametrize("name", slow_but(CASES, "BPE and BPE, temperature 0.5"))
def test_replies_have_the_probabilities_of_the_definition(open_all: OpenAll, name: str) -> None:
    this = CASES[name]
    check(draw(remembering(open_all(this), this), this, "me"), Tree(open_all(this), this))


@pytest.mark.slow
def test_replies_of_ce_where_members_lack_bytes(open_all: OpenAll) -> None:
    this = CASES["lacking bytes"]
    check(draw(remembering(open_all(this), this), this, "ce"), Tree(open_all(this), this))


def test_a_member_that_lacks_bytes_often_sits_out(open_all: OpenAll) -> None:
    tree = Tree(open_all(CASES["lacking bytes"]), CASES["lacking bytes"])
    first = tree.following(())
    assert sum(first[piece] for piece in first if tree.weights(tree.text((piece,))) == [1.0, 0.0]) > 0.1


@pytest.mark.slow
def test_an_ensemble_as_users_run_it(open_ensemble: OpenEnsemble, open_all: OpenAll) -> None:
    """The same without `Remembered`: real caches, and the way from the file and the prompt to the reply."""
    this = case("bpe_c", "spm", weights=(0.6, 0.4), length=2)
    ensemble = open_ensemble(*this.names, weights=this.weights, member='type_k = "f32"\ntype_v = "f32"')
    drawn: Counter[Reply] = Counter()
    for seed in range(COUNT):
        reply = ensemble.generate(this.head.decode(), Overrides(seed=seed, max_tokens=this.length), raw=True)
        end = (None,) if reply.finish_reason == "stop" else ()
        drawn[tuple(step.piece for step in reply.steps) + end] += 1
    check(drawn, Tree(open_all(this), this))


def off_by_a_twentieth(patch: pytest.MonkeyPatch) -> tuple[Case, str]:
    return replace(BROKEN, weights=(0.85, 0.15)), "me"


def temperature_after_mixing(patch: pytest.MonkeyPatch) -> tuple[Case, str]:
    def mix(distributions: Sequence[Distribution], weights: Sequence[float]) -> Distribution:
        mixture = alignment.mix(distributions, weights)
        tempered = mixture.probabilities**2
        return Distribution(mixture.numbers, tempered / tempered.sum())

    patch.setattr(strategies, "mix", mix)
    return replace(BROKEN, sampling=(Sampling(),) * 2), "ce"


def one_number_for_route_and_piece(patch: pytest.MonkeyPatch) -> tuple[Case, str]:
    uniform = [0.0]

    def route(self: Sampler, weights: FloatArray) -> int:
        uniform[0] = self._route_uniform()
        return alignment.pick(weights, uniform[0])

    def sample(distribution: Distribution, noise: FloatArray) -> tuple[int, float]:
        at = alignment.pick(distribution.probabilities, uniform[0])
        return int(distribution.numbers[at]), float(distribution.probabilities[at])

    patch.setattr(Sampler, "_route", route)
    patch.setattr(strategies, "sample", sample)
    return BROKEN, "me"


def one_noise_for_all_places(patch: pytest.MonkeyPatch) -> tuple[Case, str]:
    at = Noise.at
    patch.setattr(Noise, "at", lambda self, place, numbers: at(self, 0, numbers))
    return BROKEN, "me"


def pieces_tokenised_one_by_one(patch: pytest.MonkeyPatch) -> tuple[Case, str]:
    class Piecewise(SampledText):
        def __init__(self, vocabulary: Vocabulary, *, at_start: bool, typed: int) -> None:
            super().__init__([])
            self._vocabulary, self._text = vocabulary, b""

        def ids(self, text: bytes) -> IntArray:
            for token in self._vocabulary.encode(text[len(self._text) :], at_start=not self._text):
                self.append(token)
            self._text = text
            return super().ids(text)

    patch.setattr(generation, "TokenizedText", Piecewise)
    return BROKEN, "me"


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        off_by_a_twentieth,
        temperature_after_mixing,
        one_number_for_route_and_piece,
        one_noise_for_all_places,
        pieces_tokenised_one_by_one,
    ],
)
def test_a_broken_engine_is_found_out(
    open_all: OpenAll, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], tuple[Case, str]]
) -> None:
    count = COUNT // 4
    this, strategy = fault(monkeypatch)
    drawn = draw(remembering(open_all(this), this), this, strategy, count)
    assert g_test(drawn, Tree(open_all(BROKEN), BROKEN).cells(count)) < EXACT
