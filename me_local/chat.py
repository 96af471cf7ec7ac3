"""A conversation with an ensemble: its turns, and what of them still fits into the members' contexts."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

from me_local.asking import Prompts, check_conversation, shown
from me_local.config import Config, Overrides, override
from me_local.decoding.reply import Reply, ReplyStream, Step
from me_local.ensemble import Ensemble
from me_local.errors import InputError, PromptTooLongError
from me_local.text.messages import Message, Role


class Chat:
    """Turns of a user and of an ensemble.

    `config` holds the settings of this conversation, which `set` changes; `system` its own system message, if it was
    given one; `messages` all turns, also those that no longer fit into a context; `dropped` counts the messages that
    the last reply no longer saw. The n-th reply of a conversation with a seed has the seed + n, from n = 0.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble
        self.config: Config = ensemble.config
        self.system: str | None = None
        self.messages: list[Message] = []
        self.dropped = 0
        self._replies = 0

    def set(self, overrides: Overrides) -> None:
        """Change settings of this conversation. Raises ConfigError."""
        self.config = override(self.config, overrides)
        if overrides.system is not None:
            self.system = overrides.system

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
        messages = [as_dict(message) for message in self.messages]
        return {"system": self.system, "messages": messages}

    def restore(self, saved: Any) -> None:
        """Take over a conversation from `as_dict`; one without a system message leaves this chat's as it is.

        Raises InputError when it is not one; nothing is changed then.
        """
        if not isinstance(saved, dict) or not isinstance(saved.get("system"), str | None):
            raise InputError('it is not a saved conversation: an object with "system" and "messages" is wanted')
        messages = parse_messages(saved.get("messages"))
        if any(message.role == "system" for message in messages):
            raise InputError('a system message stands in "messages"; it belongs into "system"')
        if saved.get("system") is not None:
            self.set_system(saved["system"])
        self.messages = messages
        self.dropped = 0

    def set_system(self, text: str | None) -> None:
        """Set the system message for all members; None removes it."""
        self.set(Overrides(system=text or ""))

    def _start(self, messages: list[Message]) -> ReplyStream:
        self.dropped, prompts = self._fitting(messages)
        config = self.config
        if config.seed is not None:
            config = override(config, Overrides(seed=config.seed + self._replies))
        self._replies += 1
        seen = shown(messages[self.dropped :], raw=False)
        return self.ensemble.start(config, prompts, prefill=True, shown=seen)

    def _fitting(self, messages: list[Message]) -> tuple[int, Prompts]:
        """How many of the oldest messages to leave out, and the prompts of the rest.

        As many as before while that leaves room to answer. Otherwise so many that half of each context is free: what
        is left out changes the beginning of the prompt, which then has to be evaluated again, and not in each turn.
        """
        prompts = self._with_room(messages, self.dropped, lambda n_ctx: min(self.config.max_tokens, n_ctx // 4))
        if prompts is not None:
            return self.dropped, prompts
        starts = [i for i, m in enumerate(messages) if m.role == "user" and i > self.dropped] or [self.dropped]
        first = bisect_left(starts, True, hi=len(starts) - 1, key=lambda i: self._half_free(messages, i))
        prompts = self._prompts(messages, starts[first])
        self.ensemble.prompter.check_lengths([len(prompt) for prompt in prompts.ids], self.config)
        return starts[first], prompts

    def _prompts(self, messages: list[Message], start: int) -> Prompts:
        return self.ensemble.prompter.prompts(messages[start:], self.config)

    def _half_free(self, messages: list[Message], start: int) -> bool:
        return self._with_room(messages, start, lambda n_ctx: n_ctx // 2) is not None

    def _with_room(self, messages: list[Message], start: int, room: Callable[[int], int]) -> Prompts | None:
        """The prompts without the messages in front of `start`; None where they leave too little room."""
        try:
            prompts = self._prompts(messages, start)
        except PromptTooLongError:
            return None
        members = zip(self.ensemble.members, prompts.ids, self.ensemble.prompter.writing(self.config), strict=True)
        fits = all(len(prompt) + room(member.n_ctx) <= member.n_ctx for member, prompt, writes in members if writes)
        return prompts if fits else None


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
            self._chat.messages = [*self._asked, Message("assistant", reply.answer, reply.thought)]


def as_dict(message: Message) -> dict[str, str]:
    """A message as JSON can hold it, with the thought of a reply under the name that servers give it."""
    thought = {"reasoning_content": message.thought} if message.thought else {}
    return {"role": message.role, "content": message.content} | thought


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
    thought = entry.get("reasoning_content") or ""
    if not isinstance(thought, str) or (thought and role != "assistant"):
        raise InputError(f"{where}.reasoning_content: must be a text, in a message of the assistant")
    return Message(role, entry["content"], thought)
