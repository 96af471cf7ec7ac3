"""Sizes of KV caches, worked out by hand, and what a system that was made up has left."""

import resource
from pathlib import Path

import pytest

from me_local import footprint
from me_local.config import MemberConfig
from me_local.footprint import allocated_context, available_memory, kv_cache_bytes


def metadata(arch: str, **numbers: object) -> dict[str, str]:
    keys = {f"{arch}.{key.replace('__', '.')}": str(value) for key, value in numbers.items()}
    return {"general.architecture": arch} | keys


LLAMA_3_8B = metadata(
    "llama", block_count=32, embedding_length=4096, attention__head_count=32, attention__head_count_kv=8
)
GEMMA_3_270M = metadata(
    "gemma3",
    block_count=18,
    embedding_length=640,
    attention__head_count=4,
    attention__head_count_kv=1,
    attention__key_length=256,
    attention__value_length=256,
)
GPT_2 = metadata("gpt2", block_count=12, embedding_length=768, attention__head_count=12)


def config(**settings: object) -> MemberConfig:
    return MemberConfig(name="a", path=Path("/a.gguf"), **settings)  # type: ignore[arg-type]


# Keys of a layer take 8 heads of 128 elements in Llama 3 8B; values take as many.
@pytest.mark.parametrize(
    ("settings", "per_layer_and_token"),
    [
        ({}, 1024 * 2 + 1024 * 2),
        ({"type_k": "f32", "type_v": "bf16"}, 1024 * 4 + 1024 * 2),
        ({"type_k": "q8_0", "type_v": "q4_0"}, 32 * 34 + 32 * 18),
        ({"type_k": "q4_1", "type_v": "iq4_nl"}, 32 * 20 + 32 * 18),
        ({"type_k": "q5_1", "type_v": "q5_0"}, 32 * 24 + 32 * 22),
    ],
)
def test_kv_cache_of_each_type(settings: dict[str, str], per_layer_and_token: int) -> None:
    size = kv_cache_bytes(LLAMA_3_8B, "full", config(**settings), 4096)
    assert size == 32 * 4096 * per_layer_and_token


def test_kv_cache_where_heads_have_a_length_of_their_own() -> None:
    # 18 layers x 4096 tokens x (256 + 256) elements x 2 bytes: 72 MiB, which is what llama.cpp's log says too.
    assert kv_cache_bytes(GEMMA_3_270M, "sliding window 512", config(), 4096) == 72 * 2**20


def test_kv_cache_without_a_count_of_kv_heads() -> None:
    assert kv_cache_bytes(GPT_2, "full", config(), 1024) == 12 * 1024 * (768 + 768) * 2


def test_kv_cache_leaves_out_layers_that_predict_further_tokens() -> None:
    more = LLAMA_3_8B | {"llama.nextn_predict_layers": "2"}
    assert kv_cache_bytes(more, "full", config(), 256) == 30 * 256 * 4096


@pytest.mark.parametrize(
    ("known", "memory"),
    [
        (LLAMA_3_8B, "recurrent"),
        (LLAMA_3_8B, "hybrid"),
        (GPT_2, "sliding window 4096"),
        ({}, "full"),
        ({key: value for key, value in LLAMA_3_8B.items() if "head_count" not in key}, "full"),
        (LLAMA_3_8B | {"llama.attention.head_count": "0"}, "full"),
        (GEMMA_3_270M | {"gemma3.attention.key_length_swa": "512"}, "sliding window 512"),
        (LLAMA_3_8B | {"llama.attention.key_length_mla": "192"}, "full"),
        (LLAMA_3_8B | {"llama.attention.shared_kv_layers": "10"}, "full"),
    ],
)
def test_no_figure_where_the_metadata_does_not_tell(known: dict[str, str], memory: str) -> None:
    assert kv_cache_bytes(known, memory, config(), 4096) is None


@pytest.mark.parametrize(
    ("wanted", "trained", "cells"),
    [(1000, 8192, 1024), (0, 2048, 2048), (4096, 2048, 2048), (4000, 1000, 1024), (300, 0, 512)],
)
def test_contexts_are_padded_and_end_with_the_training(wanted: int, trained: int, cells: int) -> None:
    assert allocated_context(wanted, trained) == cells


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
    monkeypatch.setattr(footprint, "_ROOT", tmp_path)
    assert available_memory() == room


def test_a_limit_of_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_system(tmp_path, MACHINE | {"/proc/self/status": "Name:\tpython\nVmPeak:\t 9 kB\nVmSize:\t  40 kB\n"})
    monkeypatch.setattr(footprint, "_ROOT", tmp_path)
    for limit, room in ((100 * 1024, 60 * 1024), (30 * 1024, 0), (-1, 5000 * 1024 + SWAP)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, -1))
        assert available_memory() == room


def test_this_machine_says_how_much_it_has() -> None:
    room = available_memory()
    assert room is not None
    assert 0 < room < 2**50
