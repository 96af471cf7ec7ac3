"""A conversation with an ensemble: its turns, and what of them still fits into the members' contexts."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from me_local.asking import Prompts, check_conversation, visible
from me_local.config import Config, Overrides, override
from me_local.decoding.reply import Reply, ReplyStream, Step
from me_local.ensemble import Ensemble
from me_local.errors import InputError, PromptTooLongError
from me_local.text.messages import Message, Role


@dataclass(frozen=True, slots=True)
class Aside:
    """Messages that the conversation does not go on with: other replies, and what was taken back.

    `after` is how many messages stand in front of them; `by` the member that wrote the reply alone, "" for the
    ensemble.
    """

    after: int
    messages: tuple[Message, ...]
    by: str = ""

    def same(self, other: "Aside") -> bool:
        """Whether it is the same text in the same place, whoever wrote it."""
        return (self.after, self.messages) == (other.after, other.messages)


class Chat:
    """Turns of a user and of an ensemble.

    `config` holds the settings of this conversation, which `set` changes; `system` its own system message, if it was
    given one; `messages` all turns, also those that no longer fit into a context; `dropped` counts the messages that
    the last reply no longer saw. `aside` has all else that was written: nothing is lost when a reply takes the place of
    another. The n-th reply of a conversation with a seed has the seed + n, from n = 0.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble
        self.config: Config = ensemble.config
        self.system: str | None = None
        self.messages: list[Message] = []
        self.aside: list[Aside] = []
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
        asked = self._asked()
        return Turn(self, asked, self._start(asked))

    def alone(self, member: int) -> "Turn":
        """What one member replies to the last message; stays beside the conversation.

        Raises InputError without a message, and where a router of its own decides who writes.
        """
        asked = self._asked()
        if self.config.router != "constant":
            raise InputError(f'a member cannot be asked alone where router = "{self.config.router}" decides who writes')
        weights = {name: float(i == member) for i, name in enumerate(self.ensemble.names)}
        config = override(self.config, Overrides(weights=weights))
        return Turn(self, asked, self._start(asked, config), self.ensemble.names[member])

    def edit(self, text: str) -> "Turn":
        """Ask this in place of the last message. Raises InputError without one, and as `say` does."""
        asked = [*self._asked()[:-1], Message("user", text)]
        check_conversation(asked)
        return Turn(self, asked, self._start(asked))

    def last_message(self) -> str:
        """What the user said last. Raises InputError where that is nothing yet."""
        return self._asked()[-1].content

    def undo(self) -> str:
        """Take back the last message with its reply, and return its text. Raises InputError without one."""
        text = self.last_message()
        self._cut(len(self._asked()) - 1)
        return text

    def replies(self) -> list[Aside]:
        """All replies to the last message, in the order in which they were written; none where it has none."""
        asked = self._asked()
        here = Aside(len(asked) - 1, (asked[-1], *self.messages[len(asked) :]))
        listed = [turn for turn in self.aside if turn.after == here.after and turn.messages[0] == asked[-1]]
        if len(here.messages) == 2 and not any(turn.same(here) for turn in listed):
            listed.append(here)
        return [turn for turn in listed if [message.role for message in turn.messages] == ["user", "assistant"]]

    def pick(self, number: int) -> Message:
        """Go on with the n-th of `replies`, from 1, and return it. Raises InputError when there is none."""
        listed = self.replies()
        if not 1 <= number <= len(listed):
            raise InputError(f"there is no reply {number}: the last message has {len(listed)}")
        question, reply = listed[number - 1].messages
        for turn in listed:
            _add(self.aside, turn)
        self.messages = [*self.messages[: listed[0].after], question, reply]
        return reply

    def clear(self) -> None:
        """Begin anew; the system message stays."""
        self._cut(0)

    def as_dict(self) -> dict[str, Any]:
        """The conversation as JSON can hold it."""
        return {"system": self.system, "messages": [as_dict(message) for message in self.messages]}

    def all_as_dict(self, turn: "Turn | None" = None) -> dict[str, Any]:
        """The same with what is aside, and with as much of a turn as is written."""
        messages, aside = (self.messages, self.aside) if turn is None else turn.kept()
        listed = [
            {"after": other.after, "messages": [as_dict(message) for message in other.messages]}
            | ({"by": other.by} if other.by else {})
            for other in aside
        ]
        return {"system": self.system, "messages": [as_dict(message) for message in messages], "aside": listed}

    def restore(self, saved: Any) -> None:
        """Take over a conversation from `as_dict`; one without a system message leaves this chat's as it is.

        Raises InputError when it is not one; nothing is changed then.
        """
        system, messages, aside = parse_saved(saved)
        if system is not None:
            self.set_system(system)
        self._cut(0)
        self.messages = messages
        for turn in aside:
            _add(self.aside, turn)

    def set_system(self, text: str | None) -> None:
        """Set the system message for all members; None removes it."""
        self.set(Overrides(system=text or ""))

    def _asked(self) -> list[Message]:
        """All up to the last message of the user. Raises InputError without one."""
        asked = self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages
        if not asked or asked[-1].role != "user":
            raise InputError("there is no message yet")
        return asked

    def _cut(self, start: int) -> None:
        """Put the messages from `start` on aside."""
        if self.messages[start:]:
            _add(self.aside, Aside(start, tuple(self.messages[start:])))
        self.messages = self.messages[:start]
        self.dropped = 0

    def _start(self, messages: list[Message], config: Config | None = None) -> ReplyStream:
        dropped, prompts = self._fitting(messages, config or self.config)
        if config is None:  # what fits into other members' contexts says nothing of the conversation
            self.dropped, config = dropped, self.config
        if config.seed is not None:
            config = override(config, Overrides(seed=config.seed + self._replies))
        self._replies += 1
        seen = visible(messages[dropped:], raw=False)
        return self.ensemble.start(config, prompts, prefill=True, shown=seen)

    def _fitting(self, messages: list[Message], config: Config) -> tuple[int, Prompts]:
        """How many of the oldest messages to leave out, and the prompts of the rest.

        As many as before while that leaves room to answer. Otherwise so many that half of each context is free: what
        is left out changes the beginning of the prompt, which then has to be evaluated again, and not in each turn.
        """
        prompts = self._with_room(messages[self.dropped :], config, lambda n_ctx: min(config.max_tokens, n_ctx // 4))
        if prompts is not None:
            return self.dropped, prompts
        starts = [i for i, m in enumerate(messages) if m.role == "user" and i > self.dropped] or [self.dropped]
        first = bisect_left(starts, True, hi=len(starts) - 1, key=lambda i: self._half_free(messages[i:], config))
        prompts = self.ensemble.prompter.prompts(messages[starts[first] :], config)
        self.ensemble.prompter.check_lengths([len(prompt) for prompt in prompts.ids], config)
        return starts[first], prompts

    def _half_free(self, messages: list[Message], config: Config) -> bool:
        return self._with_room(messages, config, lambda n_ctx: n_ctx // 2) is not None

    def _with_room(self, messages: list[Message], config: Config, room: Callable[[int], int]) -> Prompts | None:
        """The prompts; None where they leave too little room."""
        try:
            prompts = self.ensemble.prompter.prompts(messages, config)
        except PromptTooLongError:
            return None
        members = zip(self.ensemble.members, prompts.ids, self.ensemble.prompter.writing(config), strict=True)
        fits = all(len(prompt) + room(member.n_ctx) <= member.n_ctx for member, prompt, writes in members if writes)
        return prompts if fits else None


class Turn(Iterator[Step]):
    """A reply in a conversation, as a stream of steps.

    Once the stream ends, also by `cancel` or by a failure, message and reply belong to the conversation, or stand
    beside it where a member was asked alone (`by`). Where it was cut off before anything was written, the conversation
    stays as it was.
    """

    def __init__(self, chat: Chat, asked: list[Message], stream: ReplyStream, by: str = "") -> None:
        self._chat = chat
        self._asked = asked
        self._stream = stream
        self._by = by
        self._ended = False

    def __next__(self) -> Step:
        try:
            return next(self._stream)
        except BaseException:
            if not self._ended:
                self._chat.messages, self._chat.aside = self.kept()
                self._ended = True
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

    def kept(self) -> tuple[list[Message], list[Aside]]:
        """The conversation and what is aside, if the reply ended here."""
        reply, aside = self.reply, self._chat.aside.copy()
        if not reply.text and reply.finish_reason not in ("stop", "length"):
            return self._chat.messages, aside
        start, messages = len(self._asked) - 1, [*self._asked, Message("assistant", reply.answer, reply.thought)]
        written = Aside(start, tuple(messages[start:]), self._by)
        replaced = self._chat.messages[start:]
        if len(replaced) > 1:
            _add(aside, Aside(start, tuple(replaced)))
        if self._by:
            _add(aside, written)
            return self._chat.messages, aside
        if replaced[:1] == messages[start:-1]:  # another reply to the same message: in the order of writing
            _add(aside, written)
        return messages, aside


def _add(aside: list[Aside], turn: Aside) -> None:
    """Add what is not there yet."""
    if not any(turn.same(other) for other in aside):
        aside.append(turn)


def as_dict(message: Message) -> dict[str, str]:
    """A message as JSON can hold it, with the thought of a reply under the name that servers give it."""
    thought = {"reasoning_content": message.thought} if message.thought else {}
    return {"role": message.role, "content": message.content} | thought


def parse_saved(saved: Any) -> tuple[str | None, list[Message], list[Aside]]:
    """System message, messages, and what is aside, of a saved conversation. Raises InputError when it is none."""
    if not isinstance(saved, dict) or not isinstance(saved.get("system"), str | None):
        raise InputError('it is not a saved conversation: an object with "system" and "messages" is wanted')
    aside = saved.get("aside", [])
    if not isinstance(aside, list):
        raise InputError('"aside" must be a list of objects with "after" and "messages"')
    turns = [_parse_aside(entry, f"aside[{i}]") for i, entry in enumerate(aside)]
    messages = [] if "aside" in saved and saved.get("messages") == [] else parse_messages(saved.get("messages"))
    if any(message.role == "system" for message in messages):
        raise InputError('a system message stands in "messages"; it belongs into "system"')
    return saved.get("system"), messages, turns


def _parse_aside(entry: Any, where: str) -> Aside:
    if not isinstance(entry, dict) or type(entry.get("after")) is not int or not isinstance(entry.get("by", ""), str):
        raise InputError(f'{where}: must be an object with a number as "after" and a list as "messages"')
    try:
        return Aside(entry["after"], tuple(parse_messages(entry.get("messages"))), entry.get("by", ""))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


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
