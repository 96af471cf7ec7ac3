"""The weights of the tiny models: random tensors for one architecture of every kind of memory.

Takes nothing from a vocabulary but the kinds and bytes of its tokens. Every architecture is given the same
embeddings, which carry the prior of each token, so all of them have the same sane distributions.
"""

import re
from dataclasses import dataclass

import numpy as np
from gguf import TokenType
from numpy.typing import NDArray
from tiny_vocabularies import ENDS, Token, Vocab

Array = NDArray[np.float32]
Hyper = dict[str, int | float | list[int]]


@dataclass(frozen=True, slots=True)
class Model:
    """One architecture's hyperparameters (GGUF keys without the architecture's name) and its tensors."""

    arch: str
    hyper: Hyper
    tensors: dict[str, Array]


# How much of the probability each kind of token gets, and how unevenly the tokens of a kind share it (the
# standard deviation of their log-probabilities). Random weights add what depends on the context.
SHARES = {"word": 0.84, "mark": 0.11, "high": 0.035, "end": 0.015, "rare": 0.002, "never": 1e-6}
SKEW = 1.5


def kind(token: Token) -> str:
    """Say which of ``SHARES`` a token belongs to; "high" are the pieces with a byte of 0x80 or more."""
    piece = token.piece
    if not piece:
        return "end" if token.text in ENDS else "never"
    if max(piece) >= 0x80:
        return "high"
    text = piece.strip(b" \n")
    if text and (token.type == TokenType.BYTE or min(text) < 0x20 or max(text) == 0x7F):
        return "rare"
    return "word" if not text or text.isalpha() else "mark"


def log_prior(vocab: Vocab, rng: np.random.Generator) -> Array:
    """Split each kind's share unevenly over its tokens; the log-probabilities, of shape (n_vocab,)."""
    kinds = np.array([kind(token) for token in vocab.tokens])
    prior = rng.lognormal(0.0, SKEW, len(kinds))
    for name, share in SHARES.items():
        prior[kinds == name] *= share / prior[kinds == name].sum()
    return np.log(prior).astype(np.float32)


N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_CTX = 2, 32, 4, 2, 64, 2048
N_WINDOW = 16  # tokens that the windowed layer of Gemma 3 sees
N_STATE, N_CONV, N_RANK = 16, 4, 2  # Mamba's
SPREAD = 1.9  # standard deviation of the part of a logit that the context decides
BOOST = 4.0  # added to the logits of continuation bytes after an unfinished character
# The architecture has no output bias. Two dimensions of the residual stream that no layer reads or writes do
# its work: one holds a constant, the other says that the last piece left a character unfinished.
CONSTANT, OPEN, PINNED = 0, 1, 2
CONSTANT_VALUE, OPEN_VALUE = 8.0, 4.0
STREAM_VARIANCE = 1.7  # of the other dimensions after the last layer, as measured
UNFINISHED = re.compile(rb"([\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")


COMMON: Hyper = {
    "context_length": N_CTX,
    "embedding_length": N_EMBD,
    "block_count": N_LAYER,
    "feed_forward_length": N_FF,
}
ATTENTION: Hyper = {
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD_KV,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": N_EMBD // N_HEAD,
    "rope.freq_base": 10000.0,
}
STATE: Hyper = {
    "attention.layer_norm_rms_epsilon": 1e-5,
    "ssm.conv_kernel": N_CONV,
    "ssm.inner_size": 2 * N_EMBD,
    "ssm.state_size": N_STATE,
    "ssm.time_step_rank": N_RANK,
}


def llama_model(vocab: Vocab, seed: int) -> Model:
    """Draw a Llama model: full attention with rotary positions and grouped queries, SwiGLU."""
    rng = np.random.default_rng(seed)
    tensors = embedding_tensors(rng, vocab)
    for layer in range(N_LAYER):
        tensors |= layer_tensors(rng, f"blk.{layer}.")
    return Model("llama", COMMON | ATTENTION, tensors)


def gemma_model(vocab: Vocab, seed: int) -> Model:
    """Draw a Gemma 3 model: the first layer attends to the last N_WINDOW tokens, the second to all."""
    rng = np.random.default_rng(seed)
    tensors = embedding_tensors(rng, vocab)
    tensors["token_embd.weight"] /= np.float32(N_EMBD**0.5)  # the architecture multiplies by it
    for layer in range(N_LAYER):
        prefix = f"blk.{layer}."
        tensors |= layer_tensors(rng, prefix) | gemma_norms(prefix)
    window = {"attention.sliding_window": N_WINDOW, "attention.sliding_window_pattern": N_LAYER}
    return Model("gemma3", COMMON | ATTENTION | window, tensors)


def mamba_model(vocab: Vocab, seed: int) -> Model:
    """Draw a Mamba model: each layer's memory is a state of one size, however long the text."""
    rng = np.random.default_rng(seed)
    tensors = embedding_tensors(rng, vocab)
    for layer in range(N_LAYER):
        tensors |= mamba_tensors(rng, f"blk.{layer}.")
    # Without attention the architecture has no use for heads, but llama.cpp wants the key.
    return Model("mamba", COMMON | STATE | {"attention.head_count": 0, "feed_forward_length": 0}, tensors)


def jamba_model(vocab: Vocab, seed: int) -> Model:
    """Draw a Jamba model: a Mamba layer and a layer of full attention, both with a feed-forward network."""
    rng = np.random.default_rng(seed)
    tensors = embedding_tensors(rng, vocab)
    for layer in range(N_LAYER):
        prefix = f"blk.{layer}."
        of_layer = layer_tensors(rng, prefix)
        if layer == 0:
            of_layer = {name: tensor for name, tensor in of_layer.items() if "attn" not in name}
            of_layer |= mamba_tensors(rng, prefix) | jamba_norms(prefix)
        tensors |= of_layer
    return Model("jamba", COMMON | ATTENTION | STATE | {"attention.head_count_kv": [0, N_HEAD_KV]}, tensors)


def embedding_tensors(rng: np.random.Generator, vocab: Vocab) -> dict[str, Array]:
    """Draw the input and output embeddings, (n_vocab, N_EMBD), whose pinned dimensions carry the prior."""
    pieces = [token.piece for token in vocab.tokens]
    size, free = len(pieces), N_EMBD - PINNED
    embedding = dense(rng, size, N_EMBD, gain=N_EMBD**0.5)
    embedding[:, CONSTANT] = CONSTANT_VALUE
    embedding[:, OPEN] = [OPEN_VALUE * bool(UNFINISHED.search(piece)) for piece in pieces]

    # The last norm divides the stream by its root mean square, which is expected to be this.
    rms = ((CONSTANT_VALUE**2 + free * STREAM_VARIANCE) / N_EMBD) ** 0.5
    output = dense(rng, size, N_EMBD, gain=SPREAD * rms * (N_EMBD / (free * STREAM_VARIANCE)) ** 0.5)
    silent = np.array([not piece for piece in pieces])
    output[silent] = 0.0  # control tokens keep their share in every context
    bias = log_prior(vocab, rng) + silent * SPREAD**2 / 2
    output[:, CONSTANT] = (bias - bias.max()) * rms / CONSTANT_VALUE
    continues = np.array([b"\x80" <= piece[:1] < b"\xc0" for piece in pieces])
    output[:, OPEN] = continues * BOOST * rms / OPEN_VALUE
    norm = np.ones(N_EMBD, np.float32)
    return {"token_embd.weight": embedding, "output_norm.weight": norm, "output.weight": output}


def layer_tensors(rng: np.random.Generator, prefix: str) -> dict[str, Array]:
    """Draw one layer: attention, then the feed-forward network."""
    n_kv = N_EMBD // N_HEAD * N_HEAD_KV
    norm = hiding_norm()
    tensors = {
        "attn_norm.weight": norm,
        "attn_q.weight": dense(rng, N_EMBD, N_EMBD, gain=1.5),
        "attn_k.weight": dense(rng, n_kv, N_EMBD, gain=1.5),
        "attn_v.weight": dense(rng, n_kv, N_EMBD, gain=1.0),
        "attn_output.weight": dense(rng, N_EMBD, N_EMBD, gain=0.7),
        "ffn_norm.weight": norm,
        "ffn_gate.weight": dense(rng, N_FF, N_EMBD, gain=1.0),
        "ffn_up.weight": dense(rng, N_FF, N_EMBD, gain=1.0),
        "ffn_down.weight": dense(rng, N_EMBD, N_FF, gain=0.7),
    }
    tensors["attn_output.weight"][:PINNED] = tensors["ffn_down.weight"][:PINNED] = 0.0
    return {prefix + name: tensor for name, tensor in tensors.items()}


def gemma_norms(prefix: str) -> dict[str, Array]:
    """Give the norms that Gemma 3 adds: of queries and keys, and of what a layer adds to the stream."""
    head = np.full(N_EMBD // N_HEAD, 1.5, np.float32)
    added = np.arange(N_EMBD) >= PINNED
    # The feed-forward part stays small: llama.cpp looks its GELU up in a table of 16-bit floats, which turns a
    # difference in the low bits of a logit into one of higher bits.
    attention, network = (0.6 * added).astype(np.float32), (0.15 * added).astype(np.float32)
    norms = {"attn_q_norm": head, "attn_k_norm": head, "post_attention_norm": attention, "post_ffw_norm": network}
    return {f"{prefix}{name}.weight": tensor for name, tensor in norms.items()}


def mamba_tensors(rng: np.random.Generator, prefix: str) -> dict[str, Array]:
    """Draw one Mamba layer; its states forget within about 10 to 1000 tokens."""
    inner = 2 * N_EMBD
    step = np.exp(rng.uniform(np.log(0.01), np.log(0.1), inner))
    tensors = {
        "attn_norm.weight": hiding_norm(),
        "ssm_in.weight": dense(rng, 2 * inner, N_EMBD, gain=1.0),
        "ssm_conv1d.weight": dense(rng, inner, N_CONV, gain=1.5),
        "ssm_conv1d.bias": np.zeros(inner, np.float32),
        "ssm_x.weight": dense(rng, N_RANK + 2 * N_STATE, inner, gain=1.0),
        "ssm_dt.weight": dense(rng, inner, N_RANK, gain=0.5),
        "ssm_dt.bias": np.log(np.expm1(step)).astype(np.float32),  # the architecture takes its softplus
        "ssm_a": -np.tile(np.linspace(0.1, 1.0, N_STATE, dtype=np.float32), (inner, 1)),
        "ssm_d": np.ones(inner, np.float32),
        "ssm_out.weight": dense(rng, N_EMBD, inner, gain=0.4),
    }
    tensors["ssm_out.weight"][:PINNED] = 0.0
    return {prefix + name: tensor for name, tensor in tensors.items()}


def jamba_norms(prefix: str) -> dict[str, Array]:
    """Give the norms that Jamba adds to a Mamba layer."""
    sizes = {"ssm_dt_norm": N_RANK, "ssm_b_norm": N_STATE, "ssm_c_norm": N_STATE}
    return {f"{prefix}{name}.weight": np.ones(size, np.float32) for name, size in sizes.items()}


def hiding_norm() -> Array:
    """Give a norm that hides the pinned dimensions and undoes how much the constant shrinks the others."""
    norm = np.full(N_EMBD, (CONSTANT_VALUE**2 / N_EMBD + 1.0) ** 0.5, np.float32)
    norm[:PINNED] = 0.0
    return norm


def dense(rng: np.random.Generator, n_out: int, n_in: int, *, gain: float) -> Array:
    """Draw a matrix of shape (n_out, n_in) that multiplies the size of its input by ``gain``."""
    return rng.normal(0.0, gain / n_in**0.5, (n_out, n_in)).astype(np.float32)
