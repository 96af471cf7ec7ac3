"""What a member's context takes up in memory.

Reckons with a GGUF's metadata; loads nothing. Sizes are in bytes, contexts in tokens.
"""

import re
from collections.abc import Mapping

from me_local.config import MemberConfig

_CONTEXT_STEP = 256  # llama.cpp pads contexts to a multiple of this
_BLOCKS = {  # bytes and elements of a block, as in ggml's ggml-common.h
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_1": (24, 32),
    "q5_0": (22, 32),
    "q4_1": (20, 32),
    "q4_0": (18, 32),
    "iq4_nl": (18, 32),
}
# Where one of these is set, layers differ, share a cache or hold something else than keys and values.
_IRREGULAR = re.compile(r"\.attention\.(key_length_(mla|swa)|value_length_(mla|swa)|shared_kv_layers|indexer\..*)\Z")


def allocated_context(wanted: int, trained: int) -> int:
    """The number of tokens to make room for, padded as llama.cpp does it.

    `wanted` is n_ctx, 0 for the length that the model was trained with; `trained` is that length, and the most that is
    of use, or 0 where it is not known.
    """
    tokens = min(wanted or trained, trained or wanted)
    return -(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP


def kv_cache_bytes(metadata: Mapping[str, str], memory: str, config: MemberConfig, cells: int) -> int | None:
    """The size of a KV cache for `cells` tokens; None where the metadata does not tell.

    Layers with a sliding window count in full, as llama.cpp allocates them (`swa_full`).
    """
    if memory in ("recurrent", "hybrid") or any(_IRREGULAR.search(key) for key in metadata):
        return None
    sizes = _layer_sizes(metadata, may_vary=memory != "full")
    if sizes is None:
        return None
    layers, keys, values = sizes
    return layers * cells * (_row_bytes(keys, config.type_k) + _row_bytes(values, config.type_v))


def _layer_sizes(metadata: Mapping[str, str], *, may_vary: bool) -> tuple[int, int, int] | None:
    """The number of layers, and the elements of a layer's keys and values for one token.

    llama.cpp leaves arrays out of the metadata that it gives. A count of heads for each layer therefore looks like
    none at all, which otherwise stands for as many as there are queries; only models whose layers differ have it.
    """
    prefix = metadata.get("general.architecture", "") + "."

    def number(key: str, default: int | None = None) -> int:
        return int(metadata[prefix + key]) if default is None or prefix + key in metadata else default

    try:
        heads = number("attention.head_count")
        heads_kv = number("attention.head_count_kv", None if may_vary else heads)
        width = number("embedding_length") // heads
        layers = number("block_count") - number("nextn_predict_layers", 0)
        keys, values = number("attention.key_length", width), number("attention.value_length", width)
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return layers, heads_kv * keys, heads_kv * values


def _row_bytes(elements: int, cache_type: str | None) -> int:
    size, block = _BLOCKS[cache_type or "f16"]
    return elements * size // block
