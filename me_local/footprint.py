"""What a member's context takes up in memory, and how much memory this process may still have.

Reckons with a GGUF's metadata and with what Linux says about the process; loads nothing. Sizes are in bytes, contexts
in tokens.
"""

import contextlib
import re
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

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
_ROOT = Path("/")


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


def available_memory() -> int | None:
    """The most that this process can still take; None where the system does not tell.

    The least of what the machine has left, the limits of its control groups (version 1 or 2), and its own limit of
    address space. Caches of files count as free, and swap as memory.
    """
    machine = _fields(_ROOT / "proc/meminfo", 1024)
    rooms = [machine["MemAvailable"], *_control_group_rooms()] if "MemAvailable" in machine else []
    rooms = [room + machine.get("SwapFree", 0) for room in rooms]
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], _fields(_ROOT / "proc/self/status", 1024)
    if limit != resource.RLIM_INFINITY and "VmSize" in used:
        rooms.append(limit - used["VmSize"])
    return max(0, min(rooms)) if rooms else None


def _control_group_rooms() -> Iterator[int]:
    """What each control group around this process has left, for those that limit memory."""
    for line in _text(_ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            group = Path(path.lstrip("/"))
            # In a container the path may be that of the machine, where only the root can be seen.
            for folder in (group, *group.parents):
                yield from _room(_ROOT / "sys/fs/cgroup" / controllers / folder)


def _room(group: Path) -> Iterator[int]:
    version_2 = (group / "memory.max").exists()
    names = ("max", "current") if version_2 else ("limit_in_bytes", "usage_in_bytes")
    limit, used = (_text(group / f"memory.{name}").strip() for name in names)
    if limit.isdigit() and used.isdigit():
        statistics = _fields(group / "memory.stat", 1)
        caches = (statistics.get(f"total_{key}", statistics.get(key, 0)) for key in ("active_file", "inactive_file"))
        yield int(limit) - int(used) + sum(caches) + statistics.get("slab_reclaimable", 0)


def _fields(path: Path, unit: int) -> dict[str, int]:
    """The lines of a file that are a name and a number, times `unit`."""
    found = re.findall(r"^(\w+):?\s+(\d+)(?: kB)?$", _text(path), re.MULTILINE)
    return {name: int(number) * unit for name, number in found}


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""
