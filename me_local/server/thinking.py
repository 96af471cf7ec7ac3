"""The fields by which clients ask models to think, or not to: OpenAI's, llama-server's and vLLM's.

All but one are variables of chat templates. Knows nothing of how thoughts are told apart.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from me_local.config import check
from me_local.errors import ConfigError

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""How much is to be thought, in OpenAI's words."""


class Thinking(BaseModel):
    """All these fields of a request."""

    reasoning_format: Literal["auto", "deepseek", "none"] | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Field(max_length=256)] = None

    @property
    def tells_thoughts(self) -> bool:
        """Whether thoughts stand apart; otherwise they are part of the content, with their marks."""
        return self.reasoning_format != "none"

    def template_args(self) -> dict[str, Any] | None:
        """Variables for chat templates: those that are given, and what two fields say by their names.

        Raises ConfigError for names that the conversation gives, and for two values of one.
        """
        given: dict[str, Any] = check("template_args", self.chat_template_kwargs or {}, "chat_template_kwargs")
        named = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.enable_thinking}
        if self.reasoning_effort == "none" and self.enable_thinking is None:
            named["enable_thinking"] = given.get("enable_thinking", False)
        for name, value in named.items():
            if value is not None and given.get(name, value) != value:
                raise ConfigError(f"{name}: contradicts chat_template_kwargs")
        return given | {name: value for name, value in named.items() if value is not None} or None
