"""What tokenises a text: a GGUF's own tokenizer by llama.cpp, or a `tokenizer.json` by the tokenizers library.

Knows nothing of what stands before a text; see `vocabulary`.
"""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
from tokenizers import Tokenizer

from me_local.errors import InputError, LoadError, RunError
from me_local.system.inflight import InFlight

Encoder = Callable[[bytes], list[int]]
"""Gives the ids of a text, which is UTF-8; nothing in it becomes a control token."""

_SHORT = 64  # tokens
_LONG = 8192  # bytes
_FRAME = 1024  # bytes of stack for each byte of text; llama.cpp takes about 300


def llama_encoder(pointer: llama_cpp.llama_vocab_p, in_flight: InFlight) -> Encoder:
    """The tokenizer of a GGUF. Raises RunError once its model is freed."""

    def tokenize(text: bytes) -> list[int]:
        size = max(_SHORT, len(text) + 8)
        buffer = (llama_cpp.llama_token * size)()
        length = llama_cpp.llama_tokenize(pointer, text, len(text), buffer, size, False, False)
        if length < 0:
            buffer = (llama_cpp.llama_token * -length)()
            length = llama_cpp.llama_tokenize(pointer, text, len(text), buffer, -length, False, False)
        return list(buffer[:length])

    def held(text: bytes) -> list[int]:
        with in_flight.use():
            in_flight.require_open()
            return tokenize(text)

    def encode(text: bytes) -> list[int]:
        return held(text) if len(text) <= _LONG else _on_a_deep_stack(held, text)

    return encode


_stack_size_lock = threading.Lock()


def _on_a_deep_stack(encode: Encoder, text: bytes) -> list[int]:
    """Tokenise a long text in a thread of its own, with a stack that is large enough.

    For some vocabularies (DeepSeek, GPT-NeoX, Aquila, ...) llama.cpp splits texts with std::regex, which recurses once
    for each character of a match: a run of 25,000 letters overflows an ordinary stack, and that ends the process.
    Only the part of the stack that is used takes memory. Raises InputError where the system refuses the stack.
    """
    with ThreadPoolExecutor(1) as pool:
        with _stack_size_lock:
            before = threading.stack_size((len(text) * _FRAME // 4096 + 1) * 4096)
            try:
                ids = pool.submit(encode, text)
            except RuntimeError:
                raise InputError(f"a text of {len(text):,} bytes is too long: no memory to tokenise it in") from None
            finally:
                threading.stack_size(before)
        return ids.result()


def read_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json`, set so that a text stays text. Raises LoadError that begins with the path."""
    if path.exists() and not path.is_file():  # a device may have no end
        raise LoadError(f"{path}: not a regular file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise LoadError(f"{path}: not a tokenizer.json that the tokenizers library can read: {error}") from None
    tokenizer.encode_special_tokens = True  # a control token in a text stays text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def digest(path: Path | None) -> bytes | None:
    """Tells one `tokenizer.json` from another; None where there is none."""
    return hashlib.sha256(path.read_bytes()).digest() if path else None


def closed(reason: str) -> Encoder:
    """Stands for the tokenizer of a model that is freed, and raises RunError."""

    def encode(_: bytes) -> list[int]:
        raise RunError(reason)

    return encode
