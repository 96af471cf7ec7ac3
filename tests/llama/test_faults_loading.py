"""Files that are no models and models that cannot be used: a clear error each, and nothing else is touched.

The files are loaded in a process of their own, next to an ensemble that is in use there: an abort inside llama.cpp
would end that process, and so fail its test.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import processes
import pytest
from conftest import ROOT, logits_of
from gguf import GGUFValueType, GGUFWriter, TokenType
from make_tiny_models import CHATML, write_model
from selection import slow_but
from tiny_architectures import Array, Model, llama_model
from tiny_vocabularies import Token, chatml_vocab

from me_local import Ensemble, LoadError, Overrides
from me_local.llama import context
from me_local.llama.member import Member

OpenEnsemble = Callable[..., Ensemble]
OpenMember = Callable[..., Member]
WriteModels = Callable[..., Path]

EMBEDDINGS = ("token_embd.weight", "output.weight")  # a row for each token
SETTINGS = {"seed": 1, "max_tokens": 15}
# Prints, as JSON, the error of each models.toml after the first and then a reply of the first. With a limit, in bytes,
# the process can take no more than that when the others are loaded.
LOADER = f"""
import json, resource, sys
import me_local
good, limit, *others = sys.argv[1:]
with me_local.load(good) as ensemble:
    if int(limit):
        used = 1024 * int(open("/proc/self/status").read().split("VmSize:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + int(limit), -1))
    for models in others:
        try:
            me_local.load(models).close()
        except me_local.LoadError as error:
            print(json.dumps(str(error)))
        else:
            print("null")
    print(json.dumps(ensemble.generate("Hello", me_local.Overrides(**{SETTINGS})).text))
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A fault: how its files are made, settings of the member, and what the message says."""

    make: Callable[[Path, Path], list[Path]]  # folder, a good model
    message: str
    setting: str = ""
    limit: int = 0


def writes(*contents: bytes) -> Callable[[Path, Path], list[Path]]:
    def make(folder: Path, good: Path) -> list[Path]:
        paths = [folder / f"file{i}.gguf" for i in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return paths

    return make


def truncated(folder: Path, good: Path) -> list[Path]:
    whole = good.read_bytes()
    ends = np.random.default_rng(10).integers(1, len(whole), 10)
    return writes(*(whole[:end] for end in ends))(folder, good)


def noise(seed: int, head: bytes = b"") -> bytes:
    return head + np.random.default_rng(seed).bytes(3000)


def counts(tensors: int, keys: int) -> bytes:
    """The beginning of a GGUF of version 3."""
    return b"GGUF\3\0\0\0" + tensors.to_bytes(8, "little") + keys.to_bytes(8, "little")


def write_gguf(path: Path, arch: str, keys: Mapping[str, object], tensors: Mapping[str, Array]) -> Path:
    """A GGUF of these keys and tensors and nothing else."""
    writer = GGUFWriter(path, arch)
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, bool: GGUFValueType.BOOL}
            writer.add_key_value(key, value, kinds.get(type(value), GGUFValueType.FLOAT32))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def without_vocabulary(folder: Path, good: Path) -> list[Path]:
    model = llama_model(chatml_vocab(), 1)
    keys = {f"llama.{key}": value for key, value in model.hyper.items()}
    return [write_gguf(folder / "none.gguf", "llama", keys, model.tensors)]


def empty_vocabulary(folder: Path, good: Path) -> list[Path]:
    model = llama_model(chatml_vocab(), 1)
    keys = {f"llama.{key}": value for key, value in model.hyper.items()}
    keys |= {"tokenizer.ggml.model": "none", "llama.vocab_size": 400}
    return [write_gguf(folder / "empty.gguf", "llama", keys, model.tensors)]


def embedding_model(folder: Path, good: Path) -> list[Path]:
    """BERT with one layer of width 8."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{mark}{c}" for mark in ("", "▁") for c in "abcdefgh")]
    shapes = {"attn_q": (8, 8), "attn_k": (8, 8), "attn_v": (8, 8), "attn_output": (8, 8)}
    shapes |= {"ffn_up": (16, 8), "ffn_down": (8, 16)}
    tensors = {f"blk.0.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    tensors |= {f"blk.0.{name}.bias": np.ones(shape[0], np.float32) for name, shape in shapes.items()}
    for norm in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        tensors |= {f"{norm}.{part}": np.ones(8, np.float32) for part in ("weight", "bias")}
    rows = {"token_embd": len(words), "token_types": 2, "position_embd": 64}
    tensors |= {f"{name}.weight": np.ones((count, 8), np.float32) for name, count in rows.items()}
    numbers = {"context_length": 64, "embedding_length": 8, "block_count": 1, "feed_forward_length": 16}
    keys: dict[str, object] = {f"bert.{key}": value for key, value in numbers.items()}
    keys |= {"bert.attention.head_count": 2, "bert.attention.layer_norm_epsilon": 1e-12}
    keys |= {"bert.attention.causal": False, "tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": words}
    keys |= {"tokenizer.ggml.token_type": [3] * 5 + [1] * 16, "tokenizer.ggml.token_type_count": 2}
    for i, name in enumerate(["padding", "unknown", "cls", "seperator", "mask"]):  # "seperator" is how GGUF spells it
        keys[f"tokenizer.ggml.{name}_token_id"] = i
    return [write_gguf(folder / "bert.gguf", "bert", keys, tensors)]


def resized(tokens: int, rows: int) -> Callable[[Path, Path], list[Path]]:
    """A vocabulary with `tokens` more tokens than bpe_a's, and embeddings with `rows` more rows."""

    def make(folder: Path, good: Path) -> list[Path]:
        vocab, model = chatml_vocab(), llama_model(chatml_vocab(), 1)
        more = [Token(f"more{i}", TokenType.NORMAL, f"more{i}".encode()) for i in range(tokens)]
        wider = {name: np.resize(model.tensors[name], (400 + rows, 32)) for name in EMBEDDINGS}
        path = folder / "resized.gguf"
        write_model(
            path,
            vocab=replace(vocab, tokens=vocab.tokens + more),
            model=Model(model.arch, model.hyper, model.tensors | wider),
        )
        return [path]

    return make


def trained_long(folder: Path, good: Path) -> list[Path]:
    """bpe_a, but its header says that it was trained with two billion tokens."""
    vocab, model = chatml_vocab(), llama_model(chatml_vocab(), 1)
    path = folder / "long.gguf"
    hyper = model.hyper | {"context_length": 2**31 - 256}
    write_model(path, vocab=vocab, model=Model(model.arch, hyper, model.tensors))
    return [path]


def adapter(path: Path, arch: str = "llama", layer: int = 0, width: int = 32) -> Path:
    """A LoRA of rank 2 for the queries of one layer."""
    random = np.random.default_rng(3)
    name = f"blk.{layer}.attn_q.weight.lora_"
    pair = {"a": random.normal(size=(2, width)), "b": random.normal(size=(width, 2))}
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    return write_gguf(path, arch, keys, {name + key: value.astype(np.float32) for key, value in pair.items()})


def with_adapter(**settings: object) -> Callable[[Path, Path], list[Path]]:
    def make(folder: Path, good: Path) -> list[Path]:
        adapter(folder / "lora.gguf", **settings)  # type: ignore[arg-type]
        return [good]

    return make


def with_noise_as_adapter(folder: Path, good: Path) -> list[Path]:
    writes(noise(4))(folder, good)
    return [good]


ROWS = {
    "missing": Row(lambda folder, good: [folder / "gone.gguf"], r"gone\.gguf: there is no such file$"),
    "a folder": Row(lambda folder, good: [folder], "not a regular file$"),
    # Fails at the first read, for root too.
    "unreadable": Row(lambda folder, good: [Path("/proc/self/mem")], "cannot be read: Input/output error$"),
    "empty": Row(writes(b""), r"not a GGUF file \(it does not start with the letters GGUF\)$"),
    "another format": Row(writes(b"PK\x03\x04 something"), "not a GGUF file"),
    "random bytes": Row(writes(*map(noise, range(5))), "not a GGUF file"),
    "a magic alone": Row(writes(b"GGUF"), "cannot be loaded: "),
    "random bytes behind a magic": Row(
        writes(*(noise(seed, b"GGUF") for seed in range(5))), "cannot be loaded: .*(version|endian)"
    ),
    "random bytes behind a version": Row(
        writes(*(noise(i, b"GGUF\3\0\0\0") for i in range(5))),
        "cannot be loaded: .*number of (tensors|key-value pairs)",
    ),
    "random bytes behind a header": Row(
        writes(*(noise(i, counts(t, k)) for i, (t, k) in enumerate([(0, 1), (1, 0), (3, 20), (2**40, 1), (1, 2**40)]))),
        "cannot be loaded: ",
    ),
    "truncated": Row(truncated, r"(cannot be loaded: |not a GGUF file)."),
    "no vocabulary": Row(without_vocabulary, r"cannot be loaded: .*key not found in model: tokenizer\.ggml\.model"),
    "a vocabulary without tokens": Row(empty_vocabulary, r"empty\.gguf: it has no vocabulary, or one of a kind that"),
    "an embedding model": Row(embedding_model, r"bert\.gguf: it does not generate text \(an embedding model\?\)$"),
    "vocabulary wider than the logits": Row(
        resized(40, 0), r"'token_embd.weight' has wrong shape; expected     32,    440, got     32,    400,"
    ),
    "logits wider than the vocabulary": Row(
        resized(0, 48), r"'token_embd.weight' has wrong shape; expected     32,    400, got     32,    448,"
    ),
    "a context beyond the memory": Row(
        trained_long,
        r"memory: a context of 2,147,483,392 tokens takes 377\.96 GB, and \d+\.\d\d GB are free: lower n_ctx",
        "n_ctx = 0",
    ),
    "a context beyond the address space": Row(
        trained_long,
        r"not enough memory: a context of 10,000,128 tokens takes 1\.76 GB, and 0\.[34]\d GB are free: lower n_ctx$",
        "n_ctx = 10_000_000",
        limit=400_000_000,
    ),
    "no memory for the batches": Row(
        trained_long,
        r"cannot be loaded: .*failed to allocate .* \(not enough memory: lower n_ctx\)$",
        "n_ctx = 1_000_000",
        limit=400_000_000,
    ),
    "a LoRA of another width": Row(
        with_adapter(width=64), r"lora\.gguf cannot be loaded: .*'blk.0.attn_q.weight' has incorrect shape", "lora"
    ),
    "a LoRA of a deeper model": Row(
        with_adapter(layer=7), r"lora\.gguf cannot be loaded: .*'blk.7.attn_q.weight' does not exist", "lora"
    ),
    "a LoRA of another architecture": Row(
        with_adapter(arch="qwen2"), r"lora\.gguf cannot be loaded: .*model arch and LoRA arch mismatch", "lora"
    ),
    "a LoRA of random bytes": Row(with_noise_as_adapter, r"file0\.gguf cannot be loaded: .*invalid magic", "lora"),
    "no LoRA": Row(lambda folder, good: [good], r"none\.gguf cannot be loaded: .*No such file", "lora"),
}
ADAPTERS = {"a LoRA of random bytes": "file0.gguf", "no LoRA": "none.gguf"}


@pytest.mark.parametrize("name", slow_but(ROWS, *list(ROWS)[::4]))
def test_a_member_that_cannot_be_loaded(
    name: str, tiny: dict[str, Path], tmp_path: Path, write_models: WriteModels, open_ensemble: OpenEnsemble
) -> None:
    row, folder = ROWS[name], tmp_path / "faulty"
    folder.mkdir()
    setting = f'lora = "{folder / ADAPTERS.get(name, "lora.gguf")}"' if row.setting == "lora" else row.setting
    good = write_models("spm", "bpe_a")
    faulty = []
    for i, path in enumerate(row.make(folder, tiny["bpe_a"])):
        faulty.append(folder / f"models{i}.toml")
        bad = f'\n[[members]]\nname = "broken"\npath = "{path}"\nn_threads = 1\n{setting}\n'
        faulty[-1].write_text(good.read_text() + bad)
    done = processes.run([sys.executable, "-c", LOADER, good, str(row.limit), *faulty], cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    *errors, reply = map(json.loads, done.stdout.splitlines())
    assert len(errors) == len(faulty)
    for error in errors:
        assert error, "it was loaded"
        assert error.startswith('member "broken": ')
        assert "\n" not in error
        assert re.search(row.message, error), error
    assert reply == open_ensemble("spm", "bpe_a").generate("Hello", Overrides(**SETTINGS)).text


def test_a_lora_that_fits(tiny: dict[str, Path], tmp_path: Path, open_member: OpenMember) -> None:
    path, ids = adapter(tmp_path / "lora.gguf"), np.arange(5, 15, dtype=np.int32)
    plain = logits_of(open_member("bpe_a"), ids)
    assert np.abs(logits_of(open_member("bpe_a", lora=path), ids) - plain).max() > 0.01


def test_padding_of_the_vocabulary_is_never_sampled(
    tiny: dict[str, Path],
    tmp_path: Path,
    open_ensemble: OpenEnsemble,
    open_member: OpenMember,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits that stand for no token, larger than all others, change nothing."""
    vocab, model = chatml_vocab(), llama_model(chatml_vocab(), 1)
    padding = [Token(f"[PAD{i}]", TokenType.UNUSED, b"") for i in range(48)]
    wider = {name: np.resize(model.tensors[name], (448, 32)) for name in EMBEDDINGS}
    wider["output.weight"][400:] = 0.0
    wider["output.weight"][400:, 0] = 5.0  # times the constant of the stream
    path = tmp_path / "padded.gguf"
    write_model(
        path,
        vocab=replace(vocab, tokens=vocab.tokens + padding),
        model=Model(model.arch, model.hyper, model.tensors | wider),
        chat_template=CHATML,
    )
    monkeypatch.setitem(tiny, "padded", path)
    assert int(logits_of(open_member("padded"), np.arange(5, 15, dtype=np.int32)).argmax()) >= 400
    settings = Overrides(seed=1, max_tokens=30)
    expected = open_ensemble("bpe_a").generate("Hello", settings)
    assert len(expected.steps) > 5
    assert open_ensemble("padded").generate("Hello", settings).text == expected.text


# 2 layers x 512 tokens x (2 heads x 8 keys + 2 heads x 8 values) x 2 bytes, and 48 bytes for each token.
NEEDED = 65536 + 48 * 512


@pytest.mark.parametrize(
    ("name", "available", "fits"),
    [
        ("bpe_a", NEEDED, True),
        ("bpe_a", NEEDED - 1, False),
        ("bpe_a", None, True),
        ("swa", NEEDED, True),
        ("swa", NEEDED - 1, False),
        ("recurrent", 0, True),
        ("hybrid", 0, True),
    ],
)
def test_what_may_fit_is_not_refused(
    name: str, available: int | None, fits: bool, open_member: OpenMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "available_memory", lambda: available)
    monkeypatch.setattr(context, "supports_gpu", lambda: False)
    if fits:
        assert open_member(name).n_ctx == 512
    else:
        with pytest.raises(LoadError, match=f'member "{name}".* not enough memory: a context of 512 tokens'):
            open_member(name)


def test_a_cache_on_the_gpu_needs_no_memory_here(open_member: OpenMember, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "available_memory", lambda: 0)
    monkeypatch.setattr(context, "supports_gpu", lambda: True)
    open_member("bpe_a")
    with pytest.raises(LoadError, match="not enough memory"):
        open_member("bpe_a", n_gpu_layers=0)
