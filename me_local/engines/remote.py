"""A member that runs elsewhere: an engine, and the vocabulary of its model here.

The engine keeps the caches. A request has all ids of a context, of which it evaluates what its cache lacks, so that a
request that failed can be made again: the same ids give the same logits. Only the largest come back, and so many that
enough of them may be sampled.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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
from me_local.system.inflight import uninterrupted
from me_local.text.vocabulary import Vocabulary

_PART = 1024
"""Tokens of a prompt in a request, between which the user may stop it."""
_MOST = 512
"""How many log-probabilities an engine is asked for at first, to see how many it gives."""
_SPARE = 4
"""Of those that are wanted so many may be of ids that are never sampled (`mixture.alignment.sufficient`)."""
_LOOK = 0.1  # seconds
_SAME = 0.15
"""Total-variation distance of two predictions of one model after the same ids; batches make it some 0.05."""
_TELLING = 16
"""Tokens that an engine finds in its cache, so that it can be no other one than before."""
_PROBE = (
    "The quick brown fox doesn't jump over 13 lazy dogs. Straße, café, Привет, 你好 🙂\n\n  def f(x):\n\treturn x\n"
)
_PROBED = (4, 9, 14)  # tokens after which a model is known again


class RemoteModel:
    """A member of an ensemble behind the address in its configuration; `file` has its vocabulary, and stays open.

    One that `forgets` finds nothing in the engine's caches but what it evaluated itself since then. `wire_seconds` is
    what requests took beyond what the engine says that it took itself, in the `steps` of which it says so. Raises
    LoadError where the engine is not there, runs another model, or has no room for `places` replies at once.

    What an engine answers after it may have been started again counts only once it is seen to be the same model.
    """

    local = False
    foreseeing = None
    divisible = True

    def __init__(self, config: MemberConfig, file: VocabularyFile, *, places: int = 1, forgets: bool = False) -> None:
        assert config.url is not None
        self.file = file
        self.config = config
        self.name = config.name
        self.vocabulary = file.vocabulary
        self.places = places
        self.seconds = self.wire_seconds = 0.0
        self.steps = 0
        self._forgets = forgets
        self._checks_text = config.tokenizer is None
        self._count, self._numbers = 1, np.zeros(self.vocabulary.size, dtype=np.int32)
        self._more = 0
        self._abandoned = 0
        self._lock = threading.Lock()  # several replies at once count in several threads
        self._meeting = threading.Lock()
        self._held: list[IntArray] = [np.empty(0, dtype=np.int32)] * places
        self._row: Row | None = None
        self._connection = Connection(self.name, config.url, _key(config), config.api_key_env)
        self.server: Server = (
            Vllm(self._connection, config.model)
            if config.engine == "vllm"
            else LlamaServer(self._connection, config.model, harmless=_harmless(self.vocabulary))
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
        self._aside = min(self.places, self.description.places - 1)  # a slot for probes, with a cache of nobody's
        self.summary = f"{self.config.engine or 'llama-server'} at {self.config.url}: {self.description.model}"
        if self.places > self.description.places:
            raise RunError(
                f"{where}: has {self.description.places} slots, and {self.places} replies at once are wanted: start it "
                f"with --parallel {self.places}"
            )
        self._require_same_text()
        text = self.vocabulary.encode(_PROBE.encode(), at_start=True)[: _PROBED[-1]]
        self._probe = np.array(text if self.vocabulary.bos is None else [self.vocabulary.bos, *text], dtype=np.int32)
        self._most = self._find_most()
        engine = self.config.engine or "llama-server"
        self.abilities = Abilities(engine, self._most, raw_logits=False, likelihoods=False)
        self._met = time.monotonic()  # what comes over connections that are there already is known from here on
        self._fingerprint, self._called = self._predict_probe()

    def _require_same_text(self, interrupted: Interrupted | None = None) -> None:
        """Raise RunError where the engine tokenises otherwise than the vocabulary here."""
        if not self._checks_text:
            return
        theirs = self.server.tokenize(_PROBE, interrupted)
        if theirs not in [self.vocabulary.encode(_PROBE.encode(), at_start=start) for start in (True, False)]:
            raise RunError(
                f"{self._connection.where}: runs a model with another vocabulary than that of "
                f"{self.config.path or self.config.hf}"
            )

    def _find_most(self) -> int:
        """How many log-probabilities the engine gives at once, up to `_MOST`."""
        taken, refused = 0, min(_MOST, self.vocabulary.size) + 1
        count = refused - 1
        while True:
            try:
                self.server.predict(self._probe.tolist(), count, self._aside, None)
                taken = count
            except RunError:
                if count == 1:
                    raise
                refused = count
            if refused - taken == 1:
                return taken
            count = (taken + refused) // 2

    def _predict_probe(self, interrupted: Interrupted | None = None) -> tuple[list[dict[int, float]], str]:
        """The probabilities of the likeliest ids after parts of the probe, and what the engine calls its model."""
        found: list[dict[int, float]] = []
        for length in _PROBED:
            ids = self._probe[:length].tolist()
            prediction = self.server.predict(ids, min(10, self._most), self._aside, interrupted)
            shortlist = prediction.shortlist
            odds = np.exp(shortlist.logits.astype(np.float64) - shortlist.logits.max())
            found.append(dict(zip(shortlist.ids.tolist(), (odds / odds.sum()).tolist(), strict=True)))
        return found, prediction.model

    def _require_same_model(self, prediction: Prediction, interrupted: Interrupted) -> None:
        """Raise RunError where the engine is no longer the one that it was: a server may have been started again."""
        with self._meeting:
            if prediction.opened < self._met and prediction.model == self._called:
                return  # another reply has looked meanwhile
            where = self._connection.where
            now = self.server.describe(interrupted)
            if now.n_ctx < self.n_ctx or now.places < self.places:
                raise RunError(f"{where}: was started again with less room: load the ensemble again")
            self._require_same_text(interrupted)
            met = time.monotonic()
            found, called = self._predict_probe(interrupted)
            if max(_distance(*pair) for pair in zip(found, self._fingerprint, strict=True)) > _SAME:
                raise RunError(f"{where}: runs another model than before: load the ensemble again")
            self._aside = min(self.places, now.places - 1)
            self._met, self._called = met, called

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
        """Ask for so many log-probabilities, from now on, of ids whose number is not negative; 0: for all of them."""
        self._count = count or int(np.count_nonzero(numbers >= 0))
        self._numbers = numbers

    def logits(self) -> Row:
        """The largest log-probabilities after the last `sync`."""
        assert self._row is not None
        return self._row

    def share_cores(self, parts: int) -> None:
        """It takes none of them."""

    def forget(self) -> None:
        """Evaluate whole prompts again, as far as the engine has not kept them."""
        if self._forgets:
            self.server.forget()
        self._held = [np.empty(0, dtype=np.int32)] * self.places

    def twin(self) -> "RemoteModel":
        """The same engine by connections of their own; what others had it evaluate counts for nothing."""
        return RemoteModel(self.config, self.file, forgets=True)

    def abandon(self) -> None:
        """End what is being asked, by EvaluationInterruptedError in the threads that ask."""
        self._abandoned += 1

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
        end = _common(self._held[place], ids)
        target = len(ids) if most is None else min(len(ids), end + most)
        tokens, before = 0, time.perf_counter()
        while end < target:
            end = min(end + _PART, target)
            tokens += self._ask(ids[:end], 1, place, interrupted).tokens
        self._held[place] = ids[:target].copy()  # what follows there is dropped with the next request
        return Evaluated(tokens, time.perf_counter() - before)

    def predict(self, ids: IntArray, place: int, interrupted: Interrupted) -> tuple[Shortlist, Evaluated]:
        """So many of the largest log-probabilities that enough of them may be sampled."""
        tokens, before, more = 0, time.perf_counter(), self._more
        needed = max(1, self._count - _SPARE)
        while True:
            asked = min(self._count + more, self._most)
            prediction = self._ask(ids, asked, place, interrupted)
            tokens += prediction.tokens
            found = prediction.shortlist
            known = found.ids < self.vocabulary.size  # a model may have more logits than its vocabulary has tokens
            if not known.all():
                found = Shortlist(found.ids[known], found.logits[known])
            usable = int(np.count_nonzero(self._numbers[found.ids] >= 0))
            others = len(prediction.shortlist.ids) < asked  # there are no others: they have no probability
            if usable >= needed or (others and usable) or asked >= self.vocabulary.size:
                evaluated = Evaluated(tokens, time.perf_counter() - before)
                self._note(evaluated, prediction, more)
                return found, evaluated
            if asked == self._most:
                raise RunError(
                    f"{self._connection.where}: gives the {asked} likeliest tokens at most, of which {usable} can be "
                    f"sampled, and {needed} are wanted: lower top_k"
                )
            more = max(2 * more, _SPARE)

    def _note(self, evaluated: Evaluated, prediction: Prediction, more: int) -> None:
        with self._lock:
            self._more = max(self._more, more)
            self.seconds += evaluated.seconds
            if prediction.seconds is not None:
                self.wire_seconds += evaluated.seconds - prediction.seconds
                self.steps += 1

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
        began, common, abandoned = time.monotonic(), _common(self._held[place], ids), self._abandoned

        def given_up() -> bool:
            return self._abandoned != abandoned or interrupted()

        prediction = self.server.predict(ids.tolist(), count, place, given_up)
        if prediction.opened >= self._met or prediction.model != self._called:
            found = len(ids) - prediction.tokens
            if prediction.model == self._called and found >= max(_TELLING, common // 2) and common >= _TELLING:
                self._met = max(self._met, began)  # only the one that it was has this in its cache
            else:
                self._require_same_model(prediction, given_up)
        self._held[place] = ids.copy()
        return prediction


class RemotePlaces:
    """The places of a remote member: a request for each reply, all of them at the same time."""

    def __init__(self, model: RemoteModel) -> None:
        self._model = model
        self._pool = ThreadPoolExecutor(model.places, thread_name_prefix="engine")

    def holds(self, sequence: int, ids: IntArray) -> bool:
        """Whether the engine has evaluated `ids` last, for this place."""
        return np.array_equal(self._model.held(sequence), ids)

    def prefill(self, prompts: Mapping[int, Target], most: int) -> dict[int, Outcome]:
        """Bring places closer to their prompts, each by at most `most` tokens."""

        def fill(place: int, interrupted: Interrupted) -> Outcome:
            return Outcome(*self._model.fill(prompts[place].ids, place, interrupted, most))

        return self._each(fill, list(prompts))

    def sync(self, wanted: Mapping[int, Target], others: Mapping[int, Target] | None = None) -> dict[int, Outcome]:
        """Predictions for the places that are wanted; the others cost nothing less beside them."""

        def predict(place: int, interrupted: Interrupted) -> Outcome:
            row, evaluated = self._model.predict(wanted[place].ids, place, interrupted)
            return Outcome(evaluated.tokens, evaluated.seconds, row)

        return self._each(predict, list(wanted))

    def _each(self, work: Callable[[int, Interrupted], Outcome], places: Sequence[int]) -> dict[int, Outcome]:
        """The outcomes, all at the same time; whatever ends the wait for them ends the requests, too."""
        stopped = threading.Event()

        def one(place: int) -> Outcome:
            try:
                return work(place, stopped.is_set)
            except RunError as error:
                return Outcome(0, 0.0, error=error)

        if len(places) == 1:
            return {places[0]: one(places[0])}
        futures = {place: self._pool.submit(one, place) for place in places}
        try:
            waiting = set(futures.values())
            while waiting:  # not in one wait: where the system gives Ctrl-C to another thread, it would not end
                waiting = wait(waiting, _LOOK).not_done
            return {place: future.result() for place, future in futures.items()}
        except BaseException:
            stopped.set()
            uninterrupted(lambda: wait(futures.values()))
            raise


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


def _distance(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """The total-variation distance of two distributions over ids."""
    return sum(abs(a.get(id_, 0.0) - b.get(id_, 0.0)) for id_ in {*a, *b}) / 2


def _harmless(vocabulary: Vocabulary) -> int:
    """An id that stands for letters."""
    found = (id_ for id_, piece in enumerate(vocabulary.pieces) if piece.isalpha() and piece.isascii())
    return next(found, 0)


def _common(held: IntArray, ids: IntArray) -> int:
    """The length of the prefix that both have."""
    length = min(len(held), len(ids))
    different = np.flatnonzero(held[:length] != ids[:length])
    return int(different[0]) if len(different) else length
