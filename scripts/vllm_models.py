"""Llamas in Hugging Face's format, which vLLM reads, made of GGUF files; and a tiny one with random weights, as both.

Knows byte-level BPE, and takes quantised weights as the numbers that they stand for.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import make_tiny_models
import numpy as np
import tiny_architectures
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from tiny_vocabularies import chatml_vocab
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# vLLM's attention on processors knows no heads smaller than 32.
SIZES = {"N_EMBD": 128, "N_HEAD": 4, "N_HEAD_KV": 2, "N_FF": 256}
_NAMES = {
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
_OF_DIGITS = ("smollm",)  # vocabularies in which no token has two digits, by tokenizer.ggml.pre
_NEVER_TEXT = (TokenType.CONTROL, TokenType.UNKNOWN)


def write_models(folder: Path, name: str, seed: int = 1) -> tuple[Path, Path]:
    """Write one tiny model twice; give the GGUF file, and the folder in Hugging Face's format."""
    vocab = chatml_vocab()
    with patch.dict(vars(tiny_architectures), SIZES):
        model = tiny_architectures.llama_model(vocab, seed)
    head = SIZES["N_EMBD"] // SIZES["N_HEAD"]
    sizes = {"embedding_length": SIZES["N_EMBD"], "feed_forward_length": SIZES["N_FF"], "rope.dimension_count": head}
    model = replace(model, hyper=model.hyper | sizes)
    gguf, hf = folder / f"{name}.gguf", folder / name
    make_tiny_models.write_model(gguf, vocab=vocab, model=model, chat_template=make_tiny_models.CHATML)
    convert(gguf, hf)
    return gguf, hf


def convert(gguf: Path, folder: Path) -> None:
    """Write the Llama of a GGUF file in Hugging Face's format, with weights of 32 bits."""
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(fields, tied="output.weight" not in tensors)))
    (folder / "model.safetensors").write_bytes(safetensors(hf_tensors(tensors, heads)))
    write_tokenizer(folder, fields)


def hf_config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Give what transformers wants to know of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": fields["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": tied,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def hf_tensors(tensors: Mapping[str, np.ndarray], heads: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Give the tensors their names there; the halves of a head are turned by positions, not its pairs."""
    result = {}
    for name, tensor in tensors.items():
        *layer, kind, _ = name.split(".")
        if kind in heads:
            tensor = tensor.reshape(heads[kind], -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        result[f"{prefix}{_NAMES[kind]}.weight"] = tensor
    return result


def safetensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Give the file: the length of a JSON object, the object, and the tensors."""
    header, data, end = {}, [], 0
    for name, tensor in tensors.items():
        data.append(np.ascontiguousarray(tensor, np.float32).tobytes())
        start, end = end, end + len(data[-1])
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *data])


def write_tokenizer(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write GPT-2's kind of tokenizer."""
    texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({text: id_ for id_, text in enumerate(texts)}, merges))
    split = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if fields["tokenizer.ggml.pre"] in _OF_DIGITS:
        split = [pre_tokenizers.Digits(individual_digits=True), *split]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    control = [text for text, kind in zip(texts, types, strict=True) if kind in _NEVER_TEXT]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": texts[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": fields.get("tokenizer.chat_template")})
    )
