"""An ensemble that is loaded and ready: its replies, one or many, and the likelihoods of texts.

Brings together what the configuration names. One reply is made at a time, unless it is loaded for several at once
(`generate_many`).
"""

import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from me_local.asking import (
    Ask,
    Prompt,
    Prompter,
    Prompts,
    check_conversation,
    guesses,
    make_request,
    require_able,
    visible,
)
from me_local.config import Config, Overrides, load_config, override, seeded
from me_local.decoding.batching import Batching, Running
from me_local.decoding.engine import Engine, Request
from me_local.decoding.generation import Generation
from me_local.decoding.likelihoods import Passage, Score, Scorers, UnitScores, mixed, unit_weights
from me_local.decoding.losses import first_loss
from me_local.decoding.reply import Draft, Reply, ReplyStream
from me_local.engines.instances import instances_config, load_instances, one_sequence
from me_local.engines.loading import OnLoad, load_members
from me_local.errors import ConfigError, InputError, MeLocalError
from me_local.llama.member import Member
from me_local.llama.weights import Shelf
from me_local.mixture.alignment import Alignment
from me_local.mixture.routing import Router, SharedRoute, Stretch
from me_local.plugins import find
from me_local.sampling import Sampling
from me_local.text.messages import Message


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of the prompt with this `index`: a `reply`, or an `error` that left none.

    `stretch` is its part of the route, where that was shared.
    """

    index: int
    reply: Reply | None = None
    error: MeLocalError | None = None
    stretch: Stretch | None = None


class Ensemble:
    """Several GGUF models that write one reply together. Use as a context manager, or call `close`.

    `config` is what it was loaded from; `prompter` makes its members' prompts; `template_notices` are those of its
    `notices` that say how members see a conversation; `batch` is the number of replies that it can make at once.
    Weights come from `shelf`, if one is given, and stay there. With `check`, files that are used for the first time are
    tried in a child process before; None: unless ME_LOCAL_NO_CHECK is set. `instances` are those of `of`. Raises
    ConfigError and LoadError.

    Several threads may use one ensemble: one evaluates at a time and the others wait, for a whole reply of `generate`
    or else for a step, so that they get the replies that they would get one by one. To close it waits for a step.
    Streams may be read in turn, in any threads; each then finds the members where the other left them, and evaluates
    its text again in other batches, so that its numbers differ in their low bits from those of a stream that is read
    alone. A process that is forked off has none of llama.cpp's threads: all that evaluates raises RunError there, and
    so does loading once anything has been evaluated; one that was started by "spawn" can load and evaluate.
    """

    def __init__(
        self,
        config: Config,
        on_load: OnLoad = lambda *_: None,
        *,
        batch: int = 1,
        shelf: Shelf | None = None,
        check: bool | None = None,
        instances: Mapping[str, Any] | None = None,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch: there is at least one reply at once, got {batch}")
        self.config = config
        self.batch = batch
        table = f"{config.place}[ensemble]"
        router: Router = find("me_local.routers", config.router, f"{table}.router")
        alignment: Alignment = find("me_local.alignments", config.alignment, f"{table}.alignment")
        self.shelf = shelf or Shelf()
        with ExitStack() as stack:
            if shelf is None:
                stack.callback(self.shelf.close)
            if instances is None:
                loaded = load_members(config, self.shelf, stack, on_load, batch, check=check)
            else:
                loaded = load_instances(config, instances, stack)
            self.members, self.writers = loaded.members, loaded.writers
            self.prompter = Prompter(loaded.members, loaded.writers, loaded.plain)
            self._notices = loaded.notices
            self.template_notices = loaded.template_notices
            self.engine = Engine(self.members, router, alignment, loaded.unified)
            require_able(self.engine, self.members, config)
            for i, member in enumerate(self.members):
                if isinstance(member, Member) and member.on_gpu:  # in replies, only the largest logits are handed over
                    self.engine.losses[i] = first_loss(member, self.writers[i])
            self._stack = stack.pop_all()
        self.scorers = Scorers(self.members, self._stack.enter_context, same=self.engine.unified.same)

    @classmethod
    def of(
        cls,
        instances: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        overrides: Overrides | None = None,
        *,
        sampling: Mapping[str, Sampling] | None = None,
        templates: Mapping[str, str] | None = None,
        batch: int = 1,
    ) -> "Ensemble":
        """An ensemble of `llama_cpp.Llama` objects that a program has made, by the names of the members.

        All may be given by the members' names: `weights`, 1 for those that are not named; `sampling`; and `templates`,
        each what `chat_template` in a models.toml may be, in the place of that in the GGUF. `overrides` hold for all.
        The instances are driven by their `eval`, and stay the program's: closing the ensemble does not close them.
        `n_tokens` and `input_ids` of each say between two steps what its cache holds; one that the program has used
        meanwhile is evaluated anew. They give the replies that members of a models.toml with equal options and
        `draft = "none"` give, seed by seed. A `Llama` has room for one reply at a time, so that `batch` can be 1 alone.
        Raises ConfigError for what cannot be a member, and LoadError for a model that cannot.
        """
        config = instances_config(instances, weights or {}, sampling or {}, templates or {})
        if batch > 1:
            raise ConfigError(one_sequence(config.members[0].name))
        return cls(override(config, overrides or Overrides()), batch=batch, instances=instances)

    @property
    def plain(self) -> tuple[str, ...]:
        """The names of the members that see a plain transcript."""
        return tuple(name for name, plain in zip(self.names, self.prompter.plain, strict=True) if plain)

    def with_overrides(self, overrides: Overrides | None, config: Config | None = None) -> Config:
        """`config`, else its own, with these before it. Raises ConfigError, also where an engine cannot do it."""
        config = config or self.config
        if overrides is not None:
            config = override(config, overrides)
            require_able(self.engine, self.members, config)
        return config

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, in the order of all weights and shares."""
        return tuple(member.name for member in self.members)

    @property
    def notices(self) -> list[str]:
        """One-line remarks for its user; the first replies may add some."""
        losses = [(self.names[i], loss) for i, loss in sorted(self.engine.losses.items())]
        left_out = [
            f"{name}: it evaluates no guesses (draft): it runs elsewhere, or its memory cannot be cut back"
            for name, member in zip(self.names, self.members, strict=True)
            if self.config.draft not in (None, "none") and member.foreseeing is None
        ]
        return (
            self._notices
            + left_out
            + self.template_notices
            + [loss.notice(name) for name, loss in losses if loss.matters]
        )

    @property
    def unit(self) -> str:
        """What its likelihoods mix: "token" where all members share one vocabulary, else "word"."""
        return "token" if self.engine.unified.same else "word"

    def stream(
        self,
        prompt: Prompt,
        overrides: Overrides | None = None,
        *,
        raw: bool = False,
        alone: bool = True,
        top: int = 0,
        cancelled: threading.Event | None = None,
    ) -> ReplyStream:
        """A reply to a prompt or a conversation, as a stream of steps; with `raw`, a completion of the prompt.

        Where the assistant has the last word in a conversation, the reply goes on behind it.

        `overrides` go before the configuration. The reply to a seed does not depend on what was asked before, unless
        `alone` is false: then what is in the cache is used wherever it can be. Each step names the `top` likeliest
        pieces. `cancelled`, once it is set, ends the reply as `ReplyStream.cancel` does, and what comes before it by an
        EvaluationInterruptedError. Raises ConfigError for overrides, InputError for a prompt that is empty or too long
        for a member.
        """
        config, cancelled = self.with_overrides(overrides), cancelled or threading.Event()
        prompts = self.prompter.asked(prompt, config, raw=raw, interrupted=cancelled.is_set)
        seen = visible(prompt, raw=raw)
        return self.start(config, prompts, alone=alone, top=top, prefill=not raw, cancelled=cancelled, shown=seen)

    def generate(self, prompt: Prompt, overrides: Overrides | None = None, *, raw: bool = False) -> Reply:
        """The whole reply to a prompt or a conversation; see `stream`."""
        with self.engine.turns.use():
            return self.stream(prompt, overrides, raw=raw).finish()

    def generate_many(
        self,
        prompts: Iterable[Prompt | Ask],
        overrides: Overrides | None = None,
        *,
        raw: bool = False,
        earlier: Mapping[int, Stretch | None] | None = None,
    ) -> Iterator[Finished]:
        """Replies to many prompts, `batch` at once, in the order in which they are finished.

        Each has the ensemble's distribution, like those of `generate`. The i-th prompt gets the seed + i, if there is a
        seed and it has none of its own. With a shared route (`routing.SharedRoute`) replies depend on each other by the
        members that they draw, and by nothing else. `earlier` names prompts, by index, that were finished in an earlier
        run, which is gone on with here: they are left out, and the others get the replies that they would have got. A
        prompt that cannot be replied to is finished with its error, and so is a reply in which a member fails; the
        others go on. Raises ConfigError for overrides.
        """
        config, earlier = self.with_overrides(overrides), earlier or {}
        asks = (ask if isinstance(ask, Ask) else Ask(ask) for ask in prompts)
        if self.batch == 1:
            todo = ((index, ask) for index, ask in enumerate(asks) if index not in earlier)
            return (self._finish(config, index, ask, raw=raw) for index, ask in todo)
        seeds = [stretch.seed for stretch in earlier.values() if stretch]
        seed = seeds[0] if seeds else secrets.randbits(32) if config.seed is None else config.seed
        batching = self.batching(config, seed=seed)
        if self.shares_route(config):
            config = override(
                config, Overrides(seed=seed)
            )  # so that an earlier run without a seed can be gone on with, too
        return self._finish_many(config, enumerate(asks), batching, earlier, raw=raw)

    def batching(self, config: Config, *, seed: int | None = None) -> Batching:
        """Places for `batch` replies, with the route that the configuration wants; `seed` is that of a shared one."""
        route = SharedRoute(secrets.randbits(32) if seed is None else seed) if self.shares_route(config) else None
        return Batching(self.engine, self.members, route)

    def shares_route(self, config: Config) -> bool:
        """Whether replies at once draw the same members.

        Without a wish they do where that keeps ME's gain: not by words, and not where weights depend on the text.
        """
        return self.batch > 1 and self.may_share_route(config)

    def may_share_route(self, config: Config) -> bool:
        """The same for any number of replies."""
        wanted = config.route == "shared" or (config.route is None and config.router == "constant")
        return wanted and config.unit == "token"

    def begin(
        self,
        batching: Batching,
        config: Config,
        ask: Ask,
        *,
        raw: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Running:
        """Give the reply to a prompt a place.

        Raises what `stream` raises, EvaluationInterruptedError where it is `interrupted` before it has one, and
        RunError when the router fails.
        """
        config = self.with_overrides(ask.overrides, config)
        prompts = self.prompter.asked(ask.prompt, config, raw=raw, interrupted=interrupted)
        request = make_request(config, prompts, () if raw else self.prompter.kinds, top=ask.top, prefill=not raw)
        return batching.begin(request, lambda generation: self._draft(config, request, generation))

    def _finish(self, config: Config, index: int, ask: Ask, *, raw: bool) -> Finished:
        try:
            config = self.with_overrides(ask.overrides, seeded(config, index))
            prompts = self.prompter.asked(ask.prompt, config, raw=raw)
            with self.engine.turns.use():
                seen = visible(ask.prompt, raw=raw)
                stream = self.start(config, prompts, alone=True, top=ask.top, prefill=not raw, shown=seen)
                return Finished(index, stream.finish())
        except MeLocalError as error:
            return Finished(index, error=error)

    def _finish_many(
        self,
        config: Config,
        asks: Iterator[tuple[int, Ask]],
        batching: Batching,
        earlier: Mapping[int, Stretch | None],
        *,
        raw: bool,
    ) -> Iterator[Finished]:
        running: dict[Running, int] = {}
        following = next(asks, None)
        try:
            while following or running:
                while following and batching.free:
                    index, ask = following
                    following = next(asks, None)
                    if index in earlier:
                        batching.occupy(earlier[index])
                        continue
                    try:
                        running[self.begin(batching, seeded(config, index), ask, raw=raw)] = index
                    except MeLocalError as error:
                        yield Finished(index, error=error)
                for one, _ in batching.step():
                    if one.draft.finish_reason:
                        reply = None if one.error else one.draft.reply
                        yield Finished(running.pop(one), reply, one.error, batching.stretch(one))
        finally:
            for one in running:
                batching.cancel(one)

    def score(self, prompt: str | Sequence[Message], continuation: str, *, raw: bool = False) -> Score:
        """How probable it is that a reply to the prompt begins with `continuation`; with `raw`, a completion of it.

        The probabilities are those at temperature 1 without truncation, of tokens where all members share one
        vocabulary, else of words: `scoring` has the definition. The first call makes a second context for each member.
        Raises InputError for a text that is empty, too long, or one that a member cannot write.
        """
        passage = self.passage(prompt, continuation, raw=raw)
        units = self.unit_scores(passage)
        weights = np.array([member.weight for member in self.config.members])
        mixture = mixed(units.log_probabilities, unit_weights(self.engine.router, passage, units, weights))
        return Score(float(mixture.sum()), tuple(units.log_probabilities.sum(axis=1).tolist()), units.size)

    def passage(self, prompt: str | Sequence[Message], continuation: str, *, raw: bool = False) -> Passage:
        """The continuation behind the prompt, to be scored. Raises InputError when either is empty, or no text."""
        text = Message("assistant", continuation).content.encode()
        if not text:
            raise InputError("the continuation is empty: there is nothing to score")
        if raw:
            head, prompts, _ = self.prompter.raw_prompts(prompt, self.config)
            return Passage(prompts, head + text, len(head), typed=len(head))
        messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        check_conversation(messages)
        head, prompts, _ = self.prompter.prompts(messages, self.config)
        return Passage(prompts, head + text, len(head), typed=None)

    def unit_scores(self, passage: Passage) -> UnitScores:
        """What each member finds of each unit of the passage; raises what `Scorer.units` raises."""
        with self.engine.turns.use(), self.engine.steps.use():
            return self.scorers.of(range(len(self.members))).units(passage)

    def start(
        self,
        config: Config,
        prompts: Prompts,
        *,
        alone: bool = False,
        top: int = 0,
        prefill: bool = False,
        cancelled: threading.Event | None = None,
        shown: bytes = b"",
    ) -> ReplyStream:
        """A reply after these prompts, which have `shown` in them; the rest as in `Request`."""
        cancelled = cancelled or threading.Event()
        kinds = self.prompter.kinds if prefill else ()
        request = make_request(config, prompts, kinds, alone=alone, top=top, prefill=prefill)
        source = guesses(self.members, config, shown)
        generation = Generation(self.engine, request, cancelled.is_set, source=source, most=config.max_tokens)
        return ReplyStream(self._draft(config, request, generation), cancelled)

    def _draft(self, config: Config, request: Request, generation: Generation) -> Draft:
        document = request.head and not request.prefill
        stop = config.stop if document else config.stop + self.prompter.stops(config)
        kinds = self.prompter.kinds if request.prefill else ()
        return Draft(generation, request, names=self.names, max_tokens=config.max_tokens, stop=stop, kinds=kinds)

    def close(self) -> None:
        """Free all members; what is asked of the ensemble then raises RunError."""
        for member in self.members:
            if not member.local:  # may be away, and a step that waits for it is not waited for
                member.close()
        self.engine.steps.end(self._stack.close)

    def __enter__(self) -> "Ensemble":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    path: str | Path = "models.toml",
    overrides: Overrides | None = None,
    *,
    batch: int = 1,
    check: bool | None = None,
) -> Ensemble:
    """The ensemble of a models.toml, loaded for `batch` replies at once; `check` as in `Ensemble`.

    Raises ConfigError and LoadError.
    """
    return Ensemble(override(load_config(Path(path)), overrides or Overrides()), batch=batch, check=check)
