"""Types of the KV cache: quantised keys give the prediction of unquantised ones, or are refused."""

from pathlib import Path

import numpy as np
import pytest
from conftest import logits_of, lone_member
from make_tiny_models import write_model
from tiny_architectures import Model, dense, llama_model
from tiny_vocabularies import chatml_vocab

from me_local.config import MemberConfig
from me_local.errors import LoadError

HEADS = 8
SIZES = (16, 32, 48, 64, 80, 96, 100, 112, 128, 160, 192, 256)
KEY_HEADS = (1, 2, 4, 8)
IDS = np.arange(5, 65, dtype=np.int32)


def with_heads(folder: Path, size: int, key_heads: int) -> Path:
    """A tiny model with 8 heads of this size, and so many heads of keys and values."""
    vocab = chatml_vocab()
    model = llama_model(vocab, 1)
    rng = np.random.default_rng(size + key_heads)
    tensors = dict(model.tensors)
    for layer in range(model.hyper["block_count"]):
        prefix = f"blk.{layer}.attn_"
        width = tensors[f"{prefix}q.weight"].shape[1]
        tensors[f"{prefix}q.weight"] = dense(rng, HEADS * size, width, gain=1.0)
        tensors[f"{prefix}k.weight"] = dense(rng, key_heads * size, width, gain=1.0)
        tensors[f"{prefix}v.weight"] = dense(rng, key_heads * size, width, gain=1.0)
        tensors[f"{prefix}output.weight"] = dense(rng, width, HEADS * size, gain=1.0)
    hyper = model.hyper | {
        "attention.head_count": HEADS,
        "attention.head_count_kv": key_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
    }
    path = folder / "heads.gguf"
    write_model(path, vocab=vocab, model=Model(model.arch, hyper, tensors))
    return path


def prediction(path: Path, **settings: object) -> np.ndarray:
    config = MemberConfig(name="m", path=path, n_ctx=256, n_threads=1, **settings)  # type: ignore[arg-type]
    with lone_member(config) as member:
        logits = np.array(logits_of(member, IDS), dtype=np.float64)
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


@pytest.mark.parametrize("key_heads", KEY_HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_quantised_keys_predict_what_others_do_or_are_refused(size: int, key_heads: int, tmp_path: Path) -> None:
    path = with_heads(tmp_path, size, key_heads)
    if size % 32:
        with pytest.raises(LoadError, match=rf'type_k = "q8_0" goes with heads that are a multiple of 32.* are {size}'):
            prediction(path, type_k="q8_0")
        return
    plain, quantised = prediction(path), prediction(path, type_k="q8_0")
    # 8 bits of each key leave an error of 1 in 256 of the largest; one head that reads another's keys makes it 0.1.
    assert 0.5 * np.abs(plain - quantised).sum() < 0.02
