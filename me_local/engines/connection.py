"""HTTP to one engine: an object in, an object out, and every fault of it in one line.

What comes back is data, not authority: its size is limited, redirects are not followed, and text of it that goes into
an error is cut and made printable. Knows nothing of models.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from me_local.errors import LoadError, RunError
from me_local.model import EvaluationInterruptedError

PATIENCE = 60.0
"""Seconds in which an engine that went away has to be back, so that a reply goes on."""
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 180.0
"""What a step, or a part of a prompt, may take."""
_PAUSE = 0.1  # seconds between two looks at whether the user has had enough
_MOST_BYTES = 32 << 20
_MOST_TEXT = 200  # characters of an engine's own words
_BUSY = (429, 502, 503, 504)

Interrupted = Callable[[], bool]


class _AwayError(Exception):
    """It does not answer, or asks to come again later."""

    def __init__(self, problem: str, pause: float = 0.5) -> None:
        super().__init__(problem)
        self.pause = pause


class Connection:
    """A pool of connections to the engine at `url`, for the member of this name, which errors begin with.

    `key` goes with each request; `variable` is where it is from. May be used by several threads. Raises LoadError where
    the library is missing.
    """

    def __init__(self, name: str, url: str, key: str | None = None, variable: str | None = None) -> None:
        try:
            import httpx
        except ImportError:
            raise LoadError(f'member "{name}": url needs httpx: pip install "me-local[remote]"') from None
        self.where = f'member "{name}": {url}'
        self._variable = variable
        self._library = httpx
        self._known: set[object] = set()
        self._lock = threading.Lock()
        self._closed = False
        local = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"), httpx.HTTPTransport())
        self._client = httpx.Client(
            base_url=url.rstrip("/"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            follow_redirects=False,
            mounts=local,  # no proxy for this machine itself
        )

    def ask(
        self, path: str, body: dict[str, Any] | None = None, *, interrupted: Interrupted | None = None
    ) -> tuple[dict[str, Any], bool]:
        """The object that a POST (or a GET, without a body) gives, and whether it came over a new connection.

        Where `interrupted` is given, an engine that is away is waited for; it is the user's way out. Raises RunError,
        EvaluationInterruptedError.
        """
        gone_since: float | None = None
        while True:
            try:
                return self._ask(path, body)
            except _AwayError as error:
                now = time.monotonic()
                gone_since = now if gone_since is None else gone_since
                if interrupted is None:
                    raise RunError(f"{self.where}: {error}") from None
                if now - gone_since > PATIENCE:
                    raise RunError(f"{self.where}: {error}, and was not back within {PATIENCE:.0f} s") from None
                self._wait(min(error.pause, PATIENCE), interrupted)

    def _wait(self, seconds: float, interrupted: Interrupted) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if interrupted():
                raise EvaluationInterruptedError(f"{self.where}: stopped while it was away")
            time.sleep(min(_PAUSE, left))

    def _ask(self, path: str, body: dict[str, Any] | None) -> tuple[dict[str, Any], bool]:
        if self._closed:
            raise RunError("the ensemble is closed")
        http = self._library
        try:
            with self._client.stream("GET" if body is None else "POST", path, json=body) as response:
                content = b"".join(self._limited(response.iter_bytes()))
                fresh = self._is_new(response.extensions.get("network_stream"))
                self._require_ok(path, response, content)
                return self._parsed(path, content), fresh
        except http.ConnectTimeout:
            raise _AwayError(f"does not answer within {CONNECT_SECONDS:.0f} s") from None
        except http.TimeoutException:
            raise RunError(f"{self.where}: {path} took more than {ANSWER_SECONDS:.0f} s") from None
        except http.TransportError as error:
            reason = _plain(str(error)) or type(error).__name__
            if "CERTIFICATE" in reason.upper() or "SSL" in reason.upper():
                raise RunError(f"{self.where}: no safe connection: {reason}") from None
            raise _AwayError(f"cannot be reached: {reason}") from None
        except http.HTTPError as error:
            raise RunError(f"{self.where}: {_plain(str(error))}") from None
        except RuntimeError:  # of a client that is closed meanwhile
            raise RunError("the ensemble is closed") from None

    def _limited(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        size = 0
        for part in parts:
            size += len(part)
            if size > _MOST_BYTES:
                raise RunError(f"{self.where}: answers with more than {_MOST_BYTES >> 20} MB")
            yield part

    def _is_new(self, stream: Any) -> bool:
        """Whether an answer came over a connection that none came over before: who answers may be another one now."""
        address = stream.get_extra_info("client_addr") if stream is not None else None
        with self._lock:
            new = address not in self._known
            self._known.add(address)
        return new

    def _require_ok(self, path: str, response: Any, content: bytes) -> None:
        code: int = response.status_code
        if code == 200:
            return
        words = _words(content)
        said = f": {words}" if words else ""
        if code in (401, 403):
            hint = f"the key in {self._variable} is not taken" if self._variable else "it wants a key: set api_key_env"
            raise RunError(f"{self.where}: {hint} (status {code})")
        if 300 <= code < 400:
            raise RunError(
                f"{self.where}: {path} answers with a redirect, which is not followed: give the final address"
            )
        if code == 404:
            raise RunError(f"{self.where}: has no {path}{said}: is the engine what `engine` says it is?")
        if code in _BUSY:
            raise _AwayError(f"is busy (status {code}{said})", _seconds(response.headers.get("retry-after")))
        raise RunError(f"{self.where}: {path} answers with status {code}{said}")

    def _parsed(self, path: str, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise _AwayError(f"{path} answers with something that is not JSON") from None
        if not isinstance(answer, dict):
            raise RunError(f"{self.where}: {path} answers with something else than an object")
        return answer

    def close(self) -> None:
        """Close all connections; what is asked then raises RunError."""
        self._closed = True
        self._client.close()


def _seconds(text: str | None) -> float:
    """The seconds that a Retry-After header gives, within reason."""
    try:
        seconds = float(text or 1.0)
    except ValueError:
        seconds = 1.0
    return min(max(seconds, _PAUSE), PATIENCE) if math.isfinite(seconds) else 1.0


def _words(content: bytes) -> str:
    """What an answer says of an error, as llama-server and vLLM write it, or its beginning."""
    text = content[: 8 * _MOST_TEXT].decode("utf-8", "replace")
    try:
        said: Any = json.loads(content)
    except (ValueError, RecursionError):
        return _plain(text)
    for key in ("error", "message", "detail"):
        said = said.get(key, said) if isinstance(said, dict) else said
    return _plain(said if isinstance(said, str) else text)


def _plain(text: str) -> str:
    """A text of someone else's in one printable line."""
    line = "".join(char if char.isprintable() else " " for char in text[: 4 * _MOST_TEXT])
    line = " ".join(line.split())
    return line if len(line) <= _MOST_TEXT else line[:_MOST_TEXT] + " ..."
