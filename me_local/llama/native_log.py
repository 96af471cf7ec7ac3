"""What llama.cpp writes to its log: sent to `logging`, and kept, by thread, for errors to quote."""

import ctypes
import logging
import threading
from collections import deque

import llama_cpp

log = logging.getLogger("me_local.llama_cpp")
log.addHandler(logging.NullHandler())  # a program that sets up no logging sees nothing of it

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # enum ggml_log_level


class _LineLogger(threading.local):
    """Logs whole lines of what llama.cpp writes in parts; its level 5 continues the part before.

    Each thread has its own, with what llama.cpp wrote in it: `first_errors` are two lines that are errors (the first is
    the cause, and later ones say less and less), `warnings` the last lines that are warnings, `last_lines` of all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._level, self._line = logging.DEBUG, ""
        self.first_errors: list[str] = []
        self.warnings: deque[str] = deque(maxlen=64)
        self.last_lines: deque[str] = deque(maxlen=64)

    def write(self, level: int, text: str) -> None:
        self._level = _LEVELS.get(level, self._level)
        *lines, self._line = (self._line + text).split("\n")
        for line in filter(str.strip, lines):
            log.log(self._level, "%s", line.rstrip())
            self.last_lines.append(line)
            if self._level == logging.WARNING:
                self.warnings.append(line.strip())
            says_why = self._level == logging.ERROR and not line.endswith(": failed to load model")
            if says_why and len(self.first_errors) < 2:
                self.first_errors.append(line.strip())


native_log = _LineLogger()


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    native_log.write(level, text.decode("utf-8", "replace"))


def send_log() -> None:
    """Send llama.cpp's log to `logging`, where it is shown at -v."""
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
