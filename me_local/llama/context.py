"""A context of llama.cpp for a member, made as its configuration has it, or one line that says why there is none."""

import re

import llama_cpp

from me_local.config import MemberConfig
from me_local.errors import LoadError
from me_local.llama.memory import kv_cache_bytes
from me_local.llama.native_log import native_log
from me_local.llama.options import set_context
from me_local.llama.weights import Weights, supports_gpu
from me_local.system.machine import available_memory, usable_cores

_LARGEST_BATCH = 512  # tokens that go through a model at once, as llama.cpp has it by default

MOST_SEQUENCES = 256
"""LLAMA_MAX_SEQ."""
CELL_BYTES = 48
"""Of position and sequences, besides keys and values (llama-kv-cells.h)."""


def require_memory(config: MemberConfig, weights: Weights, cells: int, sequences: int) -> None:
    """Raise LoadError where the KV cache alone, of so many cells for each sequence, is larger than what is free.

    llama.cpp writes to all of it, so that Linux would kill the process. The weights do not count: their pages come
    from the file and can go back to it. On a GPU the cache is there, and llama.cpp says so if it does not fit.
    """
    if (supports_gpu() and config.n_gpu_layers) or not config.swa_full:
        return
    cache, available = kv_cache_bytes(weights.metadata, weights.memory, config, cells * sequences), available_memory()
    if cache is None or available is None:
        return
    needed = cache + CELL_BYTES * cells * sequences
    if needed > available:
        what, less = (
            ("a context", "n_ctx")
            if sequences == 1
            else (f"{sequences} contexts", "n_ctx or the number of replies at once")
        )
        raise LoadError(
            f'member "{config.name}": {weights.path}: not enough memory: {what} of {cells:,} tokens takes '
            f"{needed / 1e9:.2f} GB, and {available / 1e9:.2f} GB are free: lower {less}"
        )


def make_context(
    config: MemberConfig, weights: Weights, cells: int, batch: int, outputs: int, sequences: int
) -> llama_cpp.llama_context_p:
    """A context of so many `cells` in all, for batches of so many tokens, of which so many can have logits.

    Raises LoadError.
    """
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = cells, batch, min(batch, _LARGEST_BATCH)
    settings.n_seq_max = sequences
    settings.kv_unified = False  # a buffer for each sequence: attention looks at no other's cells
    settings.n_threads = settings.n_threads_batch = config.n_threads or usable_cores()
    flash = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if config.flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.flash_attn_type = flash
    settings.no_perf = True
    settings.swa_full = config.swa_full
    if config.type_k:
        settings.type_k = cache_type(config.type_k)
    if config.type_v:
        settings.type_v = cache_type(config.type_v)
    settings.n_outputs_max = outputs  # without it there is room for the logits of a whole batch
    if config.type_k not in (None, "f32", "f16", "bf16") and not config.flash_attn:
        _require_heads_of_whole_blocks(config, weights, settings.type_k)
    set_context(settings, config)
    settings.n_ubatch = min(batch, settings.n_ubatch)
    context = _init_context(weights, settings)
    if not context:
        reason = "; ".join(native_log.first_errors) or "llama.cpp does not say why"
        hint = " (not enough memory: lower n_ctx)" if "alloc" in reason else ""
        raise LoadError(f'member "{config.name}": {weights.path} cannot be loaded: {reason}{hint}')
    return context


def _init_context(weights: Weights, settings: llama_cpp.llama_context_params) -> llama_cpp.llama_context_p:
    """A context, or nothing where llama.cpp refuses; what it says of it is in its log."""
    native_log.first_errors.clear()
    native_log.last_lines.clear()
    return llama_cpp.llama_init_from_model(weights.pointer, settings)


def _require_heads_of_whole_blocks(config: MemberConfig, weights: Weights, cache_type: int) -> None:
    """Raise LoadError where a quantised type does not fit the heads of the keys.

    llama.cpp looks at that with flash attention alone; without it, it ends the process or computes something else.
    """
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 256, 1, 1
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    settings.type_k = cache_type
    context = _init_context(weights, settings)
    if context:
        llama_cpp.llama_free(context)
    for error in native_log.first_errors:
        if found := re.search(r"with block size (\d+) does not divide n_embd_head_k=(\d+)", error):
            raise LoadError(
                f'member "{config.name}": {weights.path}: type_k = "{config.type_k}" goes with heads that are a '
                f"multiple of {found[1]} wide, and this model's are {found[2]}: leave type_k out"
            )


def working_bytes() -> int | None:
    """The size of the context that was made last, besides its cache; llama.cpp tells it in its log alone."""
    sizes = [
        float(size)
        for line in native_log.last_lines
        for size in re.findall(r"compute buffer size = +([\d.]+) MiB", line)
    ]
    return round(sum(sizes) * 2**20) if sizes else None


def cache_type(name: str) -> int:
    """The number of a type of keys or values."""
    if name == "bf16":
        return 30  # GGML_TYPE_BF16 of ggml.h, which llama-cpp-python does not name
    return int(getattr(llama_cpp, f"GGML_TYPE_{name.upper()}"))
