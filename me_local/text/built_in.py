"""llama.cpp's built-in chat templates, by their names there."""

import ctypes
from collections.abc import Sequence

import llama_cpp

from me_local.errors import ConfigError


def render_built_in(template: str, messages: Sequence[tuple[str, str]]) -> str:
    """Render (role, content) pairs by one of llama.cpp's built-in chat templates, up to where the reply starts.

    Contents must not hold NUL characters. Raises ConfigError when there is no template of this name.
    """
    chat = (llama_cpp.llama_chat_message * len(messages))(
        *[llama_cpp.llama_chat_message(role.encode(), content.encode()) for role, content in messages]
    )
    size = 0
    while True:
        buffer = ctypes.create_string_buffer(size) if size else None
        needed = llama_cpp.llama_chat_apply_template(template.encode(), chat, len(messages), True, buffer, size)
        if needed < 0:
            raise ConfigError(f'chat_template = "{template}": llama.cpp has no built-in template of this name')
        if buffer is not None and needed <= size:
            return buffer.raw[:needed].decode()
        size = needed + 1
