"""The vocabularies of the tiny models: small tokenizers, trained on two texts here, as GGUF stores them.

Knows nothing of weights.
"""

import json
import re
from dataclasses import dataclass

from gguf import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

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
