"""Read the vocabularies without weights that llama.cpp's sources carry (``models/ggml-vocab-*.gguf``).

Knows the metadata part of a GGUF file and nothing of tensors. The gguf package has a reader too; it makes an array
of every single token and takes several seconds for a large vocabulary, this one a fraction of one.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, TokenType
from gguf.gguf_writer import GGUFValue

Metadata = dict[str, GGUFValue]


class VocabularyError(Exception):
    """A vocabulary cannot be used; the message is one line for the user."""


class Cursor:
    """A place in the bytes of a GGUF file, from which values are read one after the other."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def numbers(self, of: GGUFValueType, count: int) -> list[Any]:
        """Read numbers or truth values."""
        dtype = np.dtype(GGUFReader.gguf_scalar_to_np[of]).newbyteorder("<")
        found = np.frombuffer(self.data, dtype, count, self.at)
        self.at += found.nbytes
        return found.tolist()

    def string(self) -> bytes:
        """Read a text, in UTF-8 as it is stored."""
        (size,) = struct.unpack_from("<Q", self.data, self.at)
        start = self.at + 8
        self.at = start + size
        if self.at > len(self.data):
            raise ValueError("a text ends beyond the file")
        return self.data[start : self.at]

    def value(self) -> GGUFValue:
        """Read a type and a value of it."""
        of = GGUFValueType(self.numbers(GGUFValueType.UINT32, 1)[0])
        if of is GGUFValueType.STRING:
            return GGUFValue(self.string(), of)
        if of is not GGUFValueType.ARRAY:
            return GGUFValue(self.numbers(of, 1)[0], of)
        item, count = GGUFValueType(self.numbers(GGUFValueType.UINT32, 1)[0]), self.numbers(GGUFValueType.UINT64, 1)[0]
        if item is GGUFValueType.STRING:
            return GGUFValue([self.string() for _ in range(count)], of, item)
        return GGUFValue(self.numbers(item, count), of, item)


def read_metadata(path: Path) -> Metadata:
    """Read all keys of a GGUF file with their values; texts stay bytes.

    Raises VocabularyError where the file is missing, damaged or no GGUF file.
    """
    try:
        cursor = Cursor(path.read_bytes())
    except OSError as e:
        raise VocabularyError(f"cannot read {path}: {e.strerror}") from e
    try:
        magic, _, _, count = struct.unpack_from("<4sIQQ", cursor.data)
        if magic != b"GGUF":
            raise ValueError("no GGUF file")
        cursor.at = 24
        return {cursor.string().decode(): cursor.value() for _ in range(count)}
    except (struct.error, ValueError, KeyError) as e:
        raise VocabularyError(f"{path} is damaged or no GGUF file: {e}") from e


def read_vocabulary(path: Path, *, size: int, added: tuple[str, ...] = ()) -> Metadata:
    """Read a tokenizer's keys, with ``added`` control tokens and then unused ones up to ``size`` tokens.

    The first of ``added`` becomes the end of a sequence. Raises VocabularyError where the file does not do.
    """
    metadata = {key: value for key, value in read_metadata(path).items() if key.startswith("tokenizer.")}
    missing = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"} - metadata.keys()
    if missing:
        raise VocabularyError(f"{path} has no {' and no '.join(sorted(missing))}")
    tokens, types = metadata["tokenizer.ggml.tokens"].value, metadata["tokenizer.ggml.token_type"].value
    if len(tokens) + len(added) > size:
        raise VocabularyError(
            f"{path} has {len(tokens):,} tokens; with {len(added)} more the model has room for {size:,}"
        )
    if added:
        metadata["tokenizer.ggml.eos_token_id"] = GGUFValue(len(tokens), GGUFValueType.UINT32)
    tokens += [text.encode() for text in added]
    types += [int(TokenType.CONTROL)] * len(added)
    tokens += [padding(i) for i in range(len(tokens), size)]
    # The stored vocabularies call their padding user-defined; llama.cpp's converter now calls it unused, and so do we:
    # a model never says it.
    types += [0] * (size - len(types))
    types[:] = [int(TokenType.UNUSED) if text == padding(i) else types[i] for i, text in enumerate(tokens)]
    if "tokenizer.ggml.scores" in metadata:
        scores = metadata["tokenizer.ggml.scores"].value
        scores += [-1000.0] * (size - len(scores))  # as the converter does
    return metadata


def padding(token: int) -> bytes:
    """Give the text that llama.cpp's converter gives to a token without one."""
    return b"[PAD%d]" % token
