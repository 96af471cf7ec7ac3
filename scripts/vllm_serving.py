"""A real vLLM on this machine, on a port of its own, which may end and be started again with something else."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import vllm_environment
from processes import Running, running

SECONDS = 600.0  # until it is up
PROGRAM = vllm_environment.program()  # as it is before tests get folders of their own
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class Vllm:
    """A vLLM that serves one model at a time as `name`, at `url`; `seconds` is what its last start took."""

    def __init__(self, name: str) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            self._port = listener.getsockname()[1]
        self._name = name
        self._what: tuple[object, ...] = ()
        self._stack = ExitStack()
        self.url = f"http://127.0.0.1:{self._port}"
        self.seconds = 0.0

    def run(self, model: Path, *options: str) -> None:
        """Serve this model with these options, which it does already or is started for."""
        if self._what == (model, *options):
            return
        self.stop()
        start = time.monotonic()
        self._stack.enter_context(_serving(model, self._name, self._port, *options))
        self._what = model, *options
        self.seconds = time.monotonic() - start

    def stop(self) -> None:
        """Kill it, with all its processes."""
        self._what = ()
        self._stack.close()


@contextmanager
def _serving(model: Path, name: str, port: int, *options: str) -> Iterator[Running]:
    command = [PROGRAM, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    command += ["--max-model-len", "512", "--dtype", "float32", "--enforce-eager"]
    command += ["--enable-prompt-tokens-details"]  # it says what was in its cache
    ours = _ENVIRONMENT | _SETTINGS | {"PATH": f"{PROGRAM.parent}{os.pathsep}{_ENVIRONMENT['PATH']}"}
    with running([*command, *options], env=ours, start_new_session=True) as server:
        try:
            server.expect("Application startup complete", SECONDS)
            yield server
        finally:
            os.killpg(server.process.pid, signal.SIGKILL)  # the engine is a process of its own
