"""Ctrl-C: it ends a reply before its next piece, never in the middle of an evaluation, and the loading at once.

A run without a conversation it ends as a whole: records that are finished stay, and the status is 130.
"""

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


class Interruption(KeyboardInterrupt):
    """One Ctrl-C, on its way through the program."""


def raises_once() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt, but not while an earlier one is still on its way.

    Who presses it twice wants the end of the run, and not of the tidying up behind it.
    """
    on_its_way: weakref.ref[Interruption] | None = None

    def interrupt(*_: object) -> None:
        nonlocal on_its_way
        if on_its_way is None or on_its_way() is None:
            interruption = Interruption()
            on_its_way = weakref.ref(interruption)  # an exception lives until it has been dealt with
            raise interruption

    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, interrupt)


@contextmanager
def cancels(cancel: Callable[[], None]) -> Iterator[None]:
    """While inside, Ctrl-C calls `cancel` and raises nothing."""
    before = signal.signal(signal.SIGINT, lambda *_: cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def leaves_at_once(console: Console) -> Iterator[None]:
    """While inside, Ctrl-C ends the process with status 130.

    An exception would be lost in llama.cpp, which calls back into Python for its log while it loads a model.
    """

    def leave(*_: object) -> None:
        console.show_cursor()
        console.file.write("\n")
        console.file.flush()
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
