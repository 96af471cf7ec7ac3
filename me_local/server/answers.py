"""What clients get: replies in OpenAI's shapes, whole or in chunks, with me-local's extensions.

Extensions: each chunk's choice has the piece's `member`, `probability` and `shares`; the end of a choice its `seed`
and `timings`, those of llama-server among them, with the tokens of all members together. What a constraint forced has
the member "" and no shares. `usage` counts prompt tokens as the member does that has most of them, and pieces as
completion tokens. Thoughts are `reasoning_content`, as llama-server and vLLM have them; `logprobs` are those of the
answer's pieces.
"""

import codecs
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from me_local.decoding.reply import MemberUsage, Reply, Step, first_of_answer
from me_local.echoes import Echo
from me_local.server.tools import Splitter

Object = dict[str, Any]

_LEAST = -9999.0
"""What OpenAI gives for the logarithm of 0: JSON has no minus infinity."""


@dataclass(slots=True)
class _Streamed:
    """What was told of a choice so far: the `calls` in it, and the pieces `before` its answer, until that begins."""

    calls: Splitter = field(default_factory=Splitter)
    before: list[Step] | None = field(default_factory=list)
    last: str = "content"  # the field of a delta that had some text

    def of_answer(self, step: Step) -> Sequence[Step]:
        """The pieces that are known to be the answer's with this one."""
        if self.before is None:
            return [step]
        self.before.append(step)
        if not step.answer:
            return []
        steps, self.before = self.before[first_of_answer(self.before) :], None
        return steps


class Answer:
    """The objects of one answer.

    `chat` tells a conversation from a completion, `logprobs` whether they are wanted, `tools` whether calls of tools
    are looked for, `apart` whether thoughts are told apart; `n` is the number of replies to each prompt; `fingerprint`
    that of the ensemble.
    """

    def __init__(
        self,
        model: str,
        *,
        chat: bool,
        logprobs: bool,
        n: int,
        tools: bool = False,
        apart: bool = True,
        fingerprint: str | None = None,
    ) -> None:
        self._tools = tools
        self._streamed: dict[int, _Streamed] = {}  # by the choice
        self._echoed: dict[int, int] = {}  # the lengths of prompts in front of streamed choices, in characters
        self._chat = chat
        self._apart = chat and apart
        self._logprobs = logprobs
        self._n = n  # replies to each prompt
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._model = model
        self._fingerprint = fingerprint
        self._created = int(time.time())

    def whole(self, replies: Sequence[Reply], echoes: Mapping[int, Echo] = MappingProxyType({})) -> Object:
        """The answer in one piece, with the echoes of prompts by the indices of the choices."""
        choices = [self._choice(index, reply, echoes.get(index)) for index, reply in enumerate(replies)]
        kind = "chat.completion" if self._chat else "text_completion"
        return self._object(kind, choices) | {"usage": self._usage(replies), "timings": timings(replies)}

    def opening(self, index: int) -> Object:
        """The chunk before the first piece of a choice of a conversation: the speaker."""
        return self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def echo(self, index: int, echo: Echo) -> Object:
        """The chunk of a prompt that is told in front of its completion."""
        choice: Object = {"index": index, "text": echo.text, "finish_reason": None}
        self._echoed[index] = len(echo.text)
        if self._logprobs:
            choice["logprobs"] = _echo_logprobs(echo)
        return self._chunk([choice])

    def pieces(self, index: int, step: Step, offset: int) -> Iterator[Object]:
        """The chunks of one piece, which stands at this character of the reply.

        Where a call may begin with it there are none, but for its logprobs.
        """
        streamed = self._streamed.setdefault(index, _Streamed())
        content, calls = step.answer if self._apart else step.text, list[Object]()
        if self._tools:
            first = len(streamed.calls.calls)
            content, found = streamed.calls.push(step.answer)
            calls = [{"index": number, **call.as_dict()} for number, call in enumerate(found, start=first)]
        if content or step.thought or self._logprobs or not self._tools:
            yield self._piece(index, step, content, offset)
        for call in calls:
            yield self._chunk([{"index": index, "delta": {"tool_calls": [call]}, "finish_reason": None}])

    def _piece(self, index: int, step: Step, content: str, offset: int) -> Object:
        streamed = self._streamed[index]
        choice: Object = {"index": index, **self._content(streamed, step, content), "finish_reason": None}
        if self._logprobs:
            choice["logprobs"] = self._listed(streamed.of_answer(step) if self._apart else [step], offset)
        choice |= {"member": step.member, "probability": step.probability, "shares": list(step.shares)}
        return self._chunk([choice])

    def _content(self, streamed: _Streamed, step: Step, content: str) -> Object:
        if not self._chat:
            return {"text": content}
        delta = _delta(step.thought if self._apart else "", content)
        streamed.last = next(reversed(delta), streamed.last)
        return {"delta": delta or {streamed.last: ""}}

    def end(self, index: int, reply: Reply) -> Object:
        """The last chunk of a choice."""
        streamed = self._streamed.setdefault(index, _Streamed())
        content: Object = {"text": ""}
        if self._chat:
            thought, answer = reply.rest if self._apart else ("", "")
            if self._tools:
                answer = streamed.calls.push(answer)[0] + streamed.calls.flush()
            content = {"delta": _delta(thought, answer)}
            if self._logprobs and self._apart and streamed.before and answer:
                held = streamed.before[first_of_answer(streamed.before, answer) :]
                content["logprobs"] = self._listed(held, 0)
        if self._logprobs and index in self._echoed:
            content["logprobs"] = _end_logprobs(reply, self._echoed[index] + len(reply.text))
        return self._chunk([{"index": index, **content, **_end(reply, streamed.calls), "timings": timings([reply])}])

    def total(self, replies: Sequence[Reply]) -> Object:
        """The chunk after all choices: the usage."""
        return self._chunk([]) | {"usage": self._usage(replies), "timings": timings(replies)}

    def _choice(self, index: int, reply: Reply, echo: Echo | None) -> Object:
        content: Object = {"text": echo.text + reply.text if echo else reply.text}
        steps: Sequence[Step] = reply.steps
        splitter = Splitter()
        if self._chat:
            text = reply.answer if self._apart else reply.text
            if self._tools:
                text = splitter.push(text)[0] + splitter.flush()
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        if self._apart:
            steps = steps[first_of_answer(steps, reply.rest.answer) :]
            content["message"] |= {"reasoning_content": reply.thought} if reply.thought else {}
        if splitter.calls:
            calls = [call.as_dict() for call in splitter.calls]
            content["message"] |= {"content": content["message"]["content"] or None, "tool_calls": calls}
        listed = self._listed(steps, len(echo.text) if echo else 0) if self._logprobs else None
        if listed and echo:
            listed = _joined(_echo_logprobs(echo), listed, _end_logprobs(reply, len(content["text"])))
        return {"index": index, **content, "logprobs": listed, **_end(reply, splitter)}

    def _listed(self, steps: Iterable[Step], offset: int) -> Object:
        return _chat_logprobs(steps) if self._chat else _text_logprobs(steps, offset)

    def _chunk(self, choices: list[Object]) -> Object:
        return self._object("chat.completion.chunk" if self._chat else "text_completion", choices)

    def _object(self, kind: str, choices: list[Object]) -> Object:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }

    def _usage(self, replies: Sequence[Reply]) -> Object:
        """Each prompt counts once, however many replies it got; what was cached, as the first of them found it."""
        longest = [_longest(reply) for reply in replies[:: self._n]]
        prompt = sum(usage.prompt_length for usage in longest)
        pieces = sum(len(reply.steps) for reply in replies)
        cached = sum(usage.prompt_cached for usage in longest)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": pieces,
            "total_tokens": prompt + pieces,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(reply.thought_pieces for reply in replies)},
        }


def timings(replies: Sequence[Reply]) -> Object:
    """Seconds and tokens of all replies together, and what each member did; the same under llama-server's names."""
    seconds, prompt = sum(r.seconds for r in replies), sum(r.prompt_seconds for r in replies)
    pieces = sum(len(reply.steps) for reply in replies)
    usages = [usage for reply in replies for usage in reply.usage]
    return {
        "seconds": seconds,
        "prompt_seconds": prompt,
        "decode_seconds": sum(reply.decode_seconds for reply in replies),
        "pieces_per_second": pieces / (seconds - prompt) if seconds > prompt else 0.0,
        "cache_n": sum(usage.prompt_cached for usage in usages),
        **_timed("prompt", sum(usage.prompt_evaluated for usage in usages), prompt),
        **_timed("predicted", pieces, max(0.0, seconds - prompt)),
        "members": [_work(each) for each in zip(*[reply.usage for reply in replies], strict=True)],
    }


def _timed(what: str, count: int, seconds: float) -> Object:
    return {
        f"{what}_n": count,
        f"{what}_ms": seconds * 1000,
        f"{what}_per_token_ms": seconds * 1000 / count if count else 0.0,
        f"{what}_per_second": count / seconds if seconds else 0.0,
    }


def _work(usages: Sequence[MemberUsage]) -> Object:
    return {
        "member": usages[0].member,
        "pieces": sum(usage.pieces for usage in usages),
        "calls": sum(usage.calls for usage in usages),
        "prompt_tokens": sum(usage.prompt_length for usage in usages if usage.calls),
        "prompt_evaluated": sum(usage.prompt_evaluated for usage in usages),
        "text_evaluated": sum(usage.text_evaluated for usage in usages),
    }


def _longest(reply: Reply) -> MemberUsage:
    """The usage of the member with the longest prompt, of those with a weight: whichever were drawn."""
    return max(reply.usage, key=lambda usage: (usage.weight > 0, usage.prompt_length))


def _end(reply: Reply, splitter: Splitter) -> Object:
    calls = splitter.calls and reply.finish_reason == "stop"
    return {"finish_reason": "tool_calls" if calls else reply.finish_reason, "seed": reply.seed}


def _delta(thought: str, content: str) -> Object:
    parts = {"reasoning_content": thought, "content": content}
    return {name: text for name, text in parts.items() if text}


def _chat_logprobs(steps: Iterable[Step]) -> Object:
    def entry(piece: bytes, probability: float) -> Object:
        return {"token": _text(piece), "logprob": _log(probability), "bytes": list(piece)}

    content = [
        entry(step.piece, step.probability) | {"top_logprobs": [entry(*likely) for likely in step.top]}
        for step in steps
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(steps: Iterable[Step], offset: int) -> Object:
    listed = _no_logprobs()
    for step in steps:
        listed["tokens"].append(_text(step.piece))
        listed["token_logprobs"].append(_log(step.probability))
        listed["top_logprobs"].append({_text(piece): _log(p) for piece, p in reversed(step.top)})
        listed["text_offset"].append(offset)
        offset += len(step.text)
    return listed


def _echo_logprobs(echo: Echo) -> Object:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    listed = _no_logprobs()
    offset = 0
    for unit in echo.units:
        top = None if unit.top is None else {_text(piece): _finite(log) for piece, log in reversed(unit.top)}
        listed["tokens"].append(_text(unit.piece))
        listed["token_logprobs"].append(None if unit.log_probability is None else _finite(unit.log_probability))
        listed["top_logprobs"].append(top)
        listed["text_offset"].append(offset)
        offset += len(decoder.decode(unit.piece))
    return listed


def _end_logprobs(reply: Reply, offset: int) -> Object:
    """The end of generation, which stands in the list behind an echo: clients count the entries from the end."""
    listed = _no_logprobs()
    if reply.finish_reason == "stop":
        entry = "", None if reply.end is None else _log(reply.end), None, offset
        for entries, value in zip(listed.values(), entry, strict=True):
            entries.append(value)
    return listed


def _no_logprobs() -> Object:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _joined(*lists: Object) -> Object:
    return {key: [entry for listed in lists for entry in listed[key]] for key in lists[0]}


def _finite(log: float) -> float:
    return max(log, _LEAST)


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else _LEAST


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
