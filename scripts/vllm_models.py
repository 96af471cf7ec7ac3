"""A tiny Llama with random weights, written twice: as a GGUF file, and in Hugging Face's format, which vLLM reads."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import make_tiny_models
import numpy as np
import tiny_architectures
from tiny_vocabularies import Vocab, chatml_vocab
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# vLLM's attention on processors knows no heads smaller than 32.
SIZES = {"N_EMBD": 128, "N_HEAD": 4, "N_HEAD_KV": 2, "N_FF": 256}


def write_models(folder: Path, name: str, seed: int = 1) -> tuple[Path, Path]:
    """Write one model twice; give the GGUF file, and the folder in Hugging Face's format."""
    vocab = chatml_vocab()
    with patch.dict(vars(tiny_architectures), SIZES):
        model = tiny_architectures.llama_model(vocab, seed)
    head = SIZES["N_EMBD"] // SIZES["N_HEAD"]
    sizes = {"embedding_length": SIZES["N_EMBD"], "feed_forward_length": SIZES["N_FF"], "rope.dimension_count": head}
    model = replace(model, hyper=model.hyper | sizes)
    gguf, hf = folder / f"{name}.gguf", folder / name
    make_tiny_models.write_model(gguf, vocab=vocab, model=model, chat_template=make_tiny_models.CHATML)
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(hf_config(vocab)))
    (hf / "model.safetensors").write_bytes(safetensors(hf_tensors(model.tensors)))
    write_tokenizer(hf, vocab)
    return gguf, hf


def hf_config(vocab: Vocab) -> dict[str, Any]:
    """Give what transformers wants to know of a Llama."""
    texts = [token.text for token in vocab.tokens]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": SIZES["N_EMBD"],
        "intermediate_size": SIZES["N_FF"],
        "num_hidden_layers": tiny_architectures.N_LAYER,
        "num_attention_heads": SIZES["N_HEAD"],
        "num_key_value_heads": SIZES["N_HEAD_KV"],
        "max_position_embeddings": tiny_architectures.N_CTX,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": len(texts),
        "bos_token_id": texts.index(vocab.bos),
        "eos_token_id": texts.index(vocab.eos),
    }


def hf_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the tensors their names there; the halves of a head are turned by positions, not its pairs."""
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": SIZES["N_HEAD"], "attn_k": SIZES["N_HEAD_KV"]}
    result = {}
    for name, tensor in tensors.items():
        *layer, kind, _ = name.split(".")
        if kind in heads:
            tensor = tensor.reshape(heads[kind], -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        result[f"{prefix}{names[kind]}.weight"] = tensor
    return result


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """Give the file: the length of a JSON object, the object, and the tensors."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        start, data = len(data), data + np.ascontiguousarray(tensor, np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write_tokenizer(folder: Path, vocab: Vocab) -> None:
    """Write GPT-2's kind of tokenizer."""
    ids = {token.text: number for number, token in enumerate(vocab.tokens)}
    merges = [tuple(pair.split(" ")) for pair in vocab.merges]
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token.text for token in vocab.tokens if not token.piece]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": vocab.bos, "eos_token": vocab.eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": make_tiny_models.CHATML}))
