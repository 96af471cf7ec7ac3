"""What the requests of other protocols share: each becomes a request for a conversation, which is checked as such.

So nothing is checked, told to members or kept to a grammar in two ways. Knows nothing of HTTP.
"""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from pydantic import Field

from me_local.asking import Ask
from me_local.ensemble import Ensemble
from me_local.errors import MeLocalError
from me_local.server.fields import Strict
from me_local.server.protocol import MODEL, ChatRequest, parse
from me_local.server.refusals import ApiError, api_error
from me_local.server.shaping import Shaping

SentOn = Annotated[Any, Field(default=None)]
"""A field that the conversation has, too, and that is checked there."""


class Translated(Shaping, Strict):
    """A request that asks for one reply to a conversation."""

    names: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What fields of the conversation are called here."""

    model: str = MODEL
    stream: bool | None = None
    seed: SentOn
    strategy: SentOn
    unit: SentOn
    weights: SentOn

    def as_chat(self) -> dict[str, Any]:
        """The fields of the request for a conversation, but for those that are here as well; None says nothing."""
        raise NotImplementedError

    def chat(self) -> ChatRequest:
        """The request for a conversation. Raises ApiError that names the first field that is wrong."""
        shaping = {name: getattr(self, name) for name in Shaping.model_fields}  # checked already
        sent = Translated.model_fields.keys() - shaping.keys() - {"stream"}
        same = {name: getattr(self, name) for name in sorted(sent)}
        fields = {name: value for name, value in (same | self.as_chat()).items() if value is not None}
        try:
            return parse(ChatRequest, json.dumps(fields).encode()).model_copy(update=shaping)
        except ApiError as error:
            raise self._renamed(error) from None

    def asked(self, ensemble: Ensemble, aliases: Sequence[str] = ()) -> tuple[ChatRequest, Ask]:
        """The same, and the reply that it asks for. Raises ApiError as well."""
        chat = self.chat()
        try:
            [ask] = chat.asks(ensemble, aliases)
        except MeLocalError as error:
            raise self._renamed(api_error(error)) from None
        except ApiError as error:
            raise self._renamed(error) from None
        return chat, ask

    def _renamed(self, error: ApiError) -> ApiError:
        """The error in the words of this protocol."""
        param = (error.param or "").replace(".function.", ".")
        field, dot, rest = param.partition(".")
        name = f"{self.names.get(field, field)}{dot}{rest}"
        text = error.message
        if error.param and text.startswith(error.param):
            text = name + text.removeprefix(error.param)
        return ApiError(error.status, text, param=name or None, code=error.code)


def prompt_tokens(ensemble: Ensemble, ask: Ask) -> int:
    """The tokens of a conversation's prompt, whether they fit or not: of the member that has most, of those that write.

    Raises MeLocalError.
    """
    config = ensemble.with_overrides(ask.overrides)
    _, lengths = ensemble.prompter.conversation(ask.prompt, config)
    return max(length for length, writes in zip(lengths, ensemble.prompter.writing(config), strict=True) if writes)
