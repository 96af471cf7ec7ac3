"""Write the tiny random-weight GGUF models that the tests run on.

Contract: ``make_all(folder)`` writes one file per name in ``NAMES`` and returns their paths. The bytes are
the same on every run; each file is well under 1 MB. The models have learnt nothing, but their next-token
distributions look like a model's: mostly 2 to 4 nats of entropy that depend on the context, an end of
generation about every fifty tokens, many letters and spaces, now and then a piece that cuts a character.

    bpe_a, bpe_b   one byte-level BPE vocabulary, two sets of weights; only bpe_a has a chat template (ChatML)
    bpe_c          another byte-level BPE vocabulary, which starts every prompt with <s>
    spm            a SentencePiece vocabulary with byte tokens and a space prefix

A vocabulary knows nothing of weights; weights take nothing from a vocabulary but the kinds and bytes of its
tokens; ``write_model`` puts both into a file, so a test can pass it a damaged one.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter, TokenType
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

Array = NDArray[np.float32]

STORY = """\
The harbour was quiet when the first boats came home. Anna stood on the wall and counted the lights: one, two,
and then the small green one that was always late. "Where have you been?" she asked, and her brother laughed.
There is a café 😀 at the end of the harbour where they serve the best crème brûlée of the whole coast. They
talked about the weather, the price of the nets and other things that people talk about when they are tired.
def count(words: list[str]) -> dict[str, int]:
    result = {}
    for word in words:
        result[word] = result.get(word, 0) + 1
    return result
Grüße aus Köln! Schöne Tage, größere Wörter, über den Fluss. Où est la bibliothèque ? Là-bas, à côté d'ici.
¿Qué tal, señor? Mañana será otro día 👋👋. In 2019 there were 1200 people; in 2020 there were 1300 😀😀.
"""
MANUAL = """\
To install the pump, first close the main valve and wait until the pressure gauge shows zero. Never open the
cover while the motor is running! Check the seal, the spring and the screws; replace every part that shows
signs of wear. 1. Turn the handle to the left. 2. Pull the lever. 3. Insert the cartridge (see figure 12) and
press it until it clicks. If the lamp is red, the filter must be cleaned: rinse it under running water ✅.
Température maximale : 85 °C. Größe: 40 mm. Přečtěte si návod. Осторожно, горячо! 注意してください。⚠️ 🔧🔧
SELECT part, price FROM stock WHERE price > 100 ORDER BY price;
if (pressure > limit) { stop(motor); return -1; } else { start(motor); return 0; }
"""
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# llama.cpp takes these for an end of generation by their names.
ENDS = {"<|endoftext|>", "<|im_end|>", "</s>"}


@dataclass(frozen=True, slots=True)
class Token:
    """One entry of a vocabulary; its position there is its id."""

    text: str
    type: TokenType
    piece: bytes  # what it adds to the output; b"" for control tokens
    score: float = 0.0  # SentencePiece only: of two possible merges, the higher score comes first


@dataclass(frozen=True, slots=True)
class Vocab:
    """A tokenizer as GGUF stores it."""

    model: str  # tokenizer.ggml.model: "gpt2" (byte-level BPE) or "llama" (SentencePiece)
    tokens: list[Token]
    bos: str
    eos: str
    add_bos: bool
    merges: list[str]  # byte-level BPE only, "left right" in order


@dataclass(frozen=True, slots=True)
class Model:
    """One architecture's hyperparameters (GGUF keys without the architecture's name) and its tensors."""

    arch: str
    hyper: dict[str, int | float]
    tensors: dict[str, Array]


def train_bpe(words: list[str], merges: int, alphabet: list[str]) -> tuple[list[str], list[str]]:
    """Learn merges inside ``words``; give the tokens, single characters first, and "left right" merges."""
    tokenizer = Tokenizer(models.BPE())
    size = len(set(alphabet).union(*words)) + merges
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    return sorted(learnt["vocab"], key=learnt["vocab"].get), [" ".join(pair) for pair in learnt["merges"]]


def byte_pieces(text: str, merges: int) -> tuple[list[Token], list[str]]:
    """Train a GPT-2 style tokenizer; give its 256 byte tokens with the learnt ones, and the merges."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    learnt, pairs = train_bpe([word for word, _ in split], merges, pre_tokenizers.ByteLevel.alphabet())
    to_byte = gpt2_bytes()
    return [Token(t, TokenType.NORMAL, bytes(to_byte[char] for char in t)) for t in learnt], pairs


def gpt2_bytes() -> dict[str, int]:
    """Give GPT-2's map from the printable character in a token's text to the byte it stands for."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def control(*texts: str) -> list[Token]:
    """Control tokens, which add nothing to the output."""
    return [Token(text, TokenType.CONTROL, b"") for text in texts]


def chatml_vocab() -> Vocab:
    """Byte-level BPE, 400 tokens, ChatML's control tokens last."""
    tokens, pairs = byte_pieces(STORY, merges=141)
    tokens += control("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return Vocab("gpt2", tokens, bos="<|endoftext|>", eos="<|endoftext|>", add_bos=False, merges=pairs)


def bos_vocab() -> Vocab:
    """Byte-level BPE, 350 tokens, with a beginning of sequence, control tokens first."""
    tokens, pairs = byte_pieces(MANUAL, merges=92)
    return Vocab("gpt2", control("<s>", "</s>") + tokens, bos="<s>", eos="</s>", add_bos=True, merges=pairs)


def spm_vocab() -> Vocab:
    """SentencePiece, about 620 tokens; characters past Latin Extended-A are left to the byte tokens."""
    latin = re.sub(r"[^\n -\u017f]", "", STORY + MANUAL)
    words = [word.replace(" ", "▁") for word in re.findall(r" ?[^ \n]+| +", latin)]
    learnt, pairs = train_bpe(words, 250, [chr(code) for code in range(0x21, 0x7F)])
    # Single characters come first but rank last; minus the rank keeps the merges in the order of learning.
    ranks = [*range(len(pairs), len(learnt)), *range(len(pairs))]
    tokens = [Token("<unk>", TokenType.UNKNOWN, b""), *control("<s>", "</s>")]
    tokens += [Token(f"<0x{byte:02X}>", TokenType.BYTE, bytes([byte])) for byte in range(256)]
    for text, rank in zip(learnt, ranks, strict=True):
        tokens.append(Token(text, TokenType.NORMAL, text.replace("▁", " ").encode(), -float(rank)))
    return Vocab("llama", tokens, bos="<s>", eos="</s>", add_bos=True, merges=[])


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
SPREAD = 1.9  # standard deviation of the part of a logit that the context decides
BOOST = 4.0  # added to the logits of continuation bytes after an unfinished character
# The architecture has no output bias. Two dimensions of the residual stream that no layer reads or writes do
# its work: one holds a constant, the other says that the last piece left a character unfinished.
CONSTANT, OPEN, PINNED = 0, 1, 2
CONSTANT_VALUE, OPEN_VALUE = 8.0, 4.0
STREAM_VARIANCE = 1.7  # of the other dimensions after the last layer, as measured
UNFINISHED = re.compile(rb"([\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")


def llama_model(vocab: Vocab, seed: int) -> Model:
    """Draw a Llama model: full attention with rotary positions and grouped queries, SwiGLU."""
    rng = np.random.default_rng(seed)
    tensors = embedding_tensors(rng, vocab)
    for layer in range(N_LAYER):
        tensors |= layer_tensors(rng, f"blk.{layer}.")
    hyper: dict[str, int | float] = {
        "context_length": N_CTX,
        "embedding_length": N_EMBD,
        "block_count": N_LAYER,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": N_EMBD // N_HEAD,
        "rope.freq_base": 10000.0,
    }
    return Model("llama", hyper, tensors)


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
    # Hide the pinned dimensions and undo how much the constant makes the norm shrink the others.
    norm = np.full(N_EMBD, (CONSTANT_VALUE**2 / N_EMBD + 1.0) ** 0.5, np.float32)
    norm[:PINNED] = 0.0
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


def dense(rng: np.random.Generator, n_out: int, n_in: int, *, gain: float) -> Array:
    """Draw a matrix of shape (n_out, n_in) that multiplies the size of its input by ``gain``."""
    return rng.normal(0.0, gain / n_in**0.5, (n_out, n_in)).astype(np.float32)


def write_model(path: Path, *, vocab: Vocab, model: Model, chat_template: str | None = None) -> None:
    """Write a GGUF file with 32-bit floats."""
    writer = GGUFWriter(path, model.arch)
    writer.add_name(path.stem)
    for key, value in model.hyper.items():
        of = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.FLOAT32
        writer.add_key_value(f"{model.arch}.{key}", value, of)
    add_vocab(writer, vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, tensor in model.tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocab(writer: GGUFWriter, vocab: Vocab) -> None:
    """Add the tokenizer's keys to the file."""
    texts = [token.text for token in vocab.tokens]
    writer.add_tokenizer_model(vocab.model)
    writer.add_token_list(texts)
    writer.add_token_types([token.type for token in vocab.tokens])
    if vocab.model == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(vocab.merges)
    else:
        writer.add_token_scores([token.score for token in vocab.tokens])
        writer.add_add_space_prefix(True)
        writer.add_unk_token_id(texts.index("<unk>"))
    writer.add_bos_token_id(texts.index(vocab.bos))
    writer.add_eos_token_id(texts.index(vocab.eos))
    writer.add_add_bos_token(vocab.add_bos)


MODELS: dict[str, tuple[Callable[[], Vocab], int, str | None]] = {
    "bpe_a": (chatml_vocab, 1, CHATML),
    "bpe_b": (chatml_vocab, 2, None),
    "bpe_c": (bos_vocab, 3, None),
    "spm": (spm_vocab, 4, None),
}
NAMES = tuple(MODELS)


def make_all(folder: Path) -> dict[str, Path]:
    """Write every model into ``folder``, made where it is missing; give the path of each by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.gguf" for name in NAMES}
    for name, (make_vocab, seed, template) in MODELS.items():
        vocab = make_vocab()
        write_model(paths[name], vocab=vocab, model=llama_model(vocab, seed), chat_template=template)
    return paths


def main() -> None:
    """Write the models into the folder named on the command line and list them."""
    parser = argparse.ArgumentParser(description="Write tiny random-weight GGUF models for the tests.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write them")
    for path in make_all(parser.parse_args().folder).values():
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
