"""A server around an ensemble of tiny models, in a thread of the tests, on a free port of this machine."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

from me_local import Ensemble, load
from me_local.config import load_config
from me_local.mixture.alignment import Distribution
from me_local.server.app import Access
from me_local.server.keeping import Keeper, Limits, Source
from me_local.server.serving import Server, address_of, bind

MESSAGES = [{"role": "user", "content": "the cat sat on the mat"}]


class Served:
    """A running server; `ensemble` is read while it makes no reply. `told` are lines for whoever runs it."""

    def __init__(self, ensemble: Ensemble, url: str, server: Server, keeper: Keeper, told: list[str]) -> None:
        self.ensemble = ensemble
        self.keeper = keeper
        self.told = told
        self.url = url
        self.server = server
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels that match, 0 where it is not there yet."""
        pattern = re.compile(rf"^me_local_{name}(?:\{{[^}}]*\}})? (\S+)$", re.MULTILINE)
        return sum(float(value) for value in pattern.findall(self.http.get("/metrics").text))

    def wait_for(self, name: str, value: float) -> None:
        """Ask until a metric has this value, for half a minute at most."""
        end = time.monotonic() + 30
        while (now := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {now}, not {value}"

    def chat(self, **fields: object) -> httpx.Response:
        """Ask for a short reply."""
        body = {"model": "me-local", "messages": MESSAGES, "max_tokens": 5} | fields
        return self.http.post("/v1/chat/completions", json=body)


@contextmanager
def served(
    models: Path, access: Access | None = None, limits: Limits | None = None, *, parallel: int = 1
) -> Iterator[Served]:
    ready = threading.Event()
    with load(models, batch=parallel) as ensemble, bind("127.0.0.1", 0, guarded=False) as listener:
        url = address_of(listener)
        told: list[str] = []
        source = Source(
            lambda: load_config(models), lambda config: (Ensemble(config, batch=parallel), int), told.append
        )
        keeper = Keeper((ensemble, int), source, limits or Limits())
        server = Server(keeper, access or Access(), limits or Limits(), ready.set)
        thread = threading.Thread(target=server.serve_on, args=(listener,), daemon=True)
        thread.start()
        try:
            assert ready.wait(60)
            running = Served(ensemble, url, server, keeper, told)
            with running.http, running.openai:
                yield running
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server does not end"


class Tap:
    """Lets an ensemble predict only as many pieces as are `let` through; `begun` once it has come to the first."""

    def __init__(self, ensemble: Ensemble) -> None:
        self._pieces = threading.Semaphore(0)
        self.begun = threading.Event()
        align = ensemble.engine.alignment

        def waiting(*args: object) -> Distribution:
            self.begun.set()
            assert self._pieces.acquire(timeout=30)
            return align(*args)  # type: ignore[arg-type]

        ensemble.engine.alignment = waiting

    def let(self, pieces: int) -> None:
        self._pieces.release(pieces)
