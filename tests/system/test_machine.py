"""What a system that was made up gives a process."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from me_local.system import machine
from me_local.system.machine import (
    available_memory,
    processor,
    processor_features,
    processor_identity,
    usable_cores,
)


def write_system(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


MACHINE = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\nSwapFree: 100 kB\nHugePages_Free: 3\n"}
IN_A_GROUP = {"/proc/self/cgroup": "0::/user/me\n"}
INNER = {"/sys/fs/cgroup/user/me/memory.max": "max\n", "/sys/fs/cgroup/user/me/memory.current": "3000\n"}
OUTER = {
    "/sys/fs/cgroup/user/memory.max": "9000\n",
    "/sys/fs/cgroup/user/memory.current": "8000\n",
    "/sys/fs/cgroup/user/memory.stat": "anon 5000\nactive_file 200\ninactive_file 30\nslab_reclaimable 4\n",
}
VERSION_1 = {
    "/proc/self/cgroup": "7:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n",
    # In a container only the root of its control group can be seen.
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": "8500\n",
    "/sys/fs/cgroup/memory/memory.stat": "active_file 1\ntotal_active_file 10\ntotal_inactive_file 20\n",
}
SWAP = 100 * 1024


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({}, None),
        (MACHINE, 5000 * 1024 + SWAP),
        (MACHINE | IN_A_GROUP | INNER, 5000 * 1024 + SWAP),
        (MACHINE | IN_A_GROUP | INNER | OUTER, 9000 - 8000 + 234 + SWAP),
        (MACHINE | VERSION_1, 9000 - 8500 + 30 + SWAP),
        (OUTER | IN_A_GROUP, None),
    ],
)
def test_the_memory_that_is_left(
    files: dict[str, str], room: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_system(tmp_path, files)
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert available_memory() == room


def test_a_limit_of_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_system(tmp_path, MACHINE | {"/proc/self/status": "Name:\tpython\nVmPeak:\t 9 kB\nVmSize:\t  40 kB\n"})
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    for limit, room in ((100 * 1024, 60 * 1024), (30 * 1024, 0), (-1, 5000 * 1024 + SWAP)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, -1))
        assert available_memory() == room


def test_this_machine_says_how_much_it_has() -> None:
    room = available_memory()
    assert room is not None
    assert 0 < room < 2**50


V1_GROUP = {"/proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n2:memory:/\n"}
V1_QUOTA = {"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "100000\n"}
NO_V1_QUOTA = {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}


def in_folder(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"/sys/fs/cgroup/{folder}/{name}": content for name, content in files.items()}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        (IN_A_GROUP | in_folder("user/me", {"cpu.max": "max 100000\n"}), 8),
        (IN_A_GROUP | in_folder("user/me", {"cpu.max": "200000 100000\n"}), 2),
        (IN_A_GROUP | in_folder("user", {"cpu.max": "150000 50000\n"}), 3),
        (IN_A_GROUP | in_folder(".", {"cpu.max": "20000 100000\n"}), 1),
        (IN_A_GROUP | in_folder("user", {"cpu.max": "broken\n"}), 8),
        (V1_GROUP | in_folder("cpu,cpuacct", V1_QUOTA), 3),
        (V1_GROUP | in_folder("cpu/docker/abc", V1_QUOTA) | in_folder("cpu", NO_V1_QUOTA), 3),
        (V1_GROUP | in_folder("cpu", NO_V1_QUOTA), 8),
        (V1_GROUP | in_folder("memory", V1_QUOTA), 8),
    ],
)
def test_the_cores_of_a_process(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_system(tmp_path, files)
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores() == cores


def test_a_system_that_tells_nothing_limits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert usable_cores() == 5
    assert available_memory() is None
    assert processor() == "arm"
    assert processor_features() == frozenset()
    assert "arm" in processor_identity()


def test_what_linux_says_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_system(tmp_path, {"/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 amx_tile\n"})
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    before = processor_identity()
    assert processor() == "Some CPU"
    assert processor_features() == {"fpu", "avx2", "amx_tile"}
    write_system(tmp_path, {"/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2\n"})
    assert processor_identity() != before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_do_not_spin_for_long_where_nobody_said_so(given: dict[str, str], found: str) -> None:
    ours = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    program = "import os, me_local; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{found}\n"
