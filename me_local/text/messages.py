"""A message of a conversation."""

from dataclasses import dataclass
from typing import Literal

from me_local.errors import InputError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        """Raises InputError for another role, and for text that UTF-8 cannot hold."""
        if self.role not in ("system", "user", "assistant") or not isinstance(self.content, str):
            raise InputError(f'a message is a text of "system", "user" or "assistant", got {self.role!r}')
        try:
            self.content.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the {self.role} message has half a surrogate pair at character {error.start}, which is no text"
            ) from None
