"""Processes that scripts and tests start: each of them is read all the time, has a limit and is ended.

A process whose output nobody reads stops as soon as the pipe is full, 64 KB, and whoever waits for it waits for ever.
"""

import re
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

LIMIT = 60.0
"""Seconds that one wait may take, unless it is told otherwise."""

Command = Sequence[str | bytes | PathLike[str]]


class Running:
    """A process at work; `log` is what it has written so far, on its standard output and standard error."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        """What it has written so far, line by line."""
        with self._news:
            return "".join(self._lines)

    def expect(self, pattern: str, seconds: float = LIMIT) -> re.Match[str]:
        """The first line in which a pattern is found, once it is there. Raises AssertionError with the log if not."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self._first(pattern), seconds)
            found = self._first(pattern)
        assert found, f"no line with {pattern} in:\n{self.log}"
        return found

    def finish(self, seconds: float = LIMIT) -> int:
        """Its status, once it has ended and all of its log is there. Raises TimeoutExpired."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def _first(self, pattern: str) -> re.Match[str] | None:
        return next((match for line in self._lines if (match := re.search(pattern, line))), None)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


@contextmanager
def running(command: Command, **options: Any) -> Iterator[Running]:
    """Start a process, which is killed at the end of the block if it has not ended; options as for `Popen`."""
    pipe = subprocess.PIPE  # noqa: TID251
    streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, errors="replace", **streams | options)
    try:
        yield Running(process)
    finally:
        process.kill()
        process.wait(LIMIT)


def run(
    command: Command, *, seconds: float = LIMIT, env: Mapping[str, str] | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a process to its end, with what it writes; it is killed after so many seconds (TimeoutExpired)."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False, env=env, **options
    )
