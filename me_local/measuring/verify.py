"""Three checks that ME samples the distribution that CE does, on the members and the router that are loaded.

- Cache fidelity: in the middle of ME replies, the drawn member's prediction against a fresh evaluation of the same ids
  in one pass, in another context. The yardstick is what llama.cpp itself does to a prediction when ids come one by
  one, as under CE.
- Strategy equality: at some prefixes, pieces drawn by the whole ME path against the mixture of CE, by a G-test. By
  tokens only: there is no CE by words to compare with.
- Canonical context: after each step, a member's ids against those that its tokenizer gives the whole text.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from me_local.arrays import FloatArray, IntArray
from me_local.asking import guesses, make_request
from me_local.decoding.engine import Engine, Request
from me_local.decoding.generation import Generation
from me_local.decoding.guessing import Repeats, Source
from me_local.ensemble import Ensemble
from me_local.errors import RunError
from me_local.mixture.alignment import Distribution
from me_local.model import Evaluated, LoadedModel, Row, Shortlist
from me_local.text.unified import END
from me_local.text.utf8 import utf8_runs

PROMPTS = (
    "The history of the Roman Empire begins with",
    "def median(values):\n    values = sorted(values)\n",
    "Question: A train leaves at 9:40 and takes 3 hours and 35 minutes. When does it arrive?\nAnswer:",
    "Die Hauptstadt von Österreich ist",
    "It was a dark and stormy night; the rain fell in torrents, and",
)
STEPS = 60
"""Steps of ME for each prompt."""
COMPARED = 16
"""Steps among them, for each prompt, whose prediction is evaluated anew."""
STEPPED = 6
"""Contexts, for each prompt and member, that are evaluated one by one and anew."""
DRAWS = 600
"""Pieces drawn at one prefix of each reply."""

FACTOR = 3.0
"""How far the cache's distances may be beyond those of one-by-one evaluation."""
ROUNDING = 0.002
"""A total-variation distance that is always allowed: models without noise of their own still round."""
FALSE_ALARM = 1e-4
"""How often strategy equality fails although it holds."""
_COMPARED_LOGITS = 100  # of a member that does not give all of them
_SMALLEST_CELL = 10  # expected draws; below it the chi-square approximation gets worse


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Cache fidelity of one member: total-variation distances of its predictions from fresh ones.

    `mean` and `largest` are over `compared` steps of ME, of which `guessed` had their logits by a guess; the largest is
    that at step `step` of the reply to prompt `prompt` (both from 1; 0 where the member was never drawn).
    `stepping_mean` and `stepping_largest` are those of `stepped` one-by-one evaluations.
    """

    member: str
    compared: int
    guessed: int
    mean: float
    largest: float
    prompt: int
    step: int
    stepped: int
    stepping_mean: float
    stepping_largest: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Equality:
    """Strategy equality: the G statistic of all draws together, its degrees of freedom and its p-value.

    `p_values` are those of the single prefixes; `strangers` the draws that CE would never make.
    """

    draws: int
    p_values: tuple[float, ...]
    statistic: float
    freedom: int
    p_value: float
    strangers: int
    passed: bool


@dataclass(frozen=True, slots=True)
class Canonical:
    """Canonical contexts: the number of steps, and the first that differed as (member, prompt, step), from 1."""

    steps: int
    different: tuple[str, int, int] | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What was found."""

    seed: int
    fidelity: tuple[Fidelity, ...]
    equality: Equality
    canonical: Canonical

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(part.passed for part in self.fidelity) and self.equality.passed and self.canonical.passed

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {"passed": self.passed, **asdict(self)}


def most_compared(model: LoadedModel) -> int:
    """How many of the largest logits are compared; 0: all of them, where there are all."""
    most = model.abilities.most_logits
    return 0 if most is None else min(_COMPARED_LOGITS, most)


class _Witness:
    """A model that gives as many logits as are compared."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.name, self.n_ctx, self.vocabulary = model.name, model.n_ctx, model.vocabulary
        self.divisible, self.local, self.foreseeing = model.divisible, model.local, model.foreseeing

    def prepare(
        self, ids: IntArray, interrupted: Callable[[], bool] = lambda: False, *, final: int = 0, alone: bool = False
    ) -> Evaluated:
        return self.model.prepare(ids, interrupted, final=final, alone=alone)

    def sync(self, ids: IntArray, interrupted: Callable[[], bool] = lambda: False, *, final: int = 0) -> Evaluated:
        return self.model.sync(ids, interrupted, final=final)

    def shorten(self, count: int, numbers: IntArray) -> None:
        self.model.shorten(most_compared(self.model), numbers)

    def logits(self) -> Row:
        return self.model.logits()

    def share_cores(self, parts: int) -> None:
        self.model.share_cores(parts)


class _Watched(Generation):
    """A reply that remembers what it was given last: by member, the ids, the logits, and whether by a guess."""

    seen: dict[int, tuple[IntArray, Row, bool]]

    def _bring(self, members: Sequence[int]) -> dict[int, Row]:
        before = [work.guessed for work in self.work]
        rows = super()._bring(members)
        self.seen = {i: (self.ids(i), row, self.work[i].guessed > before[i]) for i, row in rows.items()}
        return rows


def work(ensemble: Ensemble) -> int:
    """The number of times that `verify` reports progress."""
    return len(PROMPTS) * (STEPS + STEPPED * len(ensemble.members) + DRAWS)


def verify(ensemble: Ensemble, references: Sequence[LoadedModel], seed: int, advance: Callable[[], object]) -> Report:
    """Run the three checks; `references` are members with contexts of their own, one for each of the ensemble's.

    What is written and which steps are compared follows from `seed`. Raises RunError.
    """
    return _Verification(ensemble, references, seed, advance).run()


class _Verification:
    def __init__(
        self, ensemble: Ensemble, references: Sequence[LoadedModel], seed: int, advance: Callable[[], object]
    ) -> None:
        self._ensemble, self._references, self._seed, self._advance = ensemble, references, seed, advance
        engine = ensemble.engine
        self._witnesses = [_Witness(member) for member in ensemble.members]
        self._engine = Engine(self._witnesses, engine.router, engine.alignment)
        for reference, numbers in zip(references, self._engine.unified.numbers, strict=True):
            reference.shorten(most_compared(reference), numbers)
        self._random = np.random.default_rng(seed)
        self._distances: list[list[tuple[float, int, int]]] = [[] for _ in references]
        self._stepping: list[list[float]] = [[] for _ in references]
        self._guessed = [0] * len(references)
        self._steps = 0
        self._different: tuple[str, int, int] | None = None

    def run(self) -> Report:
        prefixes = [self._reply(number, prompt) for number, prompt in enumerate(PROMPTS, start=1)]
        fidelity = tuple(self._fidelity(i) for i in range(len(self._references)))
        equality = self._equality(prefixes)
        canonical = Canonical(self._steps, self._different, self._different is None)
        return Report(self._seed, fidelity, equality, canonical)

    def _request(self, text: bytes, seed: int) -> Request:
        config = self._ensemble.config
        request = make_request(config, self._ensemble.prompter.raw_prompts(text.decode(), config))
        # The mixture is compared with draws of many seeds: XTC, whose coin follows from the seed, is left out.
        sampling = tuple(replace(each, xtc_probability=0.0) for each in request.sampling)
        return replace(request, sampling=sampling, strategy="me", unit="token", argmax=False, seed=seed)

    def _reply(self, number: int, prompt: str) -> bytes:
        """Write a reply, compare some of its steps, and return one of its prefixes."""
        request = self._request(prompt.encode(), self._seed + number)
        generation = _Watched(self._engine, request, source=self._source(request))
        compared = set(self._random.choice(STEPS, COMPARED, replace=False).tolist())
        prefixes = [generation.text]
        for step in range(STEPS):
            draw = generation.step()
            self._advance()
            if draw is None:
                break
            if step in compared:
                self._compare(generation, draw.member, number, step + 1)
            self._check_contexts(generation, request, number, step + 1)
            if draw.number != END and _whole(generation.text):
                prefixes.append(generation.text)
        for member in range(len(self._references)):
            if self._can_write(member, generation.text):
                self._step_by_step(member, generation.ids(member), generation.given[member])
        return prefixes[int(self._random.integers(len(prefixes)))]

    def _source(self, request: Request) -> Source | int | None:
        """With guesses of bytes, those of one who has seen this reply before."""
        source = guesses(self._ensemble.members, self._ensemble.config, b"")
        if source is None or isinstance(source, int):
            return source
        earlier = Generation(self._engine, request)
        for _ in range(STEPS):
            if earlier.step() is None:
                break
        return Repeats(earlier.text)

    def _compare(self, generation: _Watched, member: int, number: int, step: int) -> None:
        ids, row, guessed = generation.seen[member]
        distance = _distance(self._prediction(member, row), self._fresh(member, ids))
        self._distances[member].append((distance, number, step))
        self._guessed[member] += guessed

    def _fresh(self, member: int, ids: IntArray) -> FloatArray:
        reference = self._references[member]
        reference.forget()
        reference.sync(ids)
        return self._prediction(member, reference.logits())

    def _step_by_step(self, member: int, ids: IntArray, given: int) -> None:
        """Evaluate the reply's ids one by one; some of the predictions anew, in one pass."""
        reference = self._references[member]
        lengths = np.arange(given, len(ids) + 1)
        chosen = self._random.choice(lengths, min(STEPPED, len(lengths)), replace=False).tolist()
        reference.forget()
        reference.prepare(ids[: given - 1])
        stepped = {}
        for length in lengths.tolist():
            reference.sync(ids[:length])
            if length in chosen:
                stepped[length] = self._prediction(member, reference.logits())
        for length, prediction in stepped.items():
            self._stepping[member].append(_distance(prediction, self._fresh(member, ids[:length])))
            self._advance()

    def _prediction(self, member: int, row: Row) -> FloatArray:
        """The member's whole distribution over ids, tempered but not truncated.

        At the edge of a truncation a low bit would count as much as a token's whole probability.
        """
        numbers = self._engine.unified.numbers[member]
        if isinstance(row, Shortlist):
            logits = np.full(len(numbers), -np.inf)
            known = row.ids < len(numbers)
            logits[row.ids[known]] = row.logits[known]
        else:
            logits = row.astype(np.float64)
        scores: FloatArray = logits / (self._ensemble.config.members[member].sampling.temperature or 1.0)
        scores[numbers < 0] = -np.inf
        weights: FloatArray = np.exp(scores - scores.max())
        weights /= weights.sum()
        return weights

    def _check_contexts(self, generation: Generation, request: Request, number: int, step: int) -> None:
        """Where all members share a vocabulary, ids are as they were sampled: they have to stand for the text."""
        self._steps += 1
        text = generation.text
        for i, (model, prompt) in enumerate(zip(self._engine.models, request.prompts, strict=True)):
            if not self._can_write(i, text):
                continue
            ids = generation.ids(i)[len(prompt) :].tolist()
            if self._engine.unified.same:
                right = model.vocabulary.joined(ids) in (text, b" " + text)
            else:
                right = ids == model.vocabulary.canonical(text, typed=len(request.head), at_start=True)
            if not right and self._different is None:
                self._different = model.name, number, step

    def _can_write(self, member: int, text: bytes) -> bool:
        strays = frozenset(b"".join(run for run, valid in utf8_runs(text) if not valid))
        return self._engine.unified.same or self._engine.models[member].vocabulary.can_write(strays)

    def _fidelity(self, member: int) -> Fidelity:
        found, stepping = self._distances[member], self._stepping[member]
        largest, prompt, step = max(found, default=(0.0, 0, 0))
        mean = float(np.mean([distance for distance, *_ in found])) if found else 0.0
        stepping_mean, stepping_largest = (float(np.mean(stepping)), max(stepping)) if stepping else (0.0, 0.0)
        return Fidelity(
            member=self._engine.models[member].name,
            compared=len(found),
            guessed=self._guessed[member],
            mean=mean,
            largest=largest,
            prompt=prompt,
            step=step,
            stepped=len(stepping),
            stepping_mean=stepping_mean,
            stepping_largest=stepping_largest,
            passed=mean <= ROUNDING + FACTOR * stepping_mean and largest <= ROUNDING + FACTOR * stepping_largest,
        )

    def _equality(self, prefixes: Sequence[bytes]) -> Equality:
        tests = [self._draw(prefix, 1_000_000 * number) for number, prefix in enumerate(prefixes, start=1)]
        statistic, freedom = sum(test[0] for test in tests), sum(test[1] for test in tests)
        strangers = sum(test[2] for test in tests)
        p_value = float(special.chdtrc(freedom, statistic)) if freedom else 1.0
        p_values = tuple(float(special.chdtrc(n, g)) if n else 1.0 for g, n, _ in tests)
        passed = p_value >= FALSE_ALARM and strangers == 0
        return Equality(len(tests) * DRAWS, p_values, statistic, freedom, p_value, strangers, passed)

    def _draw(self, prefix: bytes, seed: int) -> tuple[float, int, int]:
        """The G statistic of draws at a prefix, its degrees of freedom, and the draws that CE would never make."""
        request = self._request(prefix, self._seed + seed)
        mixture = Generation(self._ensemble.engine, request, lambda: False).mixture()
        counts: Counter[int] = Counter()
        for i in range(DRAWS):
            one = replace(request, seed=request.seed + i)
            draw = Generation(self._ensemble.engine, one, lambda: False).step()
            self._advance()
            if draw is None:
                raise RunError("a context is too small: verify needs room for its prompts and about 100 tokens more")
            counts[draw.number] += 1
        return g_test(mixture, counts)


def g_test(mixture: Distribution, counts: Counter[int]) -> tuple[float, int, int]:
    """Draws of pieces against their probabilities: G with Williams' correction, and its degrees of freedom.

    Pieces of which fewer than 10 draws are expected are counted together. The third figure is the number of draws
    that have no probability at all. Source: Sokal and Rohlf, Biometry, chapter 17.
    """
    observed = np.array([counts[int(number)] for number in mixture.numbers], dtype=np.float64)
    strangers = counts.total() - int(observed.sum())
    expected = mixture.probabilities * counts.total()
    rare = expected < _SMALLEST_CELL
    if rare.any():
        # With the smallest of the others, where they alone are too few.
        if expected[rare].sum() < _SMALLEST_CELL and not rare.all():
            rare[np.flatnonzero(~rare)[expected[~rare].argmin()]] = True
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    freedom = len(expected) - 1
    if freedom < 1:
        return 0.0, 0, strangers
    seen = observed > 0
    g = 2 * float((observed[seen] * np.log(observed[seen] / expected[seen])).sum())
    total = counts.total()
    correction = 1 + ((total / expected).sum() - 1) / (6 * total * freedom)
    return g / float(correction), freedom, strangers


def _distance(a: FloatArray, b: FloatArray) -> float:
    """Total-variation distance of two distributions."""
    return float(np.abs(a - b).sum() / 2)


def _whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
