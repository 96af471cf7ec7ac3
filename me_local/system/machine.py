"""What this machine gives the process: processors and memory, as far as the system tells.

Linux tells all of it, in files and by limits of control groups; elsewhere less is known, and what is not known limits
nothing. Knows nothing of models. Sizes are in bytes.
"""

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def usable_cores() -> int:
    """The processors that this process may use: by its affinity, and by the quotas of its control groups."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cores, *(round(quota) for quota in _quotas())]))


def processor() -> str:
    """The name of the processor; empty where the system does not tell."""
    return _processor_field("model name") or platform.processor()


def processor_features() -> frozenset[str]:
    """What the processor can, such as "avx2", in the words of Linux; empty where the system does not tell."""
    return frozenset(_processor_field("flags").split())


def processor_identity() -> str:
    """Equal for processors that a build of llama.cpp runs alike on, as far as the system tells."""
    features = " ".join(sorted(processor_features()))
    return f"{platform.machine()} {processor()} {hashlib.sha256(features.encode()).hexdigest()[:16]}"


def available_memory() -> int | None:
    """The most that this process can still take; None where the system does not tell.

    The least of what the machine has left, the limits of its control groups (version 1 or 2), and its own limit of
    address space. Caches of files count as free, and swap as memory.
    """
    machine = _fields(_ROOT / "proc/meminfo", 1024)
    rooms = [machine["MemAvailable"], *_control_group_rooms()] if "MemAvailable" in machine else []
    rooms = [room + machine.get("SwapFree", 0) for room in rooms]
    limit, used = _address_space(), address_space_used()
    if limit is not None and used is not None:
        rooms.append(limit - used)
    return max(0, min(rooms)) if rooms else None


def address_space_used() -> int | None:
    """What this process has taken of its address space; None where the system does not tell."""
    return _fields(_ROOT / "proc/self/status", 1024).get("VmSize")


def _address_space() -> int | None:
    """The limit of this process's address space, if there is one."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _control_group_rooms() -> Iterator[int]:
    """What each control group around this process has left, for those that limit memory."""
    for group in _control_groups("memory"):
        yield from _room(group)


def _quotas() -> Iterator[float]:
    """How many processors each control group around this process may keep busy, for those that limit it."""
    for group in _control_groups("cpu"):
        version_2 = _text(group / "cpu.max").split()
        version_1 = [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        for quota, period in (version_2, version_1) if len(version_2) == 2 else (version_1,):
            if quota.isdigit() and period.isdigit() and int(period):
                yield int(quota) / int(period)


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups around this process that may limit something (version 1 or 2)."""
    for line in _text(_ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        # Version 1 has a folder for each controller or list of them, with links between them.
        for root in sorted({controllers, controller} if controllers else {""}):
            # In a container the path may be that of the machine, where only the root can be seen.
            for folder in (group, *group.parents):
                yield _ROOT / "sys/fs/cgroup" / root / folder


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


def _processor_field(name: str) -> str:
    """What /proc/cpuinfo says of the first processor under a name."""
    found = re.search(rf"^{name}\s*:\s*(.*)$", _text(_ROOT / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else ""


def return_memory() -> None:
    """Give the system what was freed; glibc keeps hundreds of MB of an ensemble otherwise, and more each time."""
    gc.collect()  # vocabularies and the like refer to each other
    with contextlib.suppress(OSError, TypeError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)
