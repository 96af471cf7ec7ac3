"""A text that is told again in front of its completion, with what the ensemble finds of each of its units.

The log-probabilities are its likelihoods, as `decoding.likelihoods` defines them: at temperature 1 and without
truncation, whatever the settings of the completion. Units are tokens where the members that may write share one
vocabulary, else words; ids are units as they are. The first has no log-probability, and those behind it add up to what
`Ensemble.score` gives for them as a continuation of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from me_local.arrays import FloatArray, IntArray
from me_local.asking import Ask, Tokens
from me_local.decoding.likelihoods import Passage, Scorer, mixed, unit_weights
from me_local.ensemble import Ensemble
from me_local.mixture.routing import route


class Unit(NamedTuple):
    """Some bytes of a text, and their log-probability, in nats; None for the first.

    `top` are the likeliest tokens in its place with theirs, the best first; None for the first, and where units are
    words.
    """

    piece: bytes
    log_probability: float | None = None
    top: tuple[tuple[bytes, float], ...] | None = None


@dataclass(frozen=True, slots=True)
class Echo:
    """The text of a prompt, and its units where they were asked for."""

    text: str
    units: tuple[Unit, ...] = ()


def echo(ensemble: Ensemble, ask: Ask, interrupted: Callable[[], bool] = lambda: False) -> Echo:
    """What is told of the prompt of a completion.

    Raises ConfigError, InputError for a prompt that is empty or too long for a member, or has bytes that one cannot
    write, and for members without likelihoods; RunError, EvaluationInterruptedError.
    """
    config = ensemble.with_overrides(ask.overrides)
    head, prompts, _ = ensemble.prompter.asked(ask.prompt, config, raw=True, interrupted=interrupted)
    which = [index for index, writes in enumerate(ensemble.prompter.writing(config)) if writes]
    vocabulary = ensemble.members[which[0]].vocabulary
    text = vocabulary.joined(ask.prompt.ids) if isinstance(ask.prompt, Tokens) else head
    shown = text.decode("utf-8", "replace")
    if ask.echo != "scores":
        return Echo(shown)
    scorer = ensemble.scorers.of(which)
    listing = _Listing(ensemble, scorer, np.array([config.members[index].weight for index in which]), interrupted)
    chosen = [prompts[index] for index in which]
    with ensemble.engine.turns.use(), ensemble.engine.steps.use():
        if isinstance(ask.prompt, Tokens):
            ids = list(ask.prompt.ids)
            chosen = [prompt[: len(prompt) - len(ids)] for prompt in chosen]
            pieces = [vocabulary.pieces[id_] for id_ in ids]
        elif scorer.same:
            ids, starts = scorer.readers[0].tokens(text, typed=len(text))
            pieces = [text[start:end] for start, end in pairwise(starts.tolist())]
        else:
            return Echo(shown, tuple(listing.words(chosen, text)))
        return Echo(shown, tuple(listing.tokens(chosen, ids, pieces, ask.top)))


class _Listing:
    """The units of a text, with some members of an ensemble and their weights."""

    def __init__(
        self, ensemble: Ensemble, scorer: Scorer, weights: FloatArray, interrupted: Callable[[], bool]
    ) -> None:
        self._router = ensemble.engine.router
        self._scorer = scorer
        self._weights = weights
        self._interrupted = interrupted

    def tokens(self, prompts: list[IntArray], ids: list[int], pieces: list[bytes], top: int) -> Iterator[Unit]:
        """Tokens with these ids and bytes, behind the members' prompts."""
        yield Unit(pieces[0])
        given = np.array(ids[:-1], dtype=np.int32)
        contexts = [np.concatenate([prompt, given]) for prompt in prompts]
        rows = [
            reader.rows(context, len(prompt), self._interrupted)
            for reader, context, prompt in zip(self._scorer.readers, contexts, prompts, strict=True)
        ]
        vocabulary = self._scorer.readers[0].vocabulary
        text = pieces[0]
        for id_, piece, found in zip(ids[1:], pieces[1:], zip(*rows, strict=True), strict=True):
            weights = route(self._router, text, self._weights, [True] * len(self._weights))
            logs = mixed(np.array(found), weights[:, None])
            best = [(vocabulary.pieces[i], float(logs[i])) for i in _largest(logs, top)]
            yield Unit(piece, float(logs[id_]), tuple(best))
            text += piece

    def words(self, prompts: list[IntArray], text: bytes) -> Iterator[Unit]:
        """The words of a text."""
        first = self._scorer.first_end(text)
        yield Unit(text[:first])
        if first == len(text):
            return
        passage = Passage(tuple(prompts), text, first, typed=len(text))
        scores = self._scorer.units(passage, self._interrupted)
        weights = unit_weights(self._router, passage, scores, self._weights)
        borders = pairwise([*scores.starts.tolist(), len(text)])
        for (start, end), log in zip(borders, mixed(scores.log_probabilities, weights).tolist(), strict=True):
            yield Unit(text[start:end], log)


def _largest(values: FloatArray, count: int) -> list[int]:
    """Where the largest are, in their order."""
    if count == 0:
        return []
    found = np.argpartition(-values, count - 1)[:count]
    return [int(index) for index in found[np.argsort(-values[found], kind="stable")]]
