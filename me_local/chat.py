"""A conversation with an ensemble: its turns, and what of them still fits into the members' contexts."""

from collections.abc import Iterator
from typing import Any

from me_local.config import Config, Overrides, override
from me_local.ensemble import Ensemble, check_conversation
from me_local.errors import InputError
from me_local.reply import Reply, ReplyStream, Step
from me_local.templates import Message, Role
from me_local.vocabulary import IntArray


class Chat:
    """Turns of a user and of an ensemble.

    `config` holds the settings of this conversation, which `set` changes; `messages` all turns, also those that no
    longer fit into a context; `dropped` counts the messages that the last reply no longer saw. The n-th reply of a
    conversation with a seed has the seed + n, from n = 0.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble
        self.config: Config = ensemble.config
        self.messages: list[Message] = []
        self.dropped = 0
        self._replies = 0

    def set(self, overrides: Overrides) -> None:
        """Change settings of this conversation. Raises ConfigError."""
        self.config = override(self.config, overrides)

    def say(self, text: str) -> "Turn":
        """Ask, and get the reply as a stream of steps. Raises InputError for a message that is empty or too long."""
        asked = [*self.messages, Message("user", text)]
        check_conversation(asked)
        return Turn(self, asked, self._start(asked))

    def again(self) -> "Turn":
        """Another reply to the last message, in place of the one that it got. Raises InputError without one."""
        asked = self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages
        if not asked:
            raise InputError("there is no message to answer again")
        return Turn(self, asked, self._start(asked))

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = []
        self.dropped = 0

    def as_dict(self) -> dict[str, Any]:
        """The conversation as JSON can hold it."""
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        return {"system": self.config.system, "messages": messages}

    def restore(self, saved: Any) -> None:
        """Take over a conversation from `as_dict`. Raises InputError when it is not one; nothing is changed then."""
        if not isinstance(saved, dict) or not isinstance(saved.get("system"), str | None):
            raise InputError('it is not a saved conversation: an object with "system" and "messages" is wanted')
        messages = parse_messages(saved.get("messages"))
        self.set_system(saved.get("system"))
        self.messages = messages
        self.dropped = 0

    def set_system(self, text: str | None) -> None:
        """Set the system message of the conversation, or remove it."""
        self.config = override(self.config, Overrides(system=text or ""))

    def _start(self, messages: list[Message]) -> ReplyStream:
        prompts, self.dropped = self._fitting(messages)
        config = self.config
        if config.seed is not None:
            config = override(config, Overrides(seed=config.seed + self._replies))
        self._replies += 1
        return self.ensemble.start(config, prompts)

    def _fitting(self, messages: list[Message]) -> tuple[tuple[IntArray, ...], int]:
        """Prompts of the newest turns that leave each member room to answer, and how many messages they leave out."""
        starts = [i for i, message in enumerate(messages) if message.role == "user"]
        for start in [0, *starts[1:]]:
            prompts = self.ensemble.prompts(messages[start:], self.config)
            if self._leave_room(prompts):
                return prompts, start
        self.ensemble.check_lengths([len(prompt) for prompt in prompts])
        return prompts, start

    def _leave_room(self, prompts: tuple[IntArray, ...]) -> bool:
        sizes = zip(prompts, (member.n_ctx for member in self.ensemble.members), strict=True)
        return all(len(prompt) + min(self.config.max_tokens, n_ctx // 4) <= n_ctx for prompt, n_ctx in sizes)


class Turn(Iterator[Step]):
    """A reply in a conversation, as a stream of steps.

    Once the stream ends, also by `cancel` or by a failure, message and reply belong to the conversation. Where it
    was cut off before anything was written, the conversation stays as it was.
    """

    def __init__(self, chat: Chat, asked: list[Message], stream: ReplyStream) -> None:
        self._chat = chat
        self._asked = asked
        self._stream = stream

    def __next__(self) -> Step:
        try:
            return next(self._stream)
        except BaseException:
            self._keep()
            raise

    def cancel(self) -> None:
        """End the reply before its next piece; may be called from a signal handler or another thread."""
        self._stream.cancel()

    def finish(self) -> Reply:
        """Run to the end, and return the reply."""
        for _ in self:
            pass
        return self.reply

    @property
    def reply(self) -> Reply:
        """The reply so far."""
        return self._stream.reply

    def _keep(self) -> None:
        reply = self.reply
        if reply.text or reply.finish_reason in ("stop", "length"):
            self._chat.messages = [*self._asked, Message("assistant", reply.text)]


def parse_messages(listed: Any) -> list[Message]:
    """Messages from JSON: a list of objects with `role` and `content`. Raises InputError that names the place."""
    if not isinstance(listed, list) or not listed:
        raise InputError('"messages" must be a list of objects with "role" and "content", and not empty')
    return [_parse_message(entry, f"messages[{i}]") for i, entry in enumerate(listed)]


def _parse_message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise InputError(f'{where}: must be an object with a "role" and a text as "content"')
    roles: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
    role = roles.get(str(entry.get("role")))
    if role is None:
        raise InputError(f'{where}.role: must be "system", "user" or "assistant", got {entry.get("role")!r}')
    return Message(role, entry["content"])
