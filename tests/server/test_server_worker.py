"""The server's queue around replies that a script makes: who begins when, who hears what, and who no more."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from me_local.asking import Ask
from me_local.decoding.reply import Reply, Step
from me_local.errors import InputError, RunError
from me_local.server.making import Job, Written
from me_local.server.metrics import Metrics
from me_local.server.refusals import ApiError
from me_local.server.worker import Worker

SECONDS = 5
PIECES = 2


class Told(threading.Event):
    """An event that tells when it is set."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell

    def set(self) -> None:
        super().set()
        self._tell()


class Script:
    """Makes replies of `PIECES` pieces, by as many steps as are `let`; `log` tells what it was asked for.

    A reply to "refused" is not begun, and one to "broken" fails at its first step.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.log: list[str] = []
        self.gate = threading.Semaphore(0)
        self._jobs: dict[Job, int] = {}

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def let(self, steps: int) -> None:
        self.gate.release(steps)

    def begin(self, job: Job) -> None:
        self.log.append(f"begin {job.ask.prompt}")
        if job.ask.prompt == "refused":
            raise InputError("no such thing")
        job.stopped = Told(lambda: self.log.append(f"stop {job.ask.prompt}"))
        self._jobs[job] = 0

    def step(self) -> list[Written]:
        if not self._jobs:
            return []
        assert self.gate.acquire(timeout=SECONDS)
        self.log.append("step")
        return [self._go_on(job) for job in list(self._jobs)]

    def cancel(self, job: Job) -> list[Written]:
        self.log.append(f"cancel {job.ask.prompt}")
        return [Written(job, [], reply("cancelled"))] if self._jobs.pop(job, None) is not None else []

    def _go_on(self, job: Job) -> Written:
        if job.ask.prompt == "broken":
            del self._jobs[job]
            return Written(job, [], reply("error"), RunError("broken"))
        self._jobs[job] += 1
        steps = [Step(b"x", "x", "a", 1.0, (1.0,))]
        if self._jobs[job] < PIECES:
            return Written(job, steps)
        del self._jobs[job]
        return Written(job, steps, reply("stop"))


def reply(reason: Any) -> Reply:
    return Reply("xx", reason, "me", "token", 1, (), (), seconds=30.0)


class Queue:
    """A worker with its script, in a running event loop; `ask` begins to read replies and gives what comes."""

    def __init__(self, places: int, queue: int) -> None:
        self.metrics, self.script = Metrics(), Script(places)
        self.worker = Worker(SimpleNamespace(batch=1, members=()), self.metrics, queue=queue, cache=0)  # type: ignore[arg-type]
        self.worker._making = self.script

    def ask(self, *prompts: str) -> "Asked":
        return Asked(self.worker.replies([Ask(prompt) for prompt in prompts]))

    def metric(self, name: str) -> float:
        if name in ("queue_length", "running"):
            return self.worker.waiting if name == "queue_length" else self.worker.running
        lines = [line.split() for line in self.metrics.text().decode().splitlines()]
        return sum(float(line[1]) for line in lines if line[0].partition("{")[0] == f"me_local_{name}")

    async def until(self, true: Callable[[], bool]) -> None:
        async def waiting() -> None:
            while not true():
                await asyncio.sleep(0)

        await asyncio.wait_for(waiting(), SECONDS)


class Asked:
    """One request: `heard` has what came, "x" for a piece, the finish reason for a reply, or the error."""

    def __init__(self, events: AsyncGenerator[tuple[int, Any], None]) -> None:
        self.heard: list[tuple[int, object]] = []
        self.error: BaseException | None = None
        self.task = asyncio.create_task(self._read(events))

    async def _read(self, events: AsyncGenerator[tuple[int, Any], None]) -> None:
        try:
            async for index, event in events:
                self.heard.append((index, event.finish_reason if isinstance(event, Reply) else event.text))
        except ApiError as error:
            self.error = error
        finally:
            await events.aclose()

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task], timeout=SECONDS)

    async def end(self) -> list[tuple[int, object]]:
        await asyncio.wait_for(self.task, SECONDS)
        return self.heard

    async def refusal(self) -> tuple[int, str]:
        await asyncio.wait_for(self.task, SECONDS)
        assert isinstance(self.error, ApiError)
        return self.error.status, self.error.message


ONE = [(0, "x"), (0, "x"), (0, "stop")]


@pytest.fixture
def run() -> Callable[..., None]:
    """Runs a test in an event loop, with a queue that is closed behind it."""

    def running(test: Callable[[Queue], Awaitable[None]], places: int = 1, queue: int = 10) -> None:
        async def main() -> None:
            made = Queue(places, queue)
            try:
                await test(made)
            finally:
                made.script.let(1000)
                await asyncio.wait_for(asyncio.to_thread(made.worker.close), SECONDS)

        asyncio.run(main())

    return running


def test_replies_are_made_in_the_order_in_which_they_were_asked_for(run: Callable[..., None]) -> None:
    async def test(queue: Queue) -> None:
        asked = []
        for i, prompt in enumerate("abc"):
            asked.append(queue.ask(prompt))
            await queue.until(lambda i=i: queue.metric("queue_length") + queue.metric("running") == i + 1)
        assert (queue.metric("running"), queue.metric("queue_length")) == (1, 2)
        queue.script.let(100)
        assert [await one.end() for one in asked] == [ONE] * 3
        steps = ["step"] * PIECES
        assert queue.script.log == ["begin a", *steps, "begin b", *steps, "begin c", *steps]
        assert (queue.metric("running"), queue.metric("wait_seconds_count")) == (0, 3)
        assert queue.metric("replies_total") == 3

    run(test)


def test_as_many_at_once_as_there_are_places_and_a_step_is_of_all(run: Callable[..., None]) -> None:
    async def test(queue: Queue) -> None:
        both = threading.Event()
        queue.worker._thread.submit(both.wait, SECONDS)
        asked = queue.ask("a", "b", "c")
        await queue.until(lambda: queue.metric("running") == 2)
        both.set()
        assert (queue.metric("running"), queue.metric("queue_length")) == (2, 0)  # the third is not asked for yet
        queue.script.let(PIECES)
        await queue.until(lambda: "begin c" in queue.script.log)
        queue.script.let(PIECES)
        heard = await asked.end()
        assert [[event for index, event in heard if index == i] for i in range(3)] == [["x", "x", "stop"]] * 3
        assert queue.script.log == ["begin a", "begin b", "step", "step", "begin c", "step", "step"]

    run(test, places=2)


def test_a_full_queue_says_when_half_of_it_will_have_been_served(run: Callable[..., None]) -> None:
    async def test(queue: Queue) -> None:
        waiting = [queue.ask(prompt) for prompt in "abc"]
        await queue.until(lambda: queue.metric("queue_length") == 2)
        refused = queue.ask("d")
        assert await refused.refusal() == (429, "2 replies are waiting already")
        assert refused.error.headers["Retry-After"] == "1"  # type: ignore[union-attr]
        queue.script.let(PIECES)
        await waiting[0].end()  # took 30 s, so it says
        waiting.append(queue.ask("e"))
        await queue.until(lambda: queue.metric("queue_length") == 2)
        refused = queue.ask("f")
        await refused.refusal()
        assert refused.error.headers["Retry-After"] == "30"  # type: ignore[union-attr]
        queue.script.let(100)
        assert [await one.end() for one in waiting] == [ONE] * 4

    run(test, queue=2)


def test_one_that_leaves_is_stopped_and_its_place_is_free_before_the_next_begins(run: Callable[..., None]) -> None:
    async def test(queue: Queue) -> None:
        leaving, staying = queue.ask("a"), queue.ask("b")
        await queue.until(lambda: queue.metric("queue_length") == 1)
        queue.script.let(1)
        await queue.until(lambda: len(leaving.heard) == 1)
        await leaving.leave()
        assert "stop a" in queue.script.log
        assert queue.metric("running") == 1
        queue.script.let(100)
        assert await staying.end() == ONE
        log = [entry for entry in queue.script.log if entry != "step"]
        assert log == ["begin a", "stop a", "cancel a", "begin b"]
        assert leaving.heard == [(0, "x")]

    run(test)


def test_one_that_leaves_the_queue_is_never_begun(run: Callable[..., None]) -> None:
    async def test(queue: Queue) -> None:
        staying, leaving = queue.ask("a"), queue.ask("b")
        await queue.until(lambda: queue.metric("queue_length") == 1)
        await leaving.leave()
        assert queue.metric("queue_length") == 0
        queue.script.let(100)
        assert await staying.end() == ONE
        assert queue.script.log == ["begin a", "step", "step"]

    run(test)


@pytest.mark.parametrize(("prompt", "refusal"), [("refused", (400, "no such thing")), ("broken", (500, "broken"))])
def test_an_error_is_heard_and_its_place_is_free_again(
    run: Callable[..., None], prompt: str, refusal: tuple[int, str]
) -> None:
    async def test(queue: Queue) -> None:
        failing, staying = queue.ask(prompt), queue.ask("b")
        queue.script.let(100)
        assert await failing.refusal() == refusal
        assert await staying.end() == ONE
        assert queue.metric("running") == 0

    run(test)


def test_the_end_lets_those_go_on_that_had_their_turn(run: Callable[..., None]) -> None:
    async def test(queue: Queue) -> None:
        running, waiting = queue.ask("a", "b"), queue.ask("c")
        await queue.until(lambda: queue.metric("queue_length") == 1)
        queue.worker.drain()
        assert await waiting.refusal() == (503, "the server is shutting down")
        assert await queue.ask("d").refusal() == (503, "the server is shutting down")
        queue.script.let(100)
        assert await running.end() == [*ONE, *((1, event) for _, event in ONE)]
        assert [entry for entry in queue.script.log if entry != "step"] == ["begin a", "begin b"]

    run(test)


def test_the_end_of_the_grace_time_is_heard_by_all(run: Callable[..., None]) -> None:
    async def test(queue: Queue) -> None:
        asked = [queue.ask("a"), queue.ask("b")]
        await queue.until(lambda: queue.metric("queue_length") == 1)
        queue.worker.cancel()
        assert [await one.refusal() for one in asked] == [(503, "the server is shutting down")] * 2
        assert (queue.metric("running"), queue.metric("queue_length")) == (0, 0)
        queue.script.let(100)
        await queue.until(lambda: "cancel a" in queue.script.log)
        assert [entry for entry in queue.script.log if entry != "step"] == ["begin a", "stop a", "cancel a"]

    run(test)


def test_closed_it_has_let_go_of_everything_and_begins_nothing(run: Callable[..., None]) -> None:
    async def test(queue: Queue) -> None:
        asked = queue.ask("a")
        await queue.until(lambda: queue.script.log == ["begin a"])
        closing = asyncio.create_task(asyncio.to_thread(queue.worker.close))
        await queue.until(lambda: "stop a" in queue.script.log)
        queue.script.let(1000)  # the step that is under way, too
        await asyncio.wait_for(closing, SECONDS)
        assert await asked.refusal() == (503, "the server is shutting down")
        assert [entry for entry in queue.script.log if entry != "step"] == ["begin a", "stop a", "cancel a"]
        assert await queue.ask("b").refusal() == (503, "the server is shutting down")
        with pytest.raises(RuntimeError, match="after shutdown"):
            queue.worker._thread.submit(int)
        queue.worker.close = lambda: None  # type: ignore[method-assign]

    run(test)


def test_a_failure_while_counting_is_heard(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(queue: Queue) -> None:
        def failing(_: Reply) -> None:
            raise RunError("cannot count")

        monkeypatch.setattr(queue.metrics, "count", failing)
        asked = queue.ask("a")
        queue.script.let(100)
        assert await asked.refusal() == (500, "cannot count")

    run(test)
