"""The table `[members.llama]`: parameters of llama.cpp that me-local has no key for, by the names that they have there.

They are the fields of `llama_model_params` and `llama_context_params`, as ctypes tells them, and the keywords of
`llama_cpp.Llama` where these are spelled otherwise. What me-local decides itself is refused. Knows nothing of what the
parameters do.
"""

import ctypes
import json
import math
from functools import cache
from typing import Any

import llama_cpp

from me_local.checks import require_known, shown
from me_local.config import MemberConfig
from me_local.errors import ConfigError

_MODEL: dict[str, Any] = {key: kind for key, kind in llama_cpp.llama_model_params._fields_ if key != "kv_overrides"}
_CONTEXT: dict[str, Any] = dict(llama_cpp.llama_context_params._fields_)
_INTEGERS = {ctypes.c_int32: (-(2**31), 2**31 - 1), ctypes.c_uint32: (0, 2**32 - 1)}
_TYPES = (*_INTEGERS, ctypes.c_bool, ctypes.c_float)
_LIMITS = {"n_threads_batch": (1, 512)}  # GGML_MAX_N_THREADS
_LOAD_MODES = {  # by use_mmap and use_mlock, as llama_cpp.Llama has it
    (True, True): "MMAP_MLOCK",
    (True, False): "MMAP",
    (False, True): "MLOCK",
    (False, False): "NONE",
}
_KEYWORDS = ("use_mmap", "use_mlock", "kv_overrides", "numa", "lora_scale")
"""Of `llama_cpp.Llama`, which are fields of no structure."""

_STRETCHING = ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_orig_ctx")
_OWN_KEYS = {
    **{
        key: key
        for key in ("n_ctx", "n_batch", "n_gpu_layers", "n_threads", "type_k", "type_v", "swa_full", "main_gpu")
    },
    **{key: key for key in ("tensor_split", "flash_attn", "chat_template", "tokenizer", "lora", "path")},
    "flash_attn_type": "flash_attn",
    "lora_path": "lora",
    "chat_format": "chat_template",
    "chat_handler": "chat_template",
    "model_path": "path",
}
_REFUSED = {
    ("vocab_only", "no_alloc"): "a member needs its weights",
    ("embedding", "embeddings", "pooling_type", "attention_type"): "a member generates text",
    ("logits_all",): "me-local asks for the logits that it needs",
    ("n_seq_max", "kv_unified", "n_outputs_max", "n_outputs_max_per_seq", "n_samplers"): (
        "me-local sets it by the number of replies at once"
    ),
    ("n_rs_seq",): "me-local keeps checkpoints of its own",
    ("ctx_type", "load_mtp", "draft_model"): "a member predicts one token at a time",
    ("seed",): "set seed in [ensemble]",
    ("verbose",): "the option -v shows llama.cpp's log",
    ("last_n_tokens_size", "spm_infill", "lora_base"): "nothing here would use it",
}
_REASONS = {key: reason for keys, reason in _REFUSED.items() for key in keys}
_MOST_BYTES = 127  # of names and texts in `llama_model_kv_override`


def require_options(member: MemberConfig, place: str = "") -> None:
    """Raise ConfigError, behind `place`, for the first thing that is wrong with a member's table."""
    for key, value in member.llama.items():
        where = f'{place}member "{member.name}".llama.{key}'
        if key in _OWN_KEYS:
            raise ConfigError(f"{where}: set {_OWN_KEYS[key]} in [[members]] itself")
        if key in _REASONS:
            raise ConfigError(f"{where}: cannot be set: {_REASONS[key]}")
        if key not in _KEYWORDS and key not in _MODEL | _CONTEXT:
            require_known(key, _known(), f'{place}member "{member.name}".llama.', "key")
        if key not in _KEYWORDS and key not in _fields():
            raise ConfigError(f"{where}: cannot be set: it is a pointer, which a file cannot hold")
        try:
            _kv_overrides(value) if key == "kv_overrides" else _number(key, value)
        except ValueError as error:
            raise ConfigError(f"{where}{error}") from None
    if "load_mode" in member.llama and {"use_mmap", "use_mlock"} & member.llama.keys():
        raise ConfigError(f'{place}member "{member.name}".llama.load_mode: goes without use_mmap and use_mlock')


def set_model(settings: llama_cpp.llama_model_params, member: MemberConfig) -> None:
    """Put what is said of the model into `settings`.

    NUMA is a matter of the whole process; llama.cpp takes the first word on it. Raises ConfigError.
    """
    require_options(member)
    table = member.llama
    for key in table.keys() & _MODEL.keys():
        setattr(settings, key, _number(key, table[key]))
    if {"use_mmap", "use_mlock"} & table.keys():
        mode = _LOAD_MODES[table.get("use_mmap", True), table.get("use_mlock", False)]
        settings.load_mode = getattr(llama_cpp, f"LLAMA_LOAD_MODE_{mode}")
    if strategy := _number("numa", table.get("numa", False)):
        llama_cpp.llama_numa_init(strategy)
    if table.get("kv_overrides"):
        settings.kv_overrides = _kv_overrides(table["kv_overrides"])  # which ctypes keeps as long as `settings`


def set_context(settings: llama_cpp.llama_context_params, member: MemberConfig) -> None:
    """Put what is said of the context into `settings`. Raises ConfigError."""
    require_options(member)
    for key in member.llama.keys() & _CONTEXT.keys():
        setattr(settings, key, _number(key, member.llama[key]))


def context_table(settings: llama_cpp.llama_context_params) -> dict[str, Any]:
    """The other way: what a table would have to say for these settings of a context, where they are not the usual."""
    usual = llama_cpp.llama_context_default_params()
    keys = [key for key in _CONTEXT if key not in _OWN_KEYS | _REASONS and key in _fields()]
    return {key: getattr(settings, key) for key in keys if getattr(settings, key) != getattr(usual, key)}


def model_key(member: MemberConfig) -> str:
    """Equal for members that can share weights, as far as their tables tell."""
    return json.dumps({key: value for key, value in member.llama.items() if key not in _CONTEXT}, sort_keys=True)


def header_overrides(member: MemberConfig) -> dict[str, str]:
    """What `kv_overrides` puts in the place of values of the header, in the words that llama.cpp has for these."""
    overrides = member.llama.get("kv_overrides", {})
    return {key: json.dumps(value) if isinstance(value, bool) else str(value) for key, value in overrides.items()}


def longest_context(member: MemberConfig, trained: int) -> int:
    """The most tokens that a context can have: those that the model was trained with, where nothing stretches them."""
    return max(trained, member.n_ctx) if trained and member.llama.keys() & set(_STRETCHING) else trained


@cache
def _fields() -> dict[str, Any]:
    """The fields that a file can set, with their types in C."""
    return {key: kind for key, kind in (_MODEL | _CONTEXT).items() if kind in _TYPES}


def _number(key: str, value: object) -> Any:
    """What C takes for a value. Raises ValueError that says what is wrong with it, behind the key."""
    kind = ctypes.c_int32 if key == "numa" else _fields().get(key, ctypes.c_bool)
    if key == "numa" and isinstance(value, bool):
        value = int(value)  # true: distribute
    if key == "lora_scale" or kind is ctypes.c_float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f": must be a finite number, got {shown(value)}")
        return float(value)
    if kind is ctypes.c_bool:
        if not isinstance(value, bool):
            raise ValueError(f": must be true or false, got {shown(value)}")
        return value
    return _integer(key, value, *_LIMITS.get(key, _INTEGERS[kind]))


def _integer(key: str, value: object, least: int, most: int) -> int:
    names = _names(key)
    if isinstance(value, str) and value.lower() in names:
        return names[value.lower()]
    if names and (isinstance(value, bool) or value not in names.values()):
        raise ValueError(f": must be one of {', '.join(shown(name) for name in names)}, got {shown(value)}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f": must be an integer, got {shown(value)}")
    if not least <= value <= most:
        raise ValueError(f": must be from {least} to {most}, got {value}")
    return value


@cache
def _names(key: str) -> dict[str, int]:
    """The values of an enumeration of llama.cpp's by their names, such as "yarn"; empty for other keys."""
    start = "GGML_NUMA_STRATEGY_" if key == "numa" else f"LLAMA_{key.upper()}_"
    names = [name for name in dir(llama_cpp) if name.startswith(start) and not name.endswith(("_MAX_VALUE", "_COUNT"))]
    found = {name.removeprefix(start).lower(): getattr(llama_cpp, name) for name in names}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _kv_overrides(table: object) -> Any:
    """llama.cpp's array of overrides, which ends with an empty one. Raises ValueError like `_number`."""
    if not isinstance(table, dict):
        raise ValueError(f": must be a table, got {shown(table)}")
    array = (llama_cpp.llama_model_kv_override * (len(table) + 1))()
    for entry, (key, value) in zip(array, table.items(), strict=False):
        name = key.encode()
        if isinstance(value, dict):
            raise ValueError(f'.{key}: a key with dots stands in quotes: "{key}. ..." = ...')
        if not 0 < len(name) <= _MOST_BYTES or b"\0" in name:
            raise ValueError(f".{shown(key)}: a key has at most {_MOST_BYTES} bytes")
        entry.key = name
        try:
            entry.tag = _fill(entry.value, value)
        except ValueError as error:
            raise ValueError(f".{shown(key)}{error}") from None
    return array


def _fill(room: Any, value: object) -> int:
    """Put a value where it goes by its type; the tag of that."""
    if isinstance(value, bool):
        room.val_bool = value
        return int(llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        room.val_i64 = value
        return int(llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT)
    if isinstance(value, float):
        room.val_f64 = value
        return int(llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT)
    if isinstance(value, str) and len(value.encode()) <= _MOST_BYTES and "\0" not in value:
        room.val_str = value.encode()
        return int(llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR)
    raise ValueError(f": must be true or false, a number, or a text of at most {_MOST_BYTES} bytes, got {shown(value)}")


def _known() -> list[str]:
    return sorted({*_KEYWORDS, *_fields()} - _OWN_KEYS.keys() - _REASONS.keys())
