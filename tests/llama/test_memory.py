"""Sizes of KV caches, worked out by hand."""

from pathlib import Path

import pytest

from me_local.config import MemberConfig
from me_local.llama.memory import allocated_context, kv_cache_bytes


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
