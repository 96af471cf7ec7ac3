"""The real vocabularies that scripts/fetch_vocabularies.py keeps: which there are, and how to load one.

Knows nothing of what is done with them.
"""

import ctypes
import functools

import llama_cpp
from fetch_vocabularies import folder

from me_local.text.vocabulary import Vocabulary

NAMES = (
    "aquila",
    "baichuan",
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "gpt-neox",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
)
"""Those of models that generate text."""

EMBEDDING = {
    "bert-bge": "WPM of an embedding model: it lowers case and drops accents and spaces, so ids do not give text back",
    "nomic-bert-moe": "UGM of an embedding model: it normalises characters and merges spaces, likewise",
}
"""Those that cannot be a member's, and why."""


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Drop what llama.cpp reports about files that it opens for their vocabulary alone."""


@functools.cache
def open_model(name: str) -> llama_cpp.llama_model_p:
    """Open a file for its vocabulary alone; it stays open until the process ends."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    path = folder() / f"ggml-vocab-{name}.gguf"
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"{path} cannot be loaded"
    return model


@functools.cache
def vocabulary(name: str) -> Vocabulary:
    """Read the vocabulary of this name."""
    return Vocabulary(open_model(name))
