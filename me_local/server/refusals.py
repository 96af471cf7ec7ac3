"""What is not answered, and why: an HTTP status, and OpenAI's shape of an error."""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from me_local.errors import ConfigError, InputError, MeLocalError, PromptTooLongError

log = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that is not answered: HTTP status, and what OpenAI's clients read of an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers) if retry is None else {"Retry-After": str(retry), **headers}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if status in (408, 413):  # the rest of the body is not waited for
            self.headers["Connection"] = "close"

    def as_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kinds = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: MeLocalError) -> ApiError:
    """The refusal that one of me-local's errors becomes."""
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, ConfigError):  # of an option, such as "--weights: unknown member"
        text = str(error).removeprefix("--")
        return ApiError(400, text, param=text.partition(":")[0])
    return ApiError(400 if isinstance(error, InputError) else 500, str(error))


def unexpected(error: Exception) -> ApiError:
    """An error of this program; its text may have a prompt in it, so only its kind is told."""
    log.error("%s while answering", type(error).__name__)
    log.debug("in full", exc_info=error)
    return ApiError(500, f"an error of the server ({type(error).__name__}); its log at -vv has more")


def shutting_down() -> ApiError:
    """What is told to whoever asks too late."""
    return ApiError(503, "the server is shutting down", code="shutting_down")
