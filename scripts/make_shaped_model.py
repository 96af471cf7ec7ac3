"""Write a GGUF model in exactly the shape of one of the paper's models, with random weights, in seconds.

Contract: ``make(name, path)`` writes one file or raises; a file with the given name is always whole. The models have
learnt nothing, but they take as long as the real ones for every token, so they give the speed of the paper's
ensembles without its weights. What they say depends on the context, has 3 to 4 nats of entropy per token, and is made
of the commonest pieces of plain ASCII: about 4 bytes each, and a piece takes 1.03 to 1.13 tokens of another member's
vocabulary, as in English (rare pieces would take up to 1.5, and cost an ensemble more than real text does). They
hardly ever end a generation.

All matrices have one format, norms are 1 and kept in 32 bits. (``llama-quantize`` would keep the output matrix of a
Q4_0 file in Q6_K; here it is Q4_0 as well.)

Shapes: the config.json of Qwen/Qwen2.5-3B, Qwen/Qwen2.5-Math-1.5B, openchat/openchat_3.5,
NousResearch/Nous-Hermes-2-Mistral-7B-DPO, teknium/OpenHermes-2.5-Mistral-7B, mistralai/Mistral-7B-Instruct-v0.2 and
deepseek-ai/deepseek-llm-7b-chat on Hugging Face, whose parameter counts the tests check. The fine-tuned Mistrals have
two more tokens, their end of turn first. llama.cpp runs Mistral as a Llama without a sliding window.
Vocabularies: llama.cpp's sources (``scripts/fetch_vocabularies.py``); Llama 2's stands for Mistral's of the same size.
"""

import argparse
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from fetch_vocabularies import folder
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from random_blocks import BLOCK, FORMATS, Format, Pools
from vocabulary_files import Metadata, VocabularyError, read_vocabulary

HEAD = 128  # size of a head, in all of the models
CHATML = ("<|im_end|>", "<|im_start|>")


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that decide what a model costs, and the vocabulary file that goes with them."""

    name: str
    arch: str
    vocabulary: str
    n_vocab: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_ctx: int
    rope_base: float
    norm_epsilon: float
    tied: bool = False  # the output matrix is the embedding
    biased: bool = False  # queries, keys and values have biases
    added: tuple[str, ...] = ()  # control tokens that the vocabulary file lacks

    @property
    def n_embd(self) -> int:
        """Width of the residual stream."""
        return self.n_head * HEAD


QWEN_3B = Shape("qwen2.5-3b", "qwen2", "qwen2", 151_936, 36, 16, 2, 11_008, 32_768, 1e6, 1e-6, tied=True, biased=True)
MISTRAL = Shape("mistral-7b-instruct-v0.2", "llama", "llama-spm", 32_000, 32, 32, 8, 14_336, 32_768, 1e6, 1e-5)
TUNED = replace(MISTRAL, n_vocab=32_002, rope_base=1e4, added=CHATML)
SHAPES = {
    shape.name: shape
    for shape in (
        QWEN_3B,
        replace(QWEN_3B, name="qwen2.5-math-1.5b", n_layer=28, n_head=12, n_ff=8_960, n_ctx=4_096, rope_base=1e4),
        replace(TUNED, name="openchat-3.5", n_ctx=8_192, added=("<|end_of_turn|>", "<|pad_0|>")),
        replace(TUNED, name="nous-hermes-2-mistral-7b"),
        replace(TUNED, name="openhermes-2.5-mistral-7b"),
        MISTRAL,
        Shape("deepseek-llm-7b", "llama", "deepseek-llm", 102_400, 30, 32, 32, 11_008, 4_096, 1e4, 1e-6),
    )
}


def scaled(shape: Shape, scale: float) -> Shape:
    """Shrink a shape in depth and width, ``scale`` in (0, 1]; heads keep their size and the vocabulary its tokens."""
    n_head = max(1, round(shape.n_head * scale))
    most = max(1, round(shape.n_head_kv * scale))
    return replace(
        shape,
        n_layer=max(1, round(shape.n_layer * scale)),
        n_head=n_head,
        n_head_kv=max(n for n in range(1, most + 1) if n_head % n == 0),
        n_ff=max(1, round(shape.n_ff * scale / HEAD)) * HEAD,
    )


# The sizes that keep the numbers inside sane. Random weights add up in the residual stream; what the layers add is
# made much larger than the embedding, or tied embeddings would make the model repeat its last token.
LOGITS = 4.0  # standard deviation of the logits of common tokens
STREAM = 10.0  # about the root mean square of the residual stream after the last layer
SCORES = 1.5  # gain of queries and of keys: attention picks some tokens, not the mean of all
MUTED = 0.25  # what the logits of the other tokens are multiplied by
COMMON_IDS = 4_000  # tokens are numbered in the order they were learnt, so the commonest come first
COMMON_TEXT = re.compile("[Ġ▁]?[!-~]+")  # printable ASCII, a space before it as byte-level BPE or SentencePiece has it


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: a matrix of shape (rows, columns) in blocks, or a vector of 32-bit floats, (columns,)."""

    name: str
    rows: int | None
    columns: int
    value: float = 0.0  # of a vector
    gain: float = 0.0  # how a matrix multiplies the size of its input
    speaks: bool = False  # a row is a token's logit


def tensors(shape: Shape) -> Iterator[Tensor]:
    """Give a model's tensors in the order of the file."""
    n_embd, n_kv, n_ff = shape.n_embd, shape.n_head_kv * HEAD, shape.n_ff
    added = STREAM / shape.n_layer**0.5
    yield Tensor("token_embd.weight", shape.n_vocab, n_embd, gain=LOGITS, speaks=shape.tied)
    if not shape.tied:
        yield Tensor("output.weight", shape.n_vocab, n_embd, gain=LOGITS, speaks=True)
    yield Tensor("output_norm.weight", None, n_embd, value=1.0)
    for layer in range(shape.n_layer):
        of = f"blk.{layer}."
        yield Tensor(f"{of}attn_norm.weight", None, n_embd, value=1.0)
        yield Tensor(f"{of}attn_q.weight", n_embd, n_embd, gain=SCORES)
        yield Tensor(f"{of}attn_k.weight", n_kv, n_embd, gain=SCORES)
        yield Tensor(f"{of}attn_v.weight", n_kv, n_embd, gain=1.0)
        if shape.biased:
            yield Tensor(f"{of}attn_q.bias", None, n_embd)
            yield Tensor(f"{of}attn_k.bias", None, n_kv)
            yield Tensor(f"{of}attn_v.bias", None, n_kv)
        yield Tensor(f"{of}attn_output.weight", n_embd, n_embd, gain=added)
        yield Tensor(f"{of}ffn_norm.weight", None, n_embd, value=1.0)
        yield Tensor(f"{of}ffn_gate.weight", n_ff, n_embd, gain=1.0)
        yield Tensor(f"{of}ffn_up.weight", n_ff, n_embd, gain=1.0)
        yield Tensor(f"{of}ffn_down.weight", n_embd, n_ff, gain=added)


def parameters(shape: Shape) -> int:
    """Count a model's weights; tied ones count once."""
    return sum((tensor.rows or 1) * tensor.columns for tensor in tensors(shape))


def n_bytes(tensor: Tensor, of: Format) -> int:
    """Give the size of a tensor."""
    if tensor.rows is None:
        return tensor.columns * 4
    return tensor.rows * (tensor.columns // BLOCK) * of.block_bytes


def weights_size(shape: Shape, of: str) -> int:
    """Give the bytes of all tensors in a format named in FORMATS; the vocabulary adds up to 6 MB to the file."""
    return sum(n_bytes(tensor, FORMATS[of]) for tensor in tensors(shape))


def make(name: str, path: Path, *, of: str = "q4_0", scale: float = 1.0, vocabularies: Path | None = None) -> Shape:
    """Write the shape called ``name``, shrunk by ``scale``, in a format named in FORMATS; give what was written.

    The same call writes the same bytes. Raises VocabularyError or OSError, and then leaves no file behind.
    """
    shape = scaled(SHAPES[name], scale)
    source = (vocabularies or folder()) / f"ggml-vocab-{shape.vocabulary}.gguf"
    if not source.exists():
        raise VocabularyError(f"no {source}: run scripts/fetch_vocabularies.py, or name their folder by --vocabularies")
    vocabulary = read_vocabulary(source, size=shape.n_vocab, added=shape.added)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        write(part, shape, vocabulary, FORMATS[of])
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return shape


def write(path: Path, shape: Shape, vocabulary: Metadata, of: Format) -> None:
    """Write a model file, one tensor after the other, without holding any of them in memory."""
    writer = GGUFWriter(path, shape.arch)
    add_shape(writer, shape, of)
    for key, field in vocabulary.items():
        writer.add_key_value(key, field.value, field.type, field.sub_type)
    for tensor in tensors(shape):
        dims = (tensor.columns,) if tensor.rows is None else (tensor.rows, tensor.columns)
        kind = GGMLQuantizationType.F32 if tensor.rows is None else of.tensor_type
        writer.add_tensor_info(tensor.name, dims, np.dtype(np.float32), n_bytes(tensor, of), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    rng = np.random.default_rng(zlib.crc32(shape.name.encode()))
    pools, common = Pools(of, seed=int(rng.integers(2**32))), common_tokens(vocabulary)
    for tensor in tensors(shape):
        writer.write_padding(file, file.tell())
        write_tensor(file, tensor, pools, common, start=int(rng.integers(2**32)))
    writer.write_padding(file, file.tell())
    writer.close()


def add_shape(writer: GGUFWriter, shape: Shape, of: Format) -> None:
    """Add the keys that describe a model to its file."""
    writer.add_name(f"{shape.name}, random weights")
    writer.add_file_type(of.file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(shape.n_vocab)


def write_tensor(file: BinaryIO, tensor: Tensor, pools: Pools, common: np.ndarray, *, start: int) -> None:
    """Write one tensor's data; ``start`` is the block of the pool that it begins with."""
    if tensor.rows is None:
        file.write(np.full(tensor.columns, tensor.value, "<f4").tobytes())
        return
    spread, row = tensor.gain / tensor.columns**0.5, tensor.columns // BLOCK
    if not tensor.speaks:
        pools.write(file, weights=tensor.rows * tensor.columns, spread=spread, at=start)
        return
    edges = np.flatnonzero(np.diff(common)) + 1  # common tokens and others come in runs
    for first, end in zip([0, *edges.tolist()], [*edges.tolist(), tensor.rows], strict=True):
        size = spread if common[first] else spread * MUTED
        pools.write(file, weights=(end - first) * tensor.columns, spread=size, at=start + first * row)


def common_tokens(vocabulary: Metadata) -> np.ndarray:
    """Say of each token whether the model is to use it, as truth values of shape (n_vocab,)."""
    texts, types = vocabulary["tokenizer.ggml.tokens"].value, vocabulary["tokenizer.ggml.token_type"].value
    common = np.zeros(len(texts), bool)
    for i in range(min(COMMON_IDS, len(texts))):
        common[i] = types[i] == TokenType.NORMAL and COMMON_TEXT.fullmatch(texts[i].decode())
    return common


def scale_argument(text: str) -> float:
    """Read the value of --scale."""
    scale = float(text)
    if not 0 < scale <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return scale


def table() -> str:
    """List the shapes with their sizes."""
    lines = [f"  {'SHAPE':26}{'weights':>9}" + "".join(f"{of:>11}" for of in FORMATS)]
    for name, shape in SHAPES.items():
        sizes = "".join(f"{weights_size(shape, of) / 1e9:8.2f} GB" for of in FORMATS)
        lines.append(f"  {name:26}{parameters(shape) / 1e9:7.2f} B{sizes}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the model named on the command line; give the exit status."""
    parser = argparse.ArgumentParser(
        description="Write a GGUF model with random weights in the shape of one of the paper's models.",
        epilog=f"shapes:\n{table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shape", metavar="SHAPE", choices=SHAPES, help="one of the shapes below")
    parser.add_argument("file", type=Path, metavar="FILE", help="where to write it")
    parser.add_argument("--type", choices=FORMATS, default="q4_0", help="format of the matrices (default: q4_0)")
    parser.add_argument("--scale", type=scale_argument, default=1.0, help="shrink depth and width by this (default: 1)")
    parser.add_argument("--vocabularies", type=Path, metavar="DIR", help="ggml-vocab-*.gguf")
    given = parser.parse_args(arguments)
    began = time.perf_counter()
    try:
        shape = make(given.shape, given.file, of=given.type, scale=given.scale, vocabularies=given.vocabularies)
    except (VocabularyError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    seconds, size = time.perf_counter() - began, given.file.stat().st_size
    print(
        f"{given.file}  {parameters(shape):,} weights  {size:,} bytes  {seconds:.1f} s  {size / seconds / 1e9:.2f} GB/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
