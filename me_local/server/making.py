"""How the server makes replies, a step at a time: one by one, or several at once.

Both are used in one thread, to which the members belong. Neither knows of queues, or of who listens.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from me_local.asking import Ask, Tokens
from me_local.config import Overrides, override
from me_local.decoding.batching import Running
from me_local.decoding.reply import Reply, ReplyStream, Step
from me_local.echoes import Echo
from me_local.ensemble import Ensemble
from me_local.llama.states import States

Event = Echo | Step | Reply


@dataclass(slots=True, eq=False)
class Job:
    """One reply to be made.

    `hear` takes what happens to it, in the event loop: an echo of its prompt where that is asked for, its steps, of
    which there were `steps` so far, and at the end the reply or an exception. One that is `admitted` belongs to a
    request that had its turn, and always finds room in the queue. `stopped` may be set from any thread: it ends at once
    what would take long.
    """

    ask: Ask
    hear: Callable[[Event | Exception], None]
    admitted: bool
    steps: int = 0
    came: float = field(default_factory=time.monotonic)
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def raw(self) -> bool:
        """Whether it is the completion of a text."""
        return isinstance(self.ask.prompt, str | Tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """New steps of a reply; `reply` is there once it has ended, by an `error` if there is one."""

    job: Job
    steps: list[Step]
    reply: Reply | None = None
    error: Exception | None = None


class Making(Protocol):
    """Makes at most `places` replies at once."""

    places: int

    @property
    def busy(self) -> bool:
        """Whether any reply is being made."""

    def begin(self, job: Job) -> None:
        """Give a reply its place. Raises what `Ensemble.stream` raises, and RunError."""

    def step(self) -> list[Written]:
        """Go on with what is being made. Raises nothing."""

    def cancel(self, job: Job) -> list[Written]:
        """End a reply; one that is over already stays as it is."""


class OneByOne:
    """One reply at a time, with the members' states of earlier prompts in `states`."""

    places = 1

    def __init__(self, ensemble: Ensemble, states: States) -> None:
        self._ensemble = ensemble
        self._running: tuple[Job, ReplyStream] | None = None
        for member in ensemble.members:
            member.keep_states(states)

    @property
    def busy(self) -> bool:
        """Whether any reply is being made."""
        return self._running is not None

    def begin(self, job: Job) -> None:
        """Give a reply its place. Raises what `Ensemble.stream` raises."""
        ask = job.ask
        # A seed asks for a reply that can be had again, and that must not depend on what is in the cache.
        alone = ask.overrides.seed is not None
        stream = self._ensemble.stream(
            ask.prompt, ask.overrides, raw=job.raw, alone=alone, top=ask.top, cancelled=job.stopped
        )
        self._running = job, stream

    def step(self) -> list[Written]:
        """Go on with the reply by a piece."""
        if self._running is None:
            return []
        job, stream = self._running
        try:
            return [Written(job, [next(stream)])]
        except StopIteration:
            error = None
        except Exception as failure:
            error = failure
        self._running = None
        return [Written(job, [], stream.reply, error)]

    def cancel(self, job: Job) -> list[Written]:
        """End a reply; one that is over already stays as it is."""
        written: list[Written] = []
        job.stopped.set()
        while self._running and self._running[0] is job:
            written += self.step()
        return written


class Together:
    """As many replies at once as the ensemble has places, each by a route of its own, so that its seed makes it."""

    def __init__(self, ensemble: Ensemble) -> None:
        self.places = ensemble.batch
        self._ensemble = ensemble
        self._config = override(ensemble.config, Overrides(route="own"))
        self._batching = ensemble.batching(self._config)
        self._jobs: dict[Running, Job] = {}

    @property
    def busy(self) -> bool:
        """Whether any reply is being made."""
        return bool(self._jobs)

    def begin(self, job: Job) -> None:
        """Give a reply its place. Raises what `Ensemble.begin` raises."""
        stopped = job.stopped.is_set
        running = self._ensemble.begin(self._batching, self._config, job.ask, raw=job.raw, interrupted=stopped)
        self._jobs[running] = job

    def step(self) -> list[Written]:
        """Go on with all replies by one evaluation."""
        try:
            written = self._batching.step()
        except Exception as error:
            return self._fail_all(error)
        return [self._written(running, steps) for running, steps in written]

    def cancel(self, job: Job) -> list[Written]:
        """End a reply; one that is over already stays as it is."""
        found = [running for running, other in self._jobs.items() if other is job]
        for running in found:
            self._batching.cancel(running)
        return [self._written(running, []) for running in found]

    def _written(self, running: Running, steps: list[Step]) -> Written:
        if running.draft.finish_reason is None:
            return Written(self._jobs[running], steps)
        return Written(self._jobs.pop(running), steps, running.draft.reply, running.error)

    def _fail_all(self, error: Exception) -> list[Written]:
        """After an error that belongs to no reply: end all, and begin anew with empty caches."""
        failed = [Written(job, [], running.draft.reply, error) for running, job in self._jobs.items()]
        self._jobs.clear()
        self._batching = self._ensemble.batching(self._config)
        return failed
