"""The queue: requests get a place in the order in which they came, as many at once as there are places.

The event loop keeps the queue. The members belong to a thread, which does one thing after the other: begin a reply, go
on with all that are running by a step, end one. What it makes goes to the event loop step by step; whoever stops
listening there ends the reply before its next piece, and no other. Knows nothing of HTTP.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TypeAlias

from me_local.asking import Ask
from me_local.decoding.reply import Reply, Step
from me_local.echoes import Echo, echo
from me_local.ensemble import Ensemble
from me_local.errors import MeLocalError
from me_local.llama.states import States
from me_local.server.making import Event, Job, Making, OneByOne, Together, Written
from me_local.server.metrics import Metrics
from me_local.server.refusals import ApiError, api_error, shutting_down

_LONGEST_RETRY = 60  # seconds

Events: TypeAlias = "asyncio.Queue[tuple[int, Event | Exception]]"


class Worker:
    """A queue of at most `queue` replies in front of an ensemble.

    `cache` is the room for states, in bytes; they are kept where one reply is made at a time. `replied` is called after
    each reply, in the thread that makes them.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        metrics: Metrics,
        *,
        queue: int,
        cache: int,
        replied: Callable[[], None] = lambda: None,
    ) -> None:
        self.ensemble = ensemble
        self._metrics = metrics
        self._queue = queue
        self._replied = replied
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replies")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, int] = {}  # in their places
        self._draining = False
        self._going = False  # the thread has a step before it
        self._made, self._seconds = 0, 0.0
        self.states = States(cache)
        self._making: Making = Together(ensemble) if ensemble.batch > 1 else OneByOne(ensemble, self.states)

    @property
    def waiting(self) -> int:
        """How many replies wait for their turn."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many replies are being made."""
        return len(self._running)

    @property
    def places(self) -> list[int | None]:
        """How many pieces the reply in each place has so far; None where there is no reply."""
        taken = {place: job.steps for job, place in self._running.items()}
        return [taken.get(place) for place in range(self._making.places)]

    async def replies(self, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Event], None]:
        """The steps of the replies to one request while they are made, and each reply at its end, with their indices.

        As many as there are places are asked for at a time. To close the generator ends them. Raises ApiError.
        """
        self._require_room()
        self._loop = asyncio.get_running_loop()
        events: Events = asyncio.Queue()
        following = enumerate(asks)
        jobs: dict[int, Job] = {}

        def ask_for(count: int) -> None:
            for index, ask in islice(following, count):
                jobs[index] = Job(ask, partial(_put, events, index), admitted=index > 0)
                self._enter(jobs[index])

        try:
            ask_for(self._making.places)
            while jobs:
                index, event = await events.get()
                if isinstance(event, Exception):
                    raise api_error(event) if isinstance(event, MeLocalError) else event
                if isinstance(event, Reply):
                    del jobs[index]
                    ask_for(1)
                yield index, event
        finally:
            for job in jobs.values():
                self._leave(job)

    def drain(self) -> None:
        """Begin no more replies, but for requests that had their turn."""
        self._draining = True
        for job in [job for job in self._waiting if not job.admitted]:
            self._waiting.remove(job)
            job.hear(shutting_down())

    def cancel(self) -> None:
        """End the replies that are being made, and do not wait for their pieces."""
        for job in [*self._waiting, *self._running]:
            self._leave(job)
            job.hear(shutting_down())

    def close(self) -> None:
        """End what is being made, and the thread."""
        self.drain()
        self.cancel()
        self._thread.submit(int).result()  # by then all that were cancelled have left their places
        self._thread.shutdown()

    def _require_room(self) -> None:
        """Raise ApiError where nothing new can be asked for."""
        if self._draining:
            raise shutting_down()
        if len(self._running) >= self._making.places and len(self._waiting) >= self._queue:
            message = f"{len(self._waiting)} replies are waiting already"
            raise ApiError(429, message, code="queue_full", retry=self._retry())

    def _retry(self) -> int:
        """Seconds until half of those that wait should have been served."""
        mean = self._seconds / self._made if self._made else 1.0
        return max(1, min(_LONGEST_RETRY, math.ceil(mean * len(self._waiting) / 2 / self._making.places)))

    # In the event loop.

    def _enter(self, job: Job) -> None:
        self._waiting.append(job)
        self._fill()

    def _fill(self) -> None:
        """Let those that came first begin."""
        while self._waiting and len(self._running) < self._making.places:
            job = self._waiting.popleft()
            self._metrics.waited.observe(time.monotonic() - job.came)
            self._running[job] = min(set(range(self._making.places)) - set(self._running.values()))
            self._thread.submit(self._begin, job)

    def _leave(self, job: Job) -> None:
        """Nobody listens to this one any more."""
        if job in self._waiting:
            self._waiting.remove(job)
        elif job in self._running:
            del self._running[job]
            job.stopped.set()
            self._thread.submit(self._cancel, job)  # which comes before whatever takes its place
            self._fill()

    def _hear(self, events: Iterable[tuple[Job, Event | Exception]]) -> None:
        for job, event in events:
            if job in self._running:
                job.steps += isinstance(event, Step)
                if not isinstance(event, Echo | Step):
                    del self._running[job]
                job.hear(event)
        self._fill()

    # In the thread.

    def _begin(self, job: Job) -> None:
        try:
            if job.ask.echo:
                self._tell([(job, echo(self.ensemble, job.ask, job.stopped.is_set))])
            self._making.begin(job)
        except Exception as error:
            self._tell([(job, error)])
        self._go_on_if_busy()

    def _go_on(self) -> None:
        self._going = False
        self._report(self._making.step())
        self._go_on_if_busy()

    def _go_on_if_busy(self) -> None:
        # Behind what has come meanwhile.
        if self._making.busy and not self._going:
            self._going = True
            self._thread.submit(self._go_on)

    def _cancel(self, job: Job) -> None:
        self._report(self._making.cancel(job))

    def _report(self, written: Iterable[Written]) -> None:
        events: list[tuple[Job, Event | Exception]] = []
        for one in written:
            events += [(one.job, step) for step in one.steps]
            if one.reply:
                events.append((one.job, self._end(one.reply, one.error)))
        self._tell(events)

    def _end(self, reply: Reply, error: Exception | None) -> Event | Exception:
        """Count a reply; what its listener hears at last."""
        try:
            self._metrics.count(reply)
            self._replied()
        except Exception as failure:
            return failure
        self._made, self._seconds = self._made + 1, self._seconds + reply.seconds
        return error or reply

    def _tell(self, events: list[tuple[Job, Event | Exception]]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # once the loop is closed nobody listens
            self._loop.call_soon_threadsafe(self._hear, events)


def _put(events: Events, index: int, event: Event | Exception) -> None:
    events.put_nowait((index, event))
