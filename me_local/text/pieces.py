"""What llama.cpp knows of the tokens of a vocabulary, read for all of them at once.

A call from Python for each token would take longer than loading a small model. Knows nothing of tokenising.
"""

import ctypes
from collections.abc import Callable
from functools import partial

import llama_cpp
import numpy as np

_FIRST = 1024  # ids, among which vocabularies have their bytes
_BLOCK = 512  # tokens
_TOKENS = ctypes.POINTER(llama_cpp.llama_token)
_MARKS = frozenset([b"\x0e", b"\x10", b"\x1e", b"\xff"])
"""Bytes that hardly ever stand in a longer token."""


def read_pieces(pointer: llama_cpp.llama_vocab_p) -> list[bytes]:
    """The bytes of each token, empty for control tokens and the like."""
    tokens = range(llama_cpp.llama_vocab_n_tokens(pointer))
    mark = next((token for token in tokens[:_FIRST] if _piece(pointer, token) in _MARKS), None)
    pieces: list[bytes] = []
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        together = None if mark is None else _read_block(pointer, mark, block)
        pieces += together or [_piece(pointer, token) for token in block]
    return pieces


def find_end_ids(
    model: llama_cpp.llama_model_p, empty: list[int], header: Callable[[bytes], bytes] | None = None
) -> list[int]:
    """The ids that end a generation, in order; `empty` has those of tokens without a piece.

    llama.cpp makes a control token, which has no piece, of each that it knows by its name; all others are named in
    the header (llama-vocab.cpp, special_eog_ids), which `header` reads.
    """
    pointer = llama_cpp.llama_model_get_vocab(model)
    named = [read(pointer) for read in _NAMED_ENDS]
    candidates = {*empty, *named, _end_of_message(header or partial(header_value, model))} - {
        llama_cpp.LLAMA_TOKEN_NULL
    }
    return sorted(token for token in candidates if llama_cpp.llama_vocab_is_eog(pointer, token))


def suppressed(pointer: llama_cpp.llama_vocab_p) -> list[int]:
    """The ids that the model itself says are never to be sampled."""
    count = ctypes.c_int32()
    tokens = llama_cpp.llama_vocab_get_suppress_tokens(pointer, ctypes.byref(count))
    return list(tokens[: count.value]) if count.value else []


def header_value(model: llama_cpp.llama_model_p, key: bytes) -> bytes:
    """A short value of the header, as text; empty where there is none."""
    buffer = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_meta_val_str(model, key, buffer, len(buffer))
    return buffer.value


_NAMED_ENDS = (
    llama_cpp.llama_vocab_eos,
    llama_cpp.llama_vocab_eot,
    llama_cpp.llama_vocab_fim_pad,
    llama_cpp.llama_vocab_fim_rep,
    llama_cpp.llama_vocab_fim_sep,
)


def _end_of_message(header: Callable[[bytes], bytes]) -> int:
    """The one such id that no function tells; -1 where there is none."""
    return int(header(b"tokenizer.ggml.eom_token_id") or -1)


def _read_block(pointer: llama_cpp.llama_vocab_p, mark: int, block: range) -> list[bytes] | None:
    """The pieces of some tokens, rendered as one text with a mark around each.

    None where the mark stands in one of them, or where llama.cpp drops spaces from the text, as it does in front of
    punctuation for some vocabularies.
    """
    ids = np.full(2 * len(block) + 1, mark, dtype=np.int32)
    ids[1::2] = block
    array = ids.ctypes.data_as(_TOKENS)
    # Without room for the text llama.cpp answers with its length before any space is dropped.
    length: int = -llama_cpp.llama_detokenize(pointer, array, len(ids), _BUFFER, 0, False, False)
    text = ctypes.create_string_buffer(length)
    if llama_cpp.llama_detokenize(pointer, array, len(ids), text, length, False, False) != length:
        return None
    pieces = text.raw.split(_piece(pointer, mark))
    return pieces[1:-1] if len(pieces) == len(block) + 2 else None


_BUFFER = ctypes.create_string_buffer(256)


def _piece(pointer: llama_cpp.llama_vocab_p, token: int) -> bytes:
    """The bytes of a token (llama.cpp's wrappers stop at 32 of them)."""
    length = llama_cpp.llama_token_to_piece(pointer, token, _BUFFER, len(_BUFFER), 0, False)
    if length >= 0:
        return _BUFFER.raw[:length]
    buffer = ctypes.create_string_buffer(-length)
    length = llama_cpp.llama_token_to_piece(pointer, token, buffer, -length, 0, False)
    return buffer.raw[:length]
