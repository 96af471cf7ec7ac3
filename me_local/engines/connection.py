"""HTTP to one engine: an object in, an object out, and every fault of it in one line.

What comes back is data, not authority: its size is limited, redirects are not followed, and text of it that goes into
an error is cut and made printable. Knows nothing of models.
"""

import json
import math
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from me_local.errors import LoadError, RunError
from me_local.model import EvaluationInterruptedError

PATIENCE = 60.0
"""Seconds in which an engine that went away has to be back, so that a reply goes on."""
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 180.0
"""What a step, or a part of a prompt, may take."""
_SOON = 0.02  # seconds after which it is asked again at first: it may have closed a connection that was kept alive
_PAUSE = 0.5
_LOOK = 0.1  # seconds between two looks at whether the user has had enough
_IDLE = 30.0  # seconds in which a connection stays open without a request
_CLOSED = "the ensemble is closed"
_MOST_BYTES = 32 << 20
_MOST_TEXT = 200  # characters of an engine's own words
_BUSY = (429, 502, 503, 504)

Interrupted = Callable[[], bool]


class _AwayError(Exception):
    """It does not answer, or asks to come again later."""

    def __init__(self, problem: str, pause: float | None = None) -> None:
        super().__init__(problem)
        self.pause = pause


class Connection:
    """A pool of connections to the engine at `url`, for the member of this name, which errors begin with.

    `key` goes with each request; `variable` is where it is from. May be used by several threads. Raises LoadError where
    the library is missing.
    """

    def __init__(self, name: str, url: str, key: str | None = None, variable: str | None = None) -> None:
        try:
            import httpcore

            from me_local.engines.wire import Backend, Patience
        except ImportError:
            raise LoadError(f'member "{name}": url needs httpcore: pip install "me-local[remote]"') from None
        self.where = f'member "{name}": {url}'
        self._key, self._variable = key, variable
        self._library = httpcore
        self._closed = threading.Event()
        self._process = os.getpid()
        self._patience = Patience()
        self._url = url.rstrip("/")
        try:
            parts = urlsplit(self._url)
            proxy = _proxy(parts.scheme, parts.hostname or "", parts.port)
            self._headers = [("Host", parts.netloc), ("Content-Type", "application/json")]
            self._headers += [("Accept-Encoding", "identity")]
            self._headers += [("Authorization", f"Bearer {key}")] if key else []
            httpcore.URL(self._url)
            backend = Backend(self._patience)
            options: Any = {"max_connections": None, "keepalive_expiry": _IDLE, "network_backend": backend}
            self._pool: Any = httpcore.HTTPProxy(**proxy, **options) if proxy else httpcore.ConnectionPool(**options)
        except (ValueError, TypeError) as error:
            raise LoadError(f"{self.where}: url: {plain(str(error))}") from None

    def ask(
        self, path: str, body: dict[str, Any] | None = None, *, interrupted: Interrupted | None = None
    ) -> tuple[dict[str, Any], float]:
        """The object that a POST (or a GET, without a body) gives, and when the connection that it came by was opened.

        That is a time of `time.monotonic`. Where `interrupted` is given, an engine that is away is waited for; it is
        the user's way out. Raises RunError, EvaluationInterruptedError.
        """
        gone_since: float | None = None
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        while True:
            try:
                return self._ask(path, content, interrupted or _never)
            except _AwayError as error:
                now = time.monotonic()
                if interrupted is None:
                    raise RunError(f"{self.where}: {error}") from None
                pause = _SOON if gone_since is None and error.pause is None else error.pause or _PAUSE
                gone_since = now if gone_since is None else gone_since
                if now - gone_since > PATIENCE:
                    raise RunError(f"{self.where}: {error}, and was not back within {PATIENCE:.0f} s") from None
                self._wait(min(pause, PATIENCE), interrupted)

    def _wait(self, seconds: float, interrupted: Interrupted) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if interrupted():
                raise EvaluationInterruptedError(f"{self.where}: stopped while it was away")
            if self._closed.wait(min(_LOOK, left)):
                raise RunError(_CLOSED)

    def _ask(self, path: str, content: bytes | None, interrupted: Interrupted) -> tuple[dict[str, Any], float]:
        http, patience = self._library, self._patience
        if self._closed.is_set():
            raise RunError(_CLOSED)
        if self._process != os.getpid():
            raise RunError(
                f"{self.where}: is asked by the process that loaded the ensemble, and not by one forked off it"
            )
        patience.until = time.monotonic() + ANSWER_SECONDS
        patience.interrupted = lambda: self._closed.is_set() or interrupted()
        limits = {"timeout": {"connect": CONNECT_SECONDS, "pool": ANSWER_SECONDS}}
        headers = [*self._headers, ("Content-Length", str(len(content or b"")))]
        try:
            method = "GET" if content is None else "POST"
            with self._pool.stream(
                method, self._url + path, headers=headers, content=content, extensions=limits
            ) as response:
                found = b"".join(self._limited(response.iter_stream()))
                opened: float = response.extensions["network_stream"].opened
            self._require_ok(path, response, found)
            return self._parsed(path, found), opened
        except EvaluationInterruptedError:
            if self._closed.is_set():
                raise RunError(_CLOSED) from None
            raise
        except http.ConnectTimeout:
            raise _AwayError(f"does not answer within {CONNECT_SECONDS:.0f} s") from None
        except http.TimeoutException:
            raise RunError(f"{self.where}: {path} took more than {ANSWER_SECONDS:.0f} s") from None
        except (http.NetworkError, http.ProtocolError, http.ProxyError) as error:
            if self._closed.is_set():
                raise RunError(_CLOSED) from None
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> RunError | _AwayError:
        """What it means that nothing came back: it is away, or it cannot be trusted."""
        reason = self._plain(str(error)) or type(error).__name__
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                return RunError(f"{self.where}: no safe connection: {reason}")
            cause = cause.__cause__ or cause.__context__
        return _AwayError(f"cannot be reached: {reason}")

    def _limited(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        size = 0
        for part in parts:
            size += len(part)
            if size > _MOST_BYTES:
                raise RunError(f"{self.where}: answers with more than {_MOST_BYTES >> 20} MB")
            yield part

    def _require_ok(self, path: str, response: Any, content: bytes) -> None:
        code: int = response.status
        if code == 200:
            return
        words = self._plain(_words(content))
        said = f": {words}" if words else ""
        if code in (401, 403):
            hint = f"the key in {self._variable} is not taken" if self._variable else "it wants a key: set api_key_env"
            raise RunError(f"{self.where}: {hint} (status {code})")
        if 300 <= code < 400:
            raise RunError(
                f"{self.where}: {path} answers with a redirect, which is not followed: give the final address"
            )
        if code == 404:
            hint = "" if "model" in words else ": is the engine what `engine` says it is?"
            raise RunError(f"{self.where}: has no {path}{said}{hint}")
        if code in _BUSY:
            raise _AwayError(f"is busy (status {code}{said})", _seconds(dict(response.headers).get(b"retry-after")))
        raise RunError(f"{self.where}: {path} answers with status {code}{said}")

    def _parsed(self, path: str, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise _AwayError(f"{path} answers with something that is not JSON") from None
        if not isinstance(answer, dict):
            raise RunError(f"{self.where}: {path} answers with something else than an object")
        return answer

    def _plain(self, text: str) -> str:
        """A text of the engine's in one printable line, without the key, which it may have sent back."""
        return plain(text.replace(self._key, "***") if self._key else text)

    def close(self) -> None:
        """Close all connections; what is asked, or asks already, then raises RunError. Does nothing in a fork."""
        if self._process == os.getpid():
            self._closed.set()
            self._pool.close()


def _never() -> bool:
    return False


def _proxy(scheme: str, host: str, port: int | None) -> dict[str, Any] | None:
    """The proxy that the environment wants; none for this machine itself. Raises ValueError where there is no such."""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local or proxy_bypass(host if port is None else f"{host}:{port}"):
        return None
    proxies = getproxies()
    found = proxies.get(scheme) or proxies.get("all")
    if not found:
        return None
    parts = urlsplit(found if "://" in found else f"http://{found}")
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"the environment wants a proxy by {parts.scheme}, and only those by HTTP can be used")
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    return {"proxy_url": f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", "proxy_auth": auth}


def _seconds(text: bytes | None) -> float | None:
    """The seconds that a Retry-After header gives, within reason; None where it gives none, or a date."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return min(max(seconds, _SOON), PATIENCE) if math.isfinite(seconds) else None


def _words(content: bytes) -> str:
    """What an answer says of an error, as llama-server and vLLM write it, or its beginning."""
    text = content[: 8 * _MOST_TEXT].decode("utf-8", "replace")
    try:
        said: Any = json.loads(content)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        said = said.get(key, said) if isinstance(said, dict) else said
    return said if isinstance(said, str) else text


def plain(text: str) -> str:
    """A text of someone else's in one printable line."""
    line = "".join(char if char.isprintable() else " " for char in text[: 4 * _MOST_TEXT])
    line = " ".join(line.split())
    return line if len(line) <= _MOST_TEXT else line[:_MOST_TEXT] + " ..."
