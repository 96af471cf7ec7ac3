"""Who uses something of llama.cpp at this moment: nobody frees it meanwhile, whatever is interrupted.

Ctrl-C raises KeyboardInterrupt between any two operations of the main thread, also in the middle of tidying up, while
another thread is inside llama.cpp. Nothing may depend on the main thread having waited for it: the lock is held by the
thread that uses the thing, and whoever frees it needs that lock. What is interrupted too early to be freed stays in
memory, which is no harm.
"""

import os
import threading
from collections.abc import Callable

from me_local.errors import RunError


class _Threads:
    """Whether llama.cpp has worked with threads here, or in the process that this one was forked from.

    A process that is forked off has a copy of the memory but none of the threads, and OpenMP waits there for those that
    it had, also with an ensemble that is loaded anew.
    """

    def __init__(self) -> None:
        self.began = self.lost = False

    def fork(self) -> None:
        self.lost = self.began


_threads = _Threads()
os.register_at_fork(after_in_child=_threads.fork)
_FORKED = (
    "llama.cpp's threads were left behind in the process that this one was forked from: "
    'start processes by "spawn" (multiprocessing.get_context), and load the ensemble in them'
)


def begin_threads() -> None:
    """Note that llama.cpp is about to work with threads."""
    _threads.began = True


CLOSED = "the ensemble is closed"
"""Why things can no longer be used, where nothing else is said."""


class InFlight:
    """The uses of one thing, such as a context; `where` stands before its errors.

    Whoever uses it does so within `with in_flight.use():`, and calls `require_open` there. In a process that was forked
    off it is not used, and where threads were lost by that nothing new is made. Raises RunError then.
    """

    def __init__(self, where: str = "") -> None:
        self._where = where
        self._lock = threading.RLock()
        self._ended = ""  # why
        self._process = os.getpid()
        if _threads.lost:
            raise RunError(f"{where}{_FORKED}")

    def use(self) -> threading.RLock:
        """What is to be held while it is used: by one thread at a time, which may take it again.

        Raises RunError in a process that was forked off.
        """
        # The lock itself and no context manager of ours: between its parts Ctrl-C could leave it locked.
        if self._process != os.getpid():
            raise RunError(f"{self._where}{_FORKED}")
        return self._lock

    def require_open(self) -> None:
        """Raise RunError where it has been freed, or is about to be: to be asked by whoever holds the lock."""
        if self._ended:
            raise RunError(self._ended)

    def end(self, free: Callable[[], object], reason: str | None = None) -> None:
        """Free it by `free`, which may be called again, once nobody uses it; in a forked process do nothing.

        Whoever asks `require_open` from now on is refused, and told the first `reason` there was: one use after the
        other could go before it for long.
        """
        if self._process == os.getpid():
            self._ended = self._ended or reason or f"{self._where}{CLOSED}"
            uninterrupted(lambda: self._locked(free))

    def _locked(self, free: Callable[[], object]) -> None:
        with self._lock:
            free()


def uninterrupted(work: Callable[[], object]) -> None:
    """Do something that may be done twice, to its end; Ctrl-C, or what another signal raises, is raised after that."""
    interruption: BaseException | None = None
    while True:
        try:
            work()
            break
        except Exception:
            raise
        except BaseException as error:
            interruption = error
    if interruption is not None:
        try:
            raise interruption
        finally:
            del interruption  # else the exception keeps its frame, and the frame the exception
