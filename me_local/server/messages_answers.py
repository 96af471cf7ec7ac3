"""What Anthropic's clients get: a reply as a message, whole or as events.

Made from the answers that OpenAI's clients get. `usage` counts the whole prompt as input, whatever was cached.
"""

import json
import secrets
from collections.abc import Iterator
from typing import Any

from me_local.decoding.reply import Reply, Step
from me_local.jsonl import json_text
from me_local.server.answers import Answer, Object
from me_local.server.messages_protocol import THREADS, MessagesRequest
from me_local.server.protocol import ChatRequest
from me_local.server.refusals import ApiError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_REASONS = {"tool_calls": "tool_use", "length": "max_tokens"}


def error_dict(error: ApiError) -> Object:
    """An error in Anthropic's shape."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    # By these words clients know that the conversation has to become shorter.
    long = "prompt is too long: " if error.code == "context_length_exceeded" else ""
    told: Object = {"type": kind, "message": long + error.message}
    if error.code == THREADS:
        told["details"] = {"error_code": THREADS, "unsupported": ["thread"]}
    return {"type": "error", "error": told}


class MessageAnswer:
    """The objects of one answer; `prompt_tokens` is what a stream says of its prompt before there is a reply."""

    def __init__(self, request: MessagesRequest, chat: ChatRequest, prompt_tokens: int = 0) -> None:
        self._answer = Answer(request.model, chat=True, logprobs=False, n=1, tools=chat.may_call)
        self._stops = chat.stop or []
        self._model = request.model
        self._id = f"msg_{secrets.token_hex(12)}"
        self._prompt_tokens = prompt_tokens
        self._blocks = 0  # that were opened
        self._open: str | None = None  # the kind of the block that is

    def whole(self, reply: Reply) -> Object:
        """The answer in one piece."""
        answer = self._answer.whole([reply])
        message = answer["choices"][0]["message"]
        calls = message.get("tool_calls") or []
        content: list[Object] = [_use(call, json.loads(call["function"]["arguments"])) for call in calls]
        thought = message.get("reasoning_content")
        if message["content"] or not (calls or thought):
            content.insert(0, {"type": "text", "text": message["content"] or ""})
        if thought:
            content.insert(0, _thinking(thought))
        usage = answer["usage"]
        return (
            self._message(content, usage["prompt_tokens"], usage["completion_tokens"])
            | self._ending(answer["choices"][0]["finish_reason"], reply)
            | {"seed": reply.seed, "timings": answer["timings"]}
        )

    def opening(self) -> Iterator[str]:
        """The events before the first piece."""
        yield _event("message_start", {"message": self._message([], self._prompt_tokens, 0)})

    def waiting(self) -> str:
        """The event that says that there is nothing to say yet."""
        return _event("ping", {})

    def piece(self, step: Step) -> Iterator[str]:
        """The events of one piece."""
        for chunk in self._answer.pieces(0, step, 0):
            yield from self._told(chunk["choices"][0]["delta"])

    def end(self, reply: Reply) -> Iterator[str]:
        """The last events."""
        choice = self._answer.end(0, reply)["choices"][0]
        yield from self._told(choice["delta"])
        if not self._blocks:
            yield from self._begin({"type": "text", "text": ""})
        yield from self._close()
        counted = self._answer.total([reply])["usage"]
        usage = _usage(counted["prompt_tokens"], counted["completion_tokens"])
        yield _event("message_delta", {"delta": self._ending(choice["finish_reason"], reply), "usage": usage})
        yield _event("message_stop", {})

    def failure(self, error: ApiError) -> Iterator[str]:
        """The events after an error."""
        yield _event("error", error_dict(error))

    def _told(self, delta: Object) -> Iterator[str]:
        if thought := delta.get("reasoning_content"):
            if self._open != "thinking":
                yield from self._begin(_thinking(""))
            yield self._delta({"type": "thinking_delta", "thinking": thought})
        if text := delta.get("content"):
            if self._open != "text":
                yield from self._begin({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": text})
        for call in delta.get("tool_calls", ()):
            yield from self._begin(_use(call, {}))
            yield self._delta({"type": "input_json_delta", "partial_json": call["function"]["arguments"]})

    def _begin(self, block: Object) -> Iterator[str]:
        yield from self._close()
        self._open = block["type"]
        self._blocks += 1
        yield _event("content_block_start", {"index": self._blocks - 1, "content_block": block})

    def _delta(self, delta: Object) -> str:
        return _event("content_block_delta", {"index": self._blocks - 1, "delta": delta})

    def _close(self) -> Iterator[str]:
        if self._open:
            yield _event("content_block_stop", {"index": self._blocks - 1})
        self._open = None

    def _message(self, content: list[Object], prompt: int, pieces: int) -> Object:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(prompt, pieces),
        }

    def _ending(self, reason: str, reply: Reply) -> Object:
        if reason == "stop" and reply.stop in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": reply.stop}
        return {"stop_reason": _REASONS.get(reason, "end_turn"), "stop_sequence": None}


def _thinking(thought: str) -> Object:
    """A thought, which nobody signs: it is taken back as it is."""
    return {"type": "thinking", "thinking": thought, "signature": ""}


def _use(call: Object, arguments: Any) -> Object:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments}


def _usage(prompt: int, pieces: int) -> Object:
    return {
        "input_tokens": prompt,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": pieces,
    }


def _event(name: str, data: Object) -> str:
    return f"event: {name}\ndata: {json_text({'type': name} | data, compact=True)}\n\n"
