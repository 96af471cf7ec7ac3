"""The header of a GGUF file, read by llama.cpp's own reader; neither the vocabulary nor the weights are loaded.

Takes some hundredths of a second where loading the vocabulary alone takes half a second.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp

# enum gguf_type in ggml/include/gguf.h, without floats and arrays.
_VALUES: dict[int, tuple[str, Any]] = {
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    8: ("str", ctypes.c_char_p),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
}


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def read_header(path: Path) -> dict[str, str]:
    """The integers and texts in a GGUF's header, as texts; "" for an array or a float.

    Nothing at all of a file that cannot be read: loading it says why.
    """
    opened = _function("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _InitParams)
    header = opened(os.fsencode(path), _InitParams(True, None))
    if not header:
        return {}
    try:
        count = _function("gguf_get_n_kv", ctypes.c_int64, ctypes.c_void_p)(header)
        return dict(_entry(header, index) for index in range(count))
    finally:
        _function("gguf_free", None, ctypes.c_void_p)(header)


def _entry(header: int, index: int) -> tuple[str, str]:
    key = _get("key", ctypes.c_char_p)(header, index).decode("utf-8", "replace")
    name, kind = _VALUES.get(_get("kv_type", ctypes.c_int)(header, index), ("", None))
    value = _get(f"val_{name}", kind)(header, index) if name else b""
    return key, value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _get(name: str, result: Any) -> Callable[..., Any]:
    return _function(f"gguf_get_{name}", result, ctypes.c_void_p, ctypes.c_int64)


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(llama_cpp._lib, name)  # which finds the functions of ggml too
    function.restype, function.argtypes = result, arguments
    return function  # type: ignore[no-any-return]
