"""What GPUs this build of llama.cpp finds. Sizes are in bytes."""

import ctypes

import llama_cpp
from llama_cpp._ggml import libggml

from me_local.llama.weights import supports_gpu

_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU of ggml-backend.h; one that shares the machine's memory is another type


def free_gpu_memory() -> int | None:
    """What all GPUs together have free; None where llama.cpp has none to use."""
    if not supports_gpu():
        return None
    llama_cpp.llama_backend_init()
    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    libggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    rooms = [_free(i) for i in range(libggml.ggml_backend_dev_count())]
    return sum(rooms) if any(rooms) else None


def _free(index: int) -> int:
    device = ctypes.c_void_p(libggml.ggml_backend_dev_get(ctypes.c_size_t(index)))
    if libggml.ggml_backend_dev_type(device) != _GPU:
        return 0
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    libggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return free.value
