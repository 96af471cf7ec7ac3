"""A member that runs elsewhere: an engine, and the vocabulary of its model here.

The engine keeps the caches. A request has all ids of a context, of which it evaluates what its cache lacks, so that a
request that failed can be made again: the same ids give the same logits. Only the largest come back, and so many that
enough of them may be sampled.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from me_local.arrays import IntArray
from me_local.config import MemberConfig
from me_local.engines.connection import Connection, Interrupted
from me_local.engines.llama_server import LlamaServer
from me_local.engines.server import Prediction, Server
from me_local.engines.vllm import Vllm
from me_local.errors import LoadError, RunError
from me_local.llama.weights import VocabularyFile
from me_local.model import Abilities, Evaluated, Outcome, Row, Shortlist, Target

_PART = 1024
"""Tokens of a prompt in a request, between which the user may stop it."""
_COUNTS = (512, 128, 64, 20, 5)
"""How many log-probabilities an engine is asked for at first, to see how many it gives."""
_SPARE = 4  # so many more than are wanted: some may never be sampled
_SAME = 0.3
"""Total-variation distance of two predictions of one model after the same ids; batches make it some 0.05."""
_PROBE = (
    "The quick brown fox doesn't jump over 13 lazy dogs. Straße, café, Привет, 你好 🙂\n\n  def f(x):\n\treturn x\n"
)
_PROBED = 12  # tokens


class RemoteModel:
    """A member of an ensemble behind the address in its configuration; `file` has its vocabulary, and stays open.

    Without `caches` the engine evaluates each context from its beginning. `wire_seconds` is what requests took beyond
    what the engine says that it took itself, in the `steps` of which it says so. Raises LoadError where the engine is
    not there, runs another model, or has no room for `places` replies at once.
    """

    local = False
    divisible = True

    def __init__(self, config: MemberConfig, file: VocabularyFile, *, places: int = 1, caches: bool = True) -> None:
        assert config.url is not None
        self.file = file
        self.config = config
        self.name = config.name
        self.vocabulary = file.vocabulary
        self.places = places
        self.seconds = self.wire_seconds = 0.0
        self.steps = 0
        self._checks_text = config.tokenizer is None
        self._count, self._numbers = 1, np.zeros(self.vocabulary.size, dtype=np.int32)
        self._spare = _SPARE
        self._held: list[IntArray] = [np.empty(0, dtype=np.int32)] * places
        self._row: Row | None = None
        self._connection = Connection(self.name, config.url, _key(config), config.api_key_env)
        self.server: Server = (
            Vllm(self._connection, config.model, caches=caches)
            if config.engine == "vllm"
            else LlamaServer(self._connection, caches=caches)
        )
        try:
            self._meet()
        except RunError as error:
            self.close()
            raise LoadError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def _meet(self) -> None:
        where = self._connection.where
        self.description = self.server.describe()
        self.n_ctx = self.description.n_ctx
        self.summary = f"{self.config.engine or 'llama-server'} at {self.config.url}: {self.description.model}"
        if self.places > self.description.places:
            raise RunError(
                f"{where}: has {self.description.places} slots, and {self.places} replies at once are wanted: start it "
                f"with --parallel {self.places}"
            )
        self._require_same_text()
        text = self.vocabulary.encode(_PROBE.encode(), at_start=True)[:_PROBED]
        self._probe = np.array(text if self.vocabulary.bos is None else [self.vocabulary.bos, *text], dtype=np.int32)
        self._most = self._find_most()
        self.abilities = Abilities(self.config.engine or "llama-server", self._most - _SPARE, likelihoods=False)
        self._fingerprint = self._predict_probe()

    def _require_same_text(self) -> None:
        """Raise RunError where the engine tokenises otherwise than the vocabulary here."""
        if not self._checks_text:
            return
        theirs = self.server.tokenize(_PROBE)
        if theirs not in [self.vocabulary.encode(_PROBE.encode(), at_start=start) for start in (True, False)]:
            raise RunError(
                f"{self._connection.where}: runs a model with another vocabulary than that of "
                f"{self.config.path or self.config.hf}"
            )

    def _find_most(self) -> int:
        """How many log-probabilities the engine gives at once."""
        for count in _COUNTS:
            count = min(count, self.vocabulary.size)
            try:
                self.server.predict(self._probe.tolist(), count, self.places - 1, None)
                return count
            except RunError:
                if count <= _COUNTS[-1]:
                    raise
        raise AssertionError

    def _predict_probe(self) -> dict[int, float]:
        count = min(10, self._most)
        shortlist = self.server.predict(self._probe.tolist(), count, self.places - 1, None).shortlist
        odds = np.exp(shortlist.logits.astype(np.float64) - shortlist.logits.max())
        return dict(zip(shortlist.ids.tolist(), (odds / odds.sum()).tolist(), strict=True))

    def _require_same_model(self) -> None:
        """Raise RunError where the engine is no longer the one that it was: a server may have been started again."""
        where = self._connection.where
        now = self.server.describe()
        if now.n_ctx < self.n_ctx or now.places < self.places:
            raise RunError(f"{where}: was started again with less room: load the ensemble again")
        self._require_same_text()
        found = self._predict_probe()
        ids = {*found, *self._fingerprint}
        if sum(abs(found.get(id_, 0.0) - self._fingerprint.get(id_, 0.0)) for id_ in ids) / 2 > _SAME:
            raise RunError(f"{where}: runs another model than before: load the ensemble again")

    def prepare(
        self, ids: IntArray, interrupted: Interrupted = lambda: False, *, final: int = 0, alone: bool = False
    ) -> Evaluated:
        """Have the engine evaluate `ids`, in parts between which `interrupted` is asked.

        Raises RunError, EvaluationInterruptedError.
        """
        return self.fill(ids, 0, interrupted)

    def sync(self, ids: IntArray, interrupted: Interrupted = lambda: False, *, final: int = 0) -> Evaluated:
        """Have the engine predict after `ids`, at least one; raises what `prepare` raises."""
        self._row, evaluated = self.predict(ids, 0, interrupted)
        return evaluated

    def shorten(self, count: int, numbers: IntArray) -> None:
        """Ask for so many log-probabilities, from now on, of ids whose number is not negative."""
        self._count, self._numbers = count, numbers

    def logits(self) -> Row:
        """The largest log-probabilities after the last `sync`."""
        assert self._row is not None
        return self._row

    def share_cores(self, parts: int) -> None:
        """It takes none of them."""

    def forget(self) -> None:
        """Evaluate whole prompts again, as far as the engine has not kept them."""
        self._held = [np.empty(0, dtype=np.int32)] * self.places

    def twin(self) -> "RemoteModel":
        """The same engine by connections of their own, and without its caches."""
        return RemoteModel(self.config, self.file, caches=False)

    def keep_states(self, states: object) -> None:
        """The engine has caches of its own."""

    def several(self) -> "RemotePlaces":
        """Its places, for several replies at once."""
        self.forget()
        return RemotePlaces(self)

    def close(self) -> None:
        """Close the connections; what is asked then raises RunError."""
        self._connection.close()

    def held(self, place: int) -> IntArray:
        """What the engine evaluated last for a place."""
        return self._held[place]

    def fill(self, ids: IntArray, place: int, interrupted: Interrupted, most: int | None = None) -> Evaluated:
        """Bring a place closer to `ids`, by at most `most` tokens; None: all of them."""
        common = _common(self._held[place], ids)
        target = len(ids) if most is None else min(len(ids), common + most)
        tokens, before = 0, time.perf_counter()
        for end in range(min(common + _PART, target), target + 1, _PART) if common < target else ():
            tokens += self._ask(ids[:end], 1, place, interrupted).tokens
        if common < target and not np.array_equal(self._held[place], ids[:target]):
            tokens += self._ask(ids[:target], 1, place, interrupted).tokens
        return Evaluated(tokens, time.perf_counter() - before)

    def predict(self, ids: IntArray, place: int, interrupted: Interrupted) -> tuple[Shortlist, Evaluated]:
        """So many of the largest log-probabilities that enough of them may be sampled."""
        tokens, before = 0, time.perf_counter()
        while True:
            asked = min(self._count + self._spare, self._most)
            prediction = self._ask(ids, asked, place, interrupted)
            tokens += prediction.tokens
            found = prediction.shortlist
            known = found.ids < self.vocabulary.size  # a model may have more logits than its vocabulary has tokens
            if not known.all():
                found = Shortlist(found.ids[known], found.logits[known])
            usable = int(np.count_nonzero(self._numbers[found.ids] >= 0))
            if usable >= self._count or asked >= self.vocabulary.size:
                seconds = time.perf_counter() - before
                self.seconds += seconds
                if prediction.seconds is not None:
                    self.wire_seconds += seconds - prediction.seconds
                    self.steps += 1
                return found, Evaluated(tokens, seconds)
            if asked == self._most:
                raise RunError(
                    f"{self._connection.where}: gives the {asked} likeliest tokens at most, of which {usable} can be "
                    f"sampled, and {self._count} are wanted: lower top_k"
                )
            self._spare *= 2

    def measure(self, steps: int = 20) -> tuple[float, bool | None]:
        """The median time of a step, in seconds, and whether the engine finds earlier contexts in its cache.

        None where it does not say. Raises RunError.
        """
        ids = np.resize(self._probe, 4 * len(self._probe) + steps)
        self.fill(ids[:-steps], 0, _never)
        found = [self.predict(ids[: len(ids) - steps + step + 1], 0, _never)[1] for step in range(steps)]
        cached = min(evaluated.tokens for evaluated in found) < len(ids) - steps
        return median(each.seconds for each in found), cached or (None if self.config.engine == "vllm" else False)

    def _ask(self, ids: IntArray, count: int, place: int, interrupted: Interrupted) -> Prediction:
        prediction = self.server.predict(ids.tolist(), count, place, interrupted)
        if prediction.fresh:
            self._require_same_model()
        self._held[place] = ids.copy()
        return prediction


class RemotePlaces:
    """The places of a remote member: a request for each reply, all of them at the same time."""

    def __init__(self, model: RemoteModel) -> None:
        self._model = model
        self._pool = ThreadPoolExecutor(model.places)

    def holds(self, sequence: int, ids: IntArray) -> bool:
        """Whether the engine has evaluated `ids` last, for this place."""
        return np.array_equal(self._model.held(sequence), ids)

    def prefill(self, prompts: Mapping[int, Target], most: int) -> dict[int, Outcome]:
        """Bring places closer to their prompts, each by at most `most` tokens."""

        def fill(place: int) -> Outcome:
            return Outcome(*self._model.fill(prompts[place].ids, place, _never, most))

        return self._each(fill, list(prompts))

    def sync(self, wanted: Mapping[int, Target], others: Mapping[int, Target] | None = None) -> dict[int, Outcome]:
        """Predictions for the places that are wanted; the others cost nothing less beside them."""

        def predict(place: int) -> Outcome:
            row, evaluated = self._model.predict(wanted[place].ids, place, _never)
            return Outcome(evaluated.tokens, evaluated.seconds, row)

        return self._each(predict, list(wanted))

    def _each(self, work: Callable[[int], Outcome], places: Sequence[int]) -> dict[int, Outcome]:
        def one(place: int) -> Outcome:
            try:
                return work(place)
            except RunError as error:
                return Outcome(0, 0.0, error=error)

        if len(places) == 1:
            return {places[0]: one(places[0])}
        return dict(zip(places, self._pool.map(one, places), strict=True))


def _never() -> bool:
    return False


def _key(config: MemberConfig) -> str | None:
    """The key that the configuration names. Raises LoadError where the environment lacks it."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise LoadError(f'member "{config.name}": api_key_env: the environment has no usable {config.api_key_env}')
    return key


def _common(held: IntArray, ids: IntArray) -> int:
    """The length of the prefix that both have."""
    length = min(len(held), len(ids))
    different = np.flatnonzero(held[:length] != ids[:length])
    return int(different[0]) if len(different) else length
