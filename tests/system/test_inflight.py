"""What llama.cpp works on is not freed meanwhile: by no thread, by no Ctrl-C, and not in a process that was forked off.

Threads wait for each other for ten seconds at most, so that a test fails where it would hang.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import llama_cpp
import numpy as np
import pytest

from me_local import Ensemble, Overrides, RunError, load
from me_local.config import MemberConfig
from me_local.decoding.schedule import Schedule
from me_local.llama.member import Member
from me_local.llama.weights import Weights
from me_local.system.inflight import InFlight, uninterrupted

WriteModels = Callable[..., Path]
OpenEnsemble = Callable[..., Ensemble]
SECONDS = 10
IDS = np.arange(5, 25, dtype=np.int32)
LONG = Overrides(seed=1, max_tokens=30)


class Held:
    """Something in which a thread stays until it is let go; `events` tell what happened, in order."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.begun, self.free = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.events.append("begins")
        self.begun.set()
        assert self.free.wait(SECONDS)
        self.events.append("ends")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What llama.cpp frees, in order."""
    listed: list[str] = []
    for name in ("llama_free", "llama_model_free"):
        free = getattr(llama_cpp, name)

        def noted(pointer: object, name: str = name, free: Callable[[object], None] = free) -> None:
            listed.append(name)
            free(pointer)

        monkeypatch.setattr(llama_cpp, name, noted)
    return listed


def holding(member: Member, held: Held, patch: pytest.MonkeyPatch) -> None:
    """The member's evaluations stay in `held`."""
    decode = member._decode

    def staying(*parts: object) -> int:
        held()
        return decode(*parts)  # type: ignore[arg-type]

    patch.setattr(member, "_decode", staying)


@contextmanager
def interrupting(times: int, begin: threading.Event, end: threading.Event) -> Iterator[None]:
    """From `begin` on, Ctrl-C comes so often, each once the one before was raised in the main thread; then `end`."""
    raised = threading.Semaphore(0)

    def interrupt(*_: object) -> None:
        raised.release()
        raise KeyboardInterrupt

    def send() -> None:
        assert begin.wait(SECONDS)
        for _ in range(times):
            for _ in range(100 * SECONDS):
                os.kill(os.getpid(), signal.SIGINT)
                if raised.acquire(timeout=0.01):  # one that comes just before the main thread sleeps does not wake it
                    break
            else:
                pytest.fail("Ctrl-C is not heard")
        end.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with ThreadPoolExecutor(1) as thread:
            sent = thread.submit(send)
            yield
            sent.result(SECONDS)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("closed", ["member", "weights"])
def test_to_close_waits_for_an_evaluation(
    tiny: dict[str, Path], events: list[str], monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    weights = Weights(config := MemberConfig(name="a", path=tiny["bpe_a"], n_ctx=64, n_threads=1))
    member, held = Member(config, weights), Held(events)
    holding(member, held, monkeypatch)
    with ThreadPoolExecutor(2) as threads:
        evaluated = threads.submit(member.sync, IDS)
        assert held.begun.wait(SECONDS)
        closing = threads.submit(member.close if closed == "member" else weights.close)
        held.free.set()
        assert evaluated.result(SECONDS).tokens == len(IDS)
        closing.result(SECONDS)
    assert events[:3] == ["begins", "ends", "llama_free"]
    weights.close()
    member.close()
    assert events[3:] == ["llama_model_free"]


def test_ctrl_c_again_and_again_does_not_end_the_wait_for_an_evaluation(
    tiny: dict[str, Path], events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(config := MemberConfig(name="a", path=tiny["bpe_a"], n_ctx=64, n_threads=1))
    member, held = Member(config, weights), Held(events)
    holding(member, held, monkeypatch)
    closing = threading.Event()
    monkeypatch.setattr(member, "close", lambda *_: closing.set() or Member.close(member))
    with ThreadPoolExecutor(1) as threads:
        evaluated = threads.submit(member.sync, IDS)
        assert held.begun.wait(SECONDS)
        with interrupting(3, closing, held.free), pytest.raises(KeyboardInterrupt):
            weights.close()
        assert evaluated.result(SECONDS).tokens == len(IDS)
    assert events == ["begins", "ends", "llama_free", "llama_model_free"]


def test_ctrl_c_between_two_evaluations_of_a_step_waits_for_the_first(
    open_ensemble: OpenEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the second, which has not begun, is left out: the next reply is as ever."""
    ensemble, at_once = open_ensemble("bpe_a", "spm"), Overrides(strategy="ce", parallel=True, seed=1, max_tokens=30)
    expected = ensemble.generate("Hello", at_once)
    held, waiting, submitted = Held([]), threading.Event(), []
    schedule, submit = ensemble.engine.schedule, ThreadPoolExecutor.submit
    drop = schedule._drop

    def submitting(*args: object) -> object:
        submitted.append(submit(*args))  # type: ignore[arg-type]
        assert held.begun.wait(SECONDS)
        raise KeyboardInterrupt

    stream = ensemble.stream("Hello", at_once, alone=False)  # the prompts are there: the threads come first
    with interrupting(2, waiting, held.free):
        holding(ensemble.members[0], held, monkeypatch)
        monkeypatch.setattr(schedule, "_drop", lambda: waiting.set() or drop())
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submitting)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    monkeypatch.undo()
    assert (held.events, len(submitted)) == (["begins", "ends"], 1)
    assert ensemble.generate("Hello", at_once).steps == expected.steps


class Cores:
    divisible = True
    local = True

    def share_cores(self, parts: int) -> None:
        """Of no interest here."""


def test_an_interruption_at_any_line_of_a_step_leaves_nothing_behind() -> None:
    """Whatever comes after it finds nothing under way, and nothing that begins later."""
    lines = 1
    while _run_until(lines):
        lines += 1
    assert lines > 10


def _run_until(line: int) -> bool:
    """Interrupt a step at this line; false where it has fewer."""
    code = {Schedule._run.__code__, Schedule._settle.__code__, Schedule._drop.__code__, uninterrupted.__code__}
    schedule = Schedule([Cores(), Cores()])
    events: list[str] = []
    both = dict.fromkeys((0, 1), lambda: events.extend(("begins", "ends")))
    interrupted = _interrupted(lambda: schedule.run(both, parallel=True), code, line)
    schedule.divide(1)
    before = list(events)
    assert before.count("begins") == before.count("ends")
    if schedule._pool:
        schedule._pool.shutdown()
    assert events == before
    return interrupted


def _interrupted(work: Callable[[], object], code: set[object], at: int) -> bool:
    """Raise KeyboardInterrupt at the n-th line of these functions; false where they have fewer."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal lines
        if frame.f_code not in code:
            return None
        lines += event == "line"
        if lines == at:
            lines += 1
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_context_that_is_made_while_the_weights_are_closed(
    tiny: dict[str, Path], events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while an ensemble is loaded: a thread is in the middle of making a context, and is about to make more."""
    weights = Weights(config := MemberConfig(name="a", path=tiny["bpe_a"], n_ctx=64, n_threads=1))
    held, make = Held(events), llama_cpp.llama_init_from_model

    def making(*args: object) -> object:
        held()
        return make(*args)

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", making)
    with ThreadPoolExecutor(1) as maker, ThreadPoolExecutor(1) as closer:
        first, second = maker.submit(Member, config, weights), maker.submit(Member, config, weights)
        assert held.begun.wait(SECONDS)
        closing = closer.submit(weights.close)
        held.free.set()
        closing.result(SECONDS)
        assert events.count("begins") == events.count("ends") == events.count("llama_free") <= 2
        assert events[-1] == "llama_model_free"
        for made in (first, second):
            if made.exception(SECONDS) is None:
                with pytest.raises(RunError, match="the ensemble is closed"):
                    made.result().sync(IDS)


def test_a_closed_member_refuses_whatever_would_use_it(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    member, stream = ensemble.members[0], ensemble.stream("Hello", LONG)
    next(stream)
    ensemble.close()
    uses: list[Callable[[], object]] = [
        lambda: member.sync(IDS),
        lambda: member.prepare(IDS),
        lambda: member.share_cores(2),
        lambda: member.shorten(1, IDS),
        lambda: list(member.each_logits(IDS, 3)),
        lambda: Member(member.config, member.weights),
        lambda: member.vocabulary.encode(b"never seen before"),
        member.logits,
        member.forget,
        stream.finish,
        lambda: ensemble.generate("Hello"),
        lambda: ensemble.score("Hello", "there"),
    ]
    for use in uses:
        with pytest.raises(RunError, match="the ensemble is closed"):
            use()
    ensemble.close()


def test_threads_get_the_replies_that_they_get_one_by_one(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")

    def ask(i: int) -> object:
        if i % 5 == 4:
            return ensemble.score(f"Question {i % 10}", " the cat sat on the mat")
        return ensemble.generate(f"Question {i % 10}", Overrides(seed=i % 10, max_tokens=12)).steps

    expected = [ask(i) for i in range(10)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(40))) == 4 * expected


def test_a_stream_is_read_by_several_threads(open_ensemble: OpenEnsemble) -> None:
    """Each gets some of its pieces; with other replies in between, all streams come to their ends."""
    ensemble = open_ensemble("bpe_a", "spm")
    whole = ensemble.generate("Hello", LONG)
    stream = ensemble.stream("Hello", LONG)
    with ThreadPoolExecutor(4) as threads:
        for _ in threads.map(lambda _: [*stream], range(4)):
            pass
        assert stream.reply.steps == whole.steps
        streams = [ensemble.stream("Hello", LONG) for _ in range(4)]
        ends = {reply.finish_reason for reply in threads.map(lambda stream: stream.finish(), streams)}
    assert ends <= {"stop", "length"}


def test_many_replies_at_once_in_several_threads(write_models: WriteModels) -> None:
    with load(write_models("bpe_a", "spm"), batch=3) as ensemble, ThreadPoolExecutor(3) as threads:
        asked = [list(range(5))] * 3
        runs = threads.map(lambda prompts: list(ensemble.generate_many([f"Number {i}" for i in prompts], LONG)), asked)
        assert [sorted(one.index for one in run if one.reply) for run in runs] == asked


def test_an_ensemble_is_closed_between_two_steps(open_ensemble: OpenEnsemble, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while logits are read: they stand in memory that is freed with the context."""
    ensemble, held = open_ensemble("bpe_a", "spm"), Held([])
    align = ensemble.engine.alignment

    def staying(*args: object) -> object:
        held()
        return align(*args)  # type: ignore[arg-type]

    ensemble.engine.alignment = staying  # type: ignore[assignment]
    free = llama_cpp.llama_free
    monkeypatch.setattr(llama_cpp, "llama_free", lambda context: held.events.append("freed") or free(context))
    with ThreadPoolExecutor(2) as threads:
        reply = threads.submit(ensemble.generate, "Hello", LONG)
        assert held.begun.wait(SECONDS)
        closing = threads.submit(ensemble.close)
        end = time.monotonic() + SECONDS
        while not ensemble.engine.steps._ended and time.monotonic() < end:
            threading.Event().wait(0.001)
        held.free.set()
        closing.result(SECONDS)
        with pytest.raises(RunError, match="the ensemble is closed"):
            reply.result(SECONDS)
    freed = held.events.index("freed")
    assert held.events == ["begins", "ends"] * (freed // 2) + ["freed"] * 2


def test_what_is_free_is_used_and_freed_by_any_thread() -> None:
    in_flight, freed = InFlight("here: "), []
    with ThreadPoolExecutor(1) as threads, in_flight.use():
        in_flight.require_open()
        closing = threads.submit(in_flight.end, lambda: freed.append(1))
        with in_flight.use():
            assert freed == []
    closing.result(SECONDS)
    assert freed == [1]
    with pytest.raises(RunError, match=r"^here: the ensemble is closed$"):
        in_flight.require_open()


FORKING = """
import os, sys
from me_local import MeLocalError, Overrides, load
from me_local.llama.member import Member
settings = Overrides(seed=1, max_tokens=3)
with load(sys.argv[1], batch=2) as ensemble:
    ensemble.generate("Hello", settings)
    ensemble.score("Hello", "there")
    stream, many = ensemble.stream("Hello", settings), ensemble.generate_many(["Hello"] * 6, settings)
    next(stream), next(many)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    else:
        member = ensemble.members[0]
        uses = [
            lambda: ensemble.generate("Hello", settings),
            lambda: ensemble.stream("never seen before"),
            lambda: next(stream),
            lambda: list(many),
            lambda: list(ensemble.generate_many(["Hello"] * 2)),
            lambda: ensemble.score("Hello", "there"),
            lambda: member.sync(member.caches[0].ids),
            member.logits,
            lambda: Member(member.config, member.weights),
            lambda: load(sys.argv[1]),
        ]
        for use in uses:
            try:
                use()
                print("used")
            except MeLocalError as error:
                print(str(error).rpartition("llama.cpp's")[2])
print("left")
"""


FORKING_FIRST = """
import os, sys
from me_local import Overrides, load
def say():
    with load(sys.argv[1]) as ensemble:
        print(ensemble.generate("Hello", Overrides(seed=1, max_tokens=3)).text, flush=True)
child = os.fork()
if child:
    os.waitpid(child, 0)
say()
"""


@pytest.mark.slow
def test_a_process_that_was_forked_off_before_anything_was_evaluated_replies(write_models: WriteModels) -> None:
    models = write_models("bpe_a", "spm")
    models.write_text(models.read_text().replace("n_threads = 1", "n_threads = 2"))
    environment = os.environ | {"GOMP_SPINCOUNT": "100"}  # quick beside other processes, too
    command = [sys.executable, "-c", FORKING_FIRST, str(models)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    with load(models) as ensemble:
        text = ensemble.generate("Hello", Overrides(seed=1, max_tokens=3)).text
    assert (result.stdout, result.stderr) == (2 * f"{text}\n", "")


def test_a_process_that_was_forked_off_says_so_and_ends(write_models: WriteModels) -> None:
    models = write_models("bpe_a", "spm")
    models.write_text(models.read_text().replace("n_threads = 1", "n_threads = 2"))
    command = [sys.executable, "-c", FORKING, str(models)]
    environment = os.environ | {"GOMP_SPINCOUNT": "100"}  # quick beside other processes, too
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    message = (
        " threads were left behind in the process that this one was forked from: "
        'start processes by "spawn" (multiprocessing.get_context), and load the ensemble in them\n'
    )
    assert (result.stdout, result.stderr) == (10 * message + "left\n0\nleft\n", "")
