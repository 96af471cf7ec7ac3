"""When several members are to be evaluated: one after the other with all cores, or all at once with a share each.

On a CPU two evaluations at once on all cores get in each other's way, so each has its share of them. Which of both is
faster depends on the models and the machine, and is measured in the first steps; the numbers that a model computes do
not depend on it. With flash attention they depend on the number of threads, among which llama.cpp divides the keys
(`ggml_compute_forward_flash_attn_ext`, split KV), so a member with it always has all of its threads. Two evaluations on
all cores are slower than one after the other, so that an ensemble with such a member goes that way unless it is told
otherwise. On a GPU an evaluation is queued and returns at once: one after the other is parallel there. Members that run
elsewhere are always asked at the same time, and take none of the cores.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from statistics import median
from typing import Any, Generic, Protocol, TypeVar, cast

from me_local.system.inflight import uninterrupted

Result = TypeVar("Result")

_TRIALS = 5  # of each way
_LOOK = 0.1  # seconds


class Shares(Protocol):
    """What can evaluate with a share of the cores, where it is `divisible`: numbers do not depend on the threads."""

    @property
    def divisible(self) -> bool:
        """Whether it takes a part of the cores; one that does not keeps its threads, whatever it is told."""

    @property
    def local(self) -> bool:
        """Whether it takes cores of this machine."""

    def share_cores(self, parts: int) -> None:
        """Evaluate with a part of the cores, one of so many, from now on, where it is divisible."""


class _Elsewhere(Protocol):
    """What runs on other machines, and may be long in coming."""

    def abandon(self) -> None:
        """End what is being asked."""


class _Task(Generic[Result]):
    """An evaluation in a thread of its own. It can be dropped: it is not begun then, or waited for if it has been."""

    def __init__(self, evaluate: Callable[[], Result]) -> None:
        self._evaluate = evaluate
        self._lock = threading.Lock()
        self._dropped = False

    def run(self) -> Result:
        with self._lock:
            if self._dropped:
                raise CancelledError
            return self._evaluate()

    def drop(self) -> None:
        with self._lock:
            self._dropped = True


class Schedule:
    """Runs evaluations of several models; `parallel` is which way was found faster, None as long as it is tried."""

    def __init__(self, models: Sequence[Shares]) -> None:
        self._models = models
        self._divisible = all(model.divisible for model in models)
        self._pool: ThreadPoolExecutor | None = None
        self._tasks: Sequence[_Task[Any]] = ()  # that may be running
        self._seconds: dict[bool, list[float]] = {False: [], True: []}

    @property
    def parallel(self) -> bool | None:
        """Whether all at once is faster."""
        if not self._divisible:
            return False
        if len(self._seconds[True]) < _TRIALS:
            return None
        return median(self._seconds[True]) < median(self._seconds[False])

    def divide(self, parts: int) -> None:
        """Give every model one of so many parts of the cores."""
        self._settle()
        for model in self._models:
            model.share_cores(parts)

    def run(self, evaluate: Mapping[int, Callable[[], Result]], parallel: bool | None) -> dict[int, Result]:
        """The results of all evaluations, by key, all at once or not; None: the way that is faster, or to be tried."""
        if sum(self._models[key].local for key in evaluate) < 2:
            parallel = False
        chosen = self.parallel if parallel is None else parallel
        if chosen is not None:
            return self._run(evaluate, chosen)
        trial = len(self._seconds[True]) < len(self._seconds[False])
        started = time.perf_counter()
        results = self._run(evaluate, trial)
        self._seconds[trial].append(time.perf_counter() - started)
        return results

    def _run(self, evaluate: Mapping[int, Callable[[], Result]], parallel: bool) -> dict[int, Result]:
        """The results; the local evaluations in this thread where they are not `parallel`, and so is a single one."""
        self._settle()
        local = [key for key in evaluate if self._models[key].local]
        for key in local:
            self._models[key].share_cores(len(local) if parallel else 1)
        here = list(evaluate)[:1] if len(evaluate) == 1 else [] if parallel else local
        tasks = {key: _Task(function) for key, function in evaluate.items() if key not in here}
        if not tasks:
            return {key: function() for key, function in evaluate.items()}
        self._tasks = tuple(tasks.values())
        try:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(len(self._models))
            futures = {key: self._pool.submit(task.run) for key, task in tasks.items()}
            results = {key: evaluate[key]() for key in here}
            waiting = set(futures.values())
            while waiting:  # not in one wait: where the system gives Ctrl-C to another thread, it would not end
                waiting = wait(waiting, _LOOK).not_done
            return results | {key: future.result() for key, future in futures.items()}
        except BaseException:
            for key in tasks.keys() - local:
                cast(_Elsewhere, self._models[key]).abandon()
            raise
        finally:
            # Before an error, or Ctrl-C, goes on: a member must not be evaluated behind the back of what comes next.
            self._settle()

    def _settle(self) -> None:
        """Wait for what is running, and let nothing begin any more; asked again by whoever comes next.

        Ctrl-C at the first instruction of the wait would leave it out.
        """
        if self._tasks:
            uninterrupted(self._drop)
            self._tasks = ()

    def _drop(self) -> None:
        for task in self._tasks:
            task.drop()
