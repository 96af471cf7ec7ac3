"""Ctrl-C during a reply: it ends the reply before its next piece, never in the middle of an evaluation."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def cancels(cancel: Callable[[], None]) -> Iterator[None]:
    """While inside, Ctrl-C calls `cancel` and raises nothing."""
    before = signal.signal(signal.SIGINT, lambda *_: cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
