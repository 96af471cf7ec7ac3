"""Models, and settings of members, that are damaged at random: what a start-up has to survive.

`damaged(folder, number)` writes a models.toml and its file; the same number gives the same damage. Each damages one of
five things: the bytes of the header, those of the tensors, the vocabulary, the chat template, or the settings.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import make_tiny_models
import numpy as np
from gguf import GGUFReader, GGUFValueType, TokenType
from make_tiny_models import CHATML, MODELS, write_model
from tiny_vocabularies import Vocab

Random = random.Random


def damaged(folder: Path, number: int) -> tuple[str, Path]:
    """What was damaged, in a word or two, and the models.toml."""
    rng = Random(number)
    kind = list(KINDS)[number % len(KINDS)]
    path = folder / f"{number}.gguf"
    name = rng.choice(list(MODELS))
    settings = KINDS[kind](rng, path, name)
    models = folder / f"{number}.toml"
    lines = ["[[members]]", 'name = "m"', f'path = "{path.name}"']
    defaults = {"n_ctx": 512, "n_threads": 1}
    lines += [f"{key} = {json.dumps(value)}" for key, value in (defaults | settings).items()]
    models.write_text("\n".join(lines) + "\n")
    return f"{kind} of {name}", models


def whole(path: Path, name: str, template: str | None = CHATML, vocab: Vocab | None = None) -> None:
    """Write a tiny model; its weights are those of its own vocabulary."""
    recipe = MODELS[name]
    own = recipe.vocab()
    write_model(path, vocab=vocab or own, model=recipe.weights(own, recipe.seed), chat_template=template)


def damage_header(rng: Random, path: Path, name: str) -> dict[str, object]:
    """Bytes in front of the tensors' data: flipped, removed, put in, or the file ends there."""
    whole(path, name)
    end = GGUFReader(path).data_offset
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(4, end)
        way = rng.randrange(5)
        if way == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[at : at + 8] = rng.randbytes(8)
        elif way == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif way == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            data[at] = rng.choice([0, 0xFF])
    path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
    return {}


def damage_tensors(rng: Random, path: Path, name: str) -> dict[str, object]:
    """Numbers of the weights: random bytes, no numbers, huge ones, zeros."""
    whole(path, name)
    start = GGUFReader(path).data_offset
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 10, 1000])):
        at = start + 4 * rng.randrange((len(data) - start) // 4)
        data[at : at + 4] = rng.choice(
            [rng.randbytes(4), np.float32(np.nan).tobytes(), np.float32(1e38).tobytes(), np.float32(np.inf).tobytes()]
        )
    if rng.random() < 0.2:
        data[start:] = bytes(len(data) - start)
    path.write_bytes(data)
    return {}


def damage_vocabulary(rng: Random, path: Path, name: str) -> dict[str, object]:
    """Tokens, kinds, scores and merges that do not go together, and keys that say something else."""
    vocab = MODELS[name].vocab()
    tokens = list(vocab.tokens)
    for _ in range(rng.choice([1, 3, 50])):
        i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        tokens[i] = rng.choice(
            [
                lambda i=i, j=j: tokens[j],
                lambda i=i: replace(tokens[i], text=""),
                lambda i=i: replace(tokens[i], text=rng.choice(["\n", " ", "\0", "a" * 5000, "<0xZZ>", "▁", "\u2028"])),
                lambda i=i: replace(tokens[i], type=rng.choice(list(TokenType))),
                lambda i=i: replace(tokens[i], score=rng.choice([np.nan, np.inf, -np.inf, 1e30])),
            ]
        )()
    merges = list(vocab.merges)
    if merges and rng.random() < 0.5:
        merges[rng.randrange(len(merges))] = rng.choice(["", "a", "a b c", "x" * 500 + " y", "\0 \0"])
    damaged_vocab = replace(vocab, tokens=tokens, merges=merges)
    changes = [rng.choice(_KEYS)(rng) for _ in range(rng.choice([0, 1, 2]))]
    add = make_tiny_models.add_vocab

    def add_damaged(writer: gguf.GGUFWriter, _: Vocab) -> None:
        add(writer, damaged_vocab if all(_named(damaged_vocab)) else vocab)
        for key, value, of in changes:
            if value is None:
                writer.kv_data[0].pop(key, None)
            else:
                writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value=value, type=of)

    make_tiny_models.add_vocab = add_damaged
    try:
        whole(path, name)
    finally:
        make_tiny_models.add_vocab = add
    return {}


def _named(vocab: Vocab) -> list[bool]:
    """Whether the tokens that `add_vocab` looks up by name are still there."""
    texts = {token.text for token in vocab.tokens}
    return [vocab.bos in texts, vocab.eos in texts, vocab.model == "gpt2" or "<unk>" in texts]


_KEYS: list[Callable[[Random], tuple[str, object, GGUFValueType]]] = [
    lambda rng: (
        f"tokenizer.ggml.{rng.choice(['bos', 'eos', 'eot', 'eom', 'padding', 'unknown'])}_token_id",
        rng.choice([0, 1, 399, 400, 2**31 - 1, 2**32 - 1]),
        GGUFValueType.UINT32,
    ),
    lambda rng: ("tokenizer.ggml.pre", rng.choice(["", "llama-bpe", "qwen2", "nonsense", "deepseek-llm"]), _TEXT),
    lambda rng: (
        "tokenizer.ggml.model",
        rng.choice(["", "llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "nonsense", "none"]),
        _TEXT,
    ),
    lambda rng: (f"tokenizer.ggml.{rng.choice(['add_bos_token', 'add_space_prefix'])}", rng.random() < 0.5, _BOOL),
    lambda rng: (
        f"tokenizer.ggml.{rng.choice(['merges', 'scores', 'token_type', 'pre', 'eos_token_id'])}",
        None,
        _TEXT,
    ),
    lambda rng: ("general.architecture", rng.choice(["", "qwen2", "t5", "nonsense"]), _TEXT),
]
_TEXT, _BOOL = GGUFValueType.STRING, GGUFValueType.BOOL


def damage_template(rng: Random, path: Path, name: str) -> dict[str, object]:
    """A chat template that is cut off, mixed up, endless or hostile."""
    source = rng.choice(TEMPLATES)
    if rng.random() < 0.5:
        characters = list(rng.choice([source, CHATML]))
        for _ in range(rng.choice([1, 3, 10])):
            at = rng.randrange(max(1, len(characters)))
            characters[at : at + rng.randrange(3)] = rng.choice(["{%", "%}", "{{", "}}", "'", "", "\x1b[2J", "\ufeff"])
        source = "".join(characters)
    whole(path, name, source)
    return {}


TEMPLATES = [
    CHATML,
    "",
    " \n",
    "\ufeff" + CHATML,
    "{{ messages }}",
    "{{ messages[0].content }}",
    "{{ messages[0]['content'][0]['text'] }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{{ raise_exception('\\x1b]0;no\\x07') }}",
    "{{ 1 // 0 }}",
    "{{ undefined.attribute }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ 'a' * 100000000 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in messages %}" * 30 + "{{ a }}" + "{% endfor %}" * 30,
    "{% if a %}" * 300 + "{% endif %}" * 300,
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{% include 'x' %}{% extends 'y' %}",
]


def damage_settings(rng: Random, path: Path, name: str) -> dict[str, object]:
    """Settings of a member that do not go with the model or with each other, and files that are something else."""
    whole(path, name, rng.choice([None, CHATML]))
    other = path.with_suffix(".other")
    other.write_bytes(rng.choice([b"", b"{}", b"GGUF", rng.randbytes(300), path.read_bytes(), b"{{ messages }}"]))
    choices: dict[str, list[object]] = {
        "n_ctx": [0, 1, 255, 257, 2048, 10**6, 2**31 - 1, -1],
        "n_batch": [1, 2, 7, 513, 10**9, 0],
        "n_threads": [1, 2, 64, 512, 513],
        "n_gpu_layers": [-1, 0, 1, 10**6],
        "main_gpu": [0, 5, 10**6],
        "tensor_split": [[1], [0.5] * 16, [0.5] * 17, [0.5] * 200, [0]],
        "flash_attn": [True, False],
        "swa_full": [True, False],
        "type_k": ["f32", "f16", "bf16", "q8_0", "q4_0", "q5_1", "iq4_nl", "nonsense"],
        "type_v": ["f32", "f16", "bf16", "q8_0", "q4_0", "iq4_nl"],
        "lora": [other.name, path.name, "nothing"],
        "tokenizer": [other.name, path.name, "nothing"],
        "chat_template": [
            "plain",
            "chatml",
            "llama2",
            "mistral-v7",
            "nonsense",
            f"./{other.name}",
            "./nothing",
            "a\0/b",
        ],
        "temperature": [0, 1e-300, 1e300, 3],
        "top_k": [0, 1, 10**9],
    }
    chosen = rng.sample(list(choices), rng.choice([1, 2, 2, 4]))
    return {key: rng.choice(choices[key]) for key in chosen}


KINDS: dict[str, Callable[[Random, Path, str], dict[str, object]]] = {
    "header": damage_header,
    "tensors": damage_tensors,
    "vocabulary": damage_vocabulary,
    "template": damage_template,
    "settings": damage_settings,
}
