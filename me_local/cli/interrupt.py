"""Ctrl-C: it ends a reply before its next piece, never in the middle of an evaluation, and the loading at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


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
