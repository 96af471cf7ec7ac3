"""What stands in front of the application: who may ask, from where, and how much a request may hold.

A page in the user's browser can send requests to this machine, and by DNS rebinding under a name of its own. So `Host`
must be an address, "localhost" or a name that the operator gave; `Origin`, where there is one, that same host or one
that was allowed. Addresses cannot be rebound.
"""

import asyncio
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from me_local.errors import ConfigError
from me_local.server.messages_answers import error_dict
from me_local.server.metrics import Metrics
from me_local.server.refusals import ApiError

log = logging.getLogger(__name__)

LARGEST_BODY = 4 * 2**20  # bytes
_BODY_SECONDS = 20.0
_COUNTED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/models",
    "/health",
    "/metrics",
    "/",
)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def refusal(error: ApiError, path: str = "") -> JSONResponse:
    """The response that an error becomes, in the shape that clients of this path read."""
    anthropic = path.removeprefix("/v1").startswith("/messages")
    return JSONResponse(error_dict(error) if anthropic else error.as_dict(), error.status, error.headers)


class Gate:
    """Refuses foreign hosts and origins, and adds the headers that keep a browser strict. Logs and counts requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._hosts = {host.lower() for host in ("localhost", *hosts)}
        self._origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith("//"):  # of a base URL with a slash at its end
            scope = {**scope, "path": "/" + scope["path"].lstrip("/")}
        started, status = time.monotonic(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            if scope["path"] != "/health":  # load balancers ask for it without a name
                self._check(Headers(scope=scope))
        except ApiError as error:
            await refusal(error, scope["path"])(scope, receive, watched)
        else:
            await self._app(scope, receive, watched)
        finally:
            route = scope["path"] if scope["path"] in _COUNTED else "other"
            self._metrics.requests.labels(route, status).inc()
            log.info("%s %r %d %.2f s", scope["method"], scope["path"][:100], status, time.monotonic() - started)

    def _check(self, headers: Headers) -> None:
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if len(hosts) != 1 or not self._knows(hosts[0]):
            raise ApiError(403, "Host: this server does not go by that name (--allow-host)", code="wrong_host")
        if origin is not None and origin not in self._origins and _netloc(origin) not in _names(hosts[0], origin):
            raise ApiError(403, "Origin: pages of other sites are not answered (--cors)", code="wrong_origin")

    def _knows(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        return name in self._hosts or _is_address(name)


class KeyCheck:
    """Asks for the API key wherever something of the ensemble is given away."""

    def __init__(self, app: ASGIApp, key: str, open_paths: Sequence[str]) -> None:
        self._app = app
        self._expected = key.encode()
        self._closed = tuple(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "http" and scope["path"].startswith(self._closed):
            headers = dict(scope["headers"])
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer":
                given = headers.get(b"x-api-key", b"")
            if not hmac.compare_digest(given.strip(), self._expected):
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                await refusal(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises ApiError where it is no JSON, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Content-Type: application/json is wanted, as it is, in UTF-8")
    if int(request.headers.get("content-length", 0)) > LARGEST_BODY:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise _too_large()
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None
    return bytes(body)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {LARGEST_BODY:,} bytes", code="body_too_large")


_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def origin_of(site: str) -> str:
    """An origin as browsers send it. Raises ConfigError for what is none."""
    try:
        parts = urlsplit(site.lower())
        fits = parts.scheme in _DEFAULT_PORTS and parts.hostname and parts.path in ("", "/") and "@" not in site
        fits = fits and not parts.query and not parts.fragment and (parts.port is None or parts.port > 0)
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(f"--cors: a site looks like https://example.org, got {site[:80]!r}")
    return f"{parts.scheme}://{parts.netloc.removesuffix(_DEFAULT_PORTS[parts.scheme])}"


def host_of(name: str) -> str:
    """The name of a machine, without a port. Raises ConfigError for what is none."""
    try:
        host = urlsplit(f"//{name.lower()}").hostname or ""
    except ValueError:
        host = ""
    if not re.fullmatch(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?\.?|[0-9a-f:.]+", host) or "/" in name or "@" in name:
        raise ConfigError(f"--allow-host: a name looks like box.example.org, got {name[:80]!r}")
    return host


def _netloc(origin: str) -> str:
    """The host and port of an origin; empty where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _names(host: str, origin: str) -> tuple[str, str]:
    """What the host calls itself, and the same without the port that goes without saying."""
    port = _DEFAULT_PORTS.get(origin.partition(":")[0], "")
    return host, host.removesuffix(port) if port else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
