"""A real llama-server around a tiny model, on a free port of this machine, for the tests of members elsewhere.

`scripts/build_llama_server.py` builds it; tests that need it have the marker `llama_server`.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import build_llama_server
import httpx
from processes import LIMIT, running

FOLDER = build_llama_server.folder()  # as it is before the tests get folders of their own
PROGRAM = FOLDER / "llama-server"
RPC_PROGRAM = FOLDER / "ggml-rpc-server"
# One slot and one core.
_OPTIONS = ["--host", "127.0.0.1", "--port", "0", "-np", "1", "-c", "512", "--threads", "1", "--no-warmup"]


@contextmanager
def llama_server(model: Path, *options: str) -> Iterator[str]:
    """The address of a server that is ready and ends with the block; options win over those that it has already."""
    with running([PROGRAM, "--model", model, *_OPTIONS, *options]) as server:
        url = server.expect(r"listening on (http://\S+)")[1]
        assert httpx.get(f"{url}/health", timeout=LIMIT).status_code == 200
        yield url


@contextmanager
def rpc_server() -> Iterator[str]:
    """Where a program listens that computes layers for a llama-server (`--rpc`), and ends with the block."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = str(listener.getsockname()[1])
    lines = ["stdbuf", "-oL"]  # its lines are kept back where they go to no terminal
    with running([*lines, RPC_PROGRAM, "--host", "127.0.0.1", "--port", port, "--threads", "1"]) as server:
        server.expect(r"transport\s*:")
        _await_listener(int(port))  # which is a moment later
        yield f"127.0.0.1:{port}"


def _await_listener(port: int) -> None:
    end = time.monotonic() + LIMIT
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), LIMIT).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < end, f"nobody listens at {port}"
