"""A message of a conversation."""

from dataclasses import dataclass
from typing import Literal

from me_local.errors import InputError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; a reply may have a `thought`, which stood in front of its content."""

    role: Role
    content: str
    thought: str = ""

    def __post_init__(self) -> None:
        """Raises InputError for another role, and for text that UTF-8 cannot hold."""
        if self.role not in ("system", "user", "assistant") or not isinstance(self.content, str):
            raise InputError(f'a message is a text of "system", "user" or "assistant", got {self.role!r}')
        if not isinstance(self.thought, str) or (self.thought and self.role != "assistant"):
            raise InputError("a thought is a text, and stands in a message of the assistant")
        try:
            self.content.encode()
            self.thought.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the {self.role} message has half a surrogate pair at character {error.start}, which is no text"
            ) from None
