"""The ensemble at hand: loaded, unloaded after so long without a request, and replaced by another one.

What is asked of an ensemble is asked within `Held.used`, and one that is used is never freed: whatever came before a
change ends with the ensemble that it began with. Everything is done in the event loop, but for loading and freeing,
which take long and have threads, one after the other. Knows nothing of HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from me_local.asking import Ask
from me_local.config import Config
from me_local.ensemble import Ensemble
from me_local.errors import MeLocalError
from me_local.server.fingerprint import fingerprint
from me_local.server.making import Event
from me_local.server.metrics import Metrics
from me_local.server.refusals import shutting_down, unexpected
from me_local.server.worker import Worker
from me_local.system.machine import return_memory

Loaded: TypeAlias = tuple[Ensemble, Callable[[], None]]
"""An ensemble, and what is to be called after each of its replies, in the thread that makes them."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where ensembles come from.

    `read` gives the configuration as its file has it now, and `load` loads one; both are called in threads and raise
    MeLocalError. `tell` takes lines for whoever runs the server.
    """

    read: Callable[[], Config]
    load: Callable[[Config], Loaded]
    tell: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """Replies that may wait; bytes of kept states; seconds for a request, and for running ones at the end.

    `keep_alive` is how many seconds a connection stays open without a request; proxies often keep theirs for 60. After
    `idle` seconds without a request models are unloaded, where that is given.
    """

    queue: int = 64
    cache: int = 512 * 2**20
    timeout: float = 600.0
    grace: float = 30.0
    keep_alive: int = 75
    idle: float | None = None


@dataclass(frozen=True, slots=True)
class About:
    """What is told of an ensemble, whether it is loaded or not; `contexts` are its members', in tokens."""

    config: Config
    contexts: tuple[int, ...]
    places: int
    fingerprint: str

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(member.name for member in self.config.members)


@dataclass(slots=True, eq=False)
class Held:
    """An ensemble that is loaded, its queue, and by how many it is used; `since` then is when the last of them left."""

    worker: Worker
    about: About
    left: Callable[["Held"], None]
    since: float = 0.0
    users: int = 0

    @property
    def ensemble(self) -> Ensemble:
        """The ensemble."""
        return self.worker.ensemble

    @contextmanager
    def used(self) -> Iterator["Held"]:
        """While inside, it is not freed."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1
            if not self.users:
                self.left(self)

    async def replies(self, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Event], None]:
        """The same as `Worker.replies`; until it is closed, the ensemble is used."""
        with self.used():
            made = self.worker.replies(asks)
            try:
                async for event in made:
                    yield event
            finally:
                await made.aclose()


class Keeper:
    """Keeps an ensemble at hand, `first` and then what `source` gives, and closes whatever it had."""

    def __init__(self, first: Loaded, source: Source, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        self.metrics = Metrics()
        self._open: list[Ensemble] = [first[0]]
        self._all: set[Held] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changing = asyncio.Lock()
        self.held: Held | None = self._hold(first)
        self.about = self.held.about
        self._show()

    def begin(self) -> None:
        """Take requests, in the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._drained: asyncio.Future[None] = self._loop.create_future()
        if self.held:
            self._left(self.held)

    @property
    def draining(self) -> bool:
        """Whether nothing more is begun."""
        return self._drained.done()

    @property
    def state(self) -> Literal["loaded", "loading", "unloaded"]:
        """How it is with the models."""
        return "loaded" if self.held else "loading" if self._loading else "unloaded"

    @property
    def places(self) -> list[int | None]:
        """How many pieces the reply in each place has so far; None where there is no reply."""
        return self.held.worker.places if self.held else [None] * self.about.places

    async def loaded(self) -> None:
        """Wait until there was an ensemble. Raises MeLocalError where it cannot be loaded, and ApiError at the end."""
        if self.draining:
            raise shutting_down()
        loading = self._loading = self._loading or self._task(self._load())
        await asyncio.wait({loading, self._drained}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            raise shutting_down()
        loading.result()

    async def reload(self) -> None:
        """Load what the source has now, and take it for all that is asked from then on.

        Whatever is wrong with it is told to whoever runs the server, and raised; all stays as it was then.
        """
        await asyncio.shield(self._task(self._replace()))

    def reload_soon(self) -> None:
        """The same, for a signal: nobody waits for it."""
        self._task(self._replace())

    def drain(self) -> None:
        """Begin nothing more, but for requests that had their turn."""
        if not self.draining:
            self._drained.set_result(None)
        for held in self._all:
            held.worker.drain()

    def cancel(self) -> None:
        """End the replies that are being made."""
        for held in self._all:
            held.worker.cancel()

    def close(self) -> None:
        """End what is being made, and free all there is; once the event loop has ended, or before it runs."""
        for held in self._all:
            held.worker.close()
        while self._open:
            self._open.pop().close()

    # In the event loop.

    def _hold(self, loaded: Loaded) -> Held:
        ensemble, replied = loaded
        limits = self._limits
        worker = Worker(ensemble, self.metrics, queue=limits.queue, cache=limits.cache, replied=replied)
        contexts = tuple(member.n_ctx for member in ensemble.members)
        about = About(ensemble.config, contexts, ensemble.batch, fingerprint(ensemble))
        held = Held(worker, about, self._left)
        self._all.add(held)
        return held

    def _take(self, loaded: Loaded) -> None:
        self.held = self._hold(loaded)
        self.about = self.held.about
        if self.draining:
            self.held.worker.drain()
        self._left(self.held)

    def _left(self, held: Held) -> None:
        """Nobody uses this one now."""
        held.since = self._loop.time()
        if self.draining:  # what there is is closed at the end
            return
        if held is not self.held:
            self._task(self._free(held))
        elif self._limits.idle is not None:
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_later(self._limits.idle, lambda: self._task(self._unload(held)))

    async def _load(self) -> None:
        try:
            async with self._changing:
                if self.held is None:
                    self._take(await asyncio.to_thread(self._make, self.about.config))
                    self._source.tell(f"loaded again: {' + '.join(self.about.names)}")
        finally:
            self._loading = None

    async def _unload(self, held: Held) -> None:
        async with self._changing:
            idle = self._limits.idle or 0.0
            if held is self.held and not held.users and self._loop.time() - held.since >= idle:
                self.held = self._timer = None
                await self._free(held)
                self._source.tell(f"unloaded after {idle:g} s without a request; the next one loads the models again")

    async def _replace(self) -> None:
        async with self._changing:
            try:
                loaded = await asyncio.to_thread(lambda: self._make(self._source.read()))
            except Exception as error:
                reason = str(error) if isinstance(error, MeLocalError) else unexpected(error).message
                self._source.tell(f"not reloaded, the models stay as they were: {reason}")
                raise
            before = self.held
            self._take(loaded)
            self._source.tell(f"reloaded: serving {' + '.join(self.about.names)}")
            if before and not before.users:
                await self._free(before)

    async def _free(self, held: Held) -> None:
        if held in self._all:
            self._all.remove(held)
            await asyncio.to_thread(self._close, held.worker)
            # Once whoever is at work here has let go of it.
            self._loop.call_soon(lambda: self._loop.run_in_executor(None, return_memory))

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something that goes on whoever waits for it, or nobody; what fails is told elsewhere, too."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if not task.cancelled():
            task.exception()  # so that it is not complained of

    def _show(self) -> None:
        def total(of: Callable[[Worker], int]) -> float:
            return float(sum(of(held.worker) for held in tuple(self._all)))

        gauge = self.metrics.gauge
        gauge("queue_length", "Replies that wait for their turn", partial(total, lambda worker: worker.waiting))
        gauge("running", "Replies that are being made", partial(total, lambda worker: worker.running))
        gauge("cache_bytes", "Kept states of members", partial(total, lambda worker: worker.states.size))
        gauge("cache_states", "Kept states of members", partial(total, lambda worker: len(worker.states)))
        gauge("loaded", "Ensembles in memory: 0 while unloaded, 2 while one follows the other", lambda: len(self._open))

    # In a thread of their own, one at a time.

    def _make(self, config: Config) -> Loaded:
        loaded = self._source.load(config)
        self._open.append(loaded[0])  # so that it is closed whatever becomes of whoever waited for it
        return loaded

    def _close(self, worker: Worker) -> None:
        worker.close()
        worker.ensemble.close()
        self._open.remove(worker.ensemble)
