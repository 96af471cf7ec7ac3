"""What clients of OpenAI's responses get: a reply as a response, whole or as events.

Made from the answers that conversations get.
"""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from me_local.decoding.reply import Reply, Step
from me_local.jsonl import json_text
from me_local.server.answers import Answer, Object
from me_local.server.protocol import ChatRequest
from me_local.server.refusals import ApiError
from me_local.server.responses_protocol import ResponsesRequest


class ResponseAnswer:
    """The objects of one answer."""

    def __init__(self, request: ResponsesRequest, chat: ChatRequest) -> None:
        self._answer = Answer(request.model, chat=True, logprobs=False, n=1, tools=chat.may_call)
        self._described = _described(request)
        self._output: list[Object] = []  # items, the last of which may be open
        self._open = False
        self._events = 0

    def whole(self, reply: Reply) -> Object:
        """The answer in one piece."""
        answer = self._answer.whole([reply])
        message = answer["choices"][0]["message"]
        calls = [_call(call) for call in message.get("tool_calls") or []]
        if thought := message.get("reasoning_content"):
            self._output.append(_reasoning(thought))
        if message["content"] or not (calls or thought):
            self._output.append(_message(message["content"] or ""))
        self._output += calls
        return self._ended(answer)

    def opening(self) -> Iterator[str]:
        """The events before the first piece."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def waiting(self) -> str:
        """A comment, which clients pass over."""
        return ": waiting\n\n"

    def piece(self, step: Step) -> Iterator[str]:
        """The events of one piece."""
        for chunk in self._answer.pieces(0, step, 0):
            yield from self._told(chunk["choices"][0]["delta"])

    def end(self, reply: Reply) -> Iterator[str]:
        """The last events."""
        answer = self._answer.end(0, reply)
        yield from self._told(answer["choices"][0]["delta"])
        if not self._output:
            yield from self._begin_text("message")
        yield from self._end_text()
        response = self._ended(answer | self._answer.total([reply]) | {"choices": answer["choices"]})
        yield self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ApiError) -> Iterator[str]:
        """The events after an error."""
        told = {"code": error.code or error.as_dict()["error"]["type"], "message": error.message}
        yield self._event("response.failed", response=self._response("failed") | {"error": told})

    def _told(self, delta: Object) -> Iterator[str]:
        if thought := delta.get("reasoning_content"):
            yield from self._add("reasoning", thought)
        if text := delta.get("content"):
            yield from self._add("message", text)
        for call in delta.get("tool_calls", ()):
            yield from self._end_text()
            yield from self._called(_call(call))

    def _called(self, item: Object) -> Iterator[str]:
        index, arguments = len(self._output), item["arguments"]
        self._output.append(item)
        begun = item | {"arguments": "", "status": "in_progress"}
        place = {"output_index": index, "item_id": item["id"]}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _add(self, kind: str, text: str) -> Iterator[str]:
        """More text of a message, or of the thought in front of it."""
        if not self._open or self._output[-1]["type"] != kind:
            yield from self._end_text()
            yield from self._begin_text(kind)
        part = self._output[-1]["content"][0]
        part["text"] += text
        yield self._event(f"response.{part['type']}.delta", **self._place(), delta=text, **_logprobs(part))

    def _begin_text(self, kind: str) -> Iterator[str]:
        self._open = True
        item = _reasoning("") if kind == "reasoning" else _message("")
        self._output.append(item | {"status": "in_progress"})
        index = len(self._output) - 1
        yield self._event("response.output_item.added", output_index=index, item=self._output[-1] | {"content": []})
        yield self._event("response.content_part.added", **self._place(), part=self._output[-1]["content"][0])

    def _end_text(self) -> Iterator[str]:
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        item["status"] = "completed"
        [part] = item["content"]
        yield self._event(f"response.{part['type']}.done", **self._place(), text=part["text"], **_logprobs(part))
        yield self._event("response.content_part.done", **self._place(), part=part)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _place(self) -> Object:
        """Where the text of the item that was begun last stands."""
        return {"output_index": len(self._output) - 1, "content_index": 0, "item_id": self._output[-1]["id"]}

    def _ended(self, answer: Object) -> Object:
        cut = answer["choices"][0]["finish_reason"] == "length"
        if cut and self._output[-1]["type"] != "function_call":
            self._output[-1]["status"] = "incomplete"
        return self._response("incomplete" if cut else "completed") | {
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": _usage(answer["usage"]),
            "seed": answer["choices"][0]["seed"],
            "timings": answer["timings"],
        }

    def _response(self, status: str) -> Object:
        return self._described | {"status": status, "output": self._output}

    def _event(self, kind: str, **fields: Any) -> str:
        data = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return f"event: {kind}\ndata: {json_text(data, compact=True)}\n\n"


def _described(request: ResponsesRequest) -> Object:
    """What a response says of its request."""
    given = request.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": request.model,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "temperature": request.temperature,
        "text": given.get("text") or {"format": {"type": "text"}},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": [{"strict": True} | tool for tool in given.get("tools", [])],
        "top_p": request.top_p,
        "truncation": "disabled",
        "background": False,
        "previous_response_id": None,
        "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
        "store": False,
        "usage": None,
        "user": None,
    }


def _message(text: str) -> Object:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


def _reasoning(thought: str) -> Object:
    part = {"type": "reasoning_text", "text": thought}
    fixed = {"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "status": "completed", "summary": []}
    return fixed | {"content": [part]}


def _logprobs(part: Object) -> Object:
    """What the events of a part have besides its text."""
    return {name: value for name, value in part.items() if name == "logprobs"}


def _call(call: Object) -> Object:
    return {
        "id": f"fc_{secrets.token_hex(12)}",
        "type": "function_call",
        "status": "completed",
        "call_id": call["id"],
        **call["function"],
    }


def _usage(usage: Object) -> Object:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
