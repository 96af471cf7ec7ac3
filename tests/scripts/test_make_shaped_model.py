"""Models in the paper's shapes: their sizes, their blocks, their vocabularies, and that llama.cpp runs them."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import make_shaped_model as shaped
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType
from gguf.quants import dequantize
from make_tiny_models import add_vocab
from numpy.typing import NDArray
from random_blocks import BLOCK, FORMATS, POOL, Pools
from selection import slow_but
from tiny_vocabularies import chatml_vocab, spm_vocab
from vocabulary_files import VocabularyError, read_metadata, read_vocabulary

TINY = {"qwen2": chatml_vocab, "llama-spm": spm_vocab, "deepseek-llm": chatml_vocab}
SMALL = 0.07  # 2 layers and 1 or 2 heads

# The parameter counts that the models' own pages give, exactly.
COUNTS = {
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "openchat-3.5": 7_241_748_480,
    "nous-hermes-2-mistral-7b": 7_241_748_480,
    "openhermes-2.5-mistral-7b": 7_241_748_480,
    "mistral-7b-instruct-v0.2": 7_241_732_096,
    "deepseek-llm-7b": 6_910_365_696,
}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small vocabularies under the names of the real ones."""
    folder = tmp_path_factory.mktemp("vocabularies")
    for name, vocab in TINY.items():
        writer = GGUFWriter(folder / f"ggml-vocab-{name}.gguf", "llama")
        add_vocab(writer, vocab())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    return folder


class Running:
    """A model in llama.cpp."""

    def __init__(self, path: Path):
        self.llm = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False)
        self.rng = np.random.default_rng(0)

    def logits(self) -> NDArray[np.float64]:
        row = llama_cpp.llama_get_logits_ith(self.llm.ctx, -1)
        return np.ctypeslib.as_array(row, shape=(self.llm.n_vocab(),)).astype(np.float64)

    def after(self, text: str) -> NDArray[np.float64]:
        self.llm.reset()
        self.llm.eval(self.llm.tokenize(text.encode(), special=False))
        return self.logits()

    def say(self, count: int) -> tuple[list[int], list[float]]:
        """Sample tokens; give them and the entropy of each distribution, in nats."""
        tokens, entropies = [], []
        for _ in range(count):
            logits = self.logits()
            assert np.isfinite(logits).all()
            p = np.exp(logits - logits.max())
            p /= p.sum()
            entropies.append(float(-(p * np.log(p + 1e-300)).sum()))
            tokens.append(int(self.rng.choice(len(p), p=p)))
            self.llm.eval(tokens[-1:])
        return tokens, entropies


@pytest.fixture
def run() -> Iterator[Callable[[Path], Running]]:
    opened: list[Running] = []

    def open_one(path: Path) -> Running:
        opened.append(Running(path))
        return opened[-1]

    yield open_one
    for model in opened:
        model.llm.close()


def check_sane(model: Running, text: str) -> None:
    """The model tokenizes, depends on its context, and says 200 finite, varied tokens."""
    ids = model.llm.tokenize(text.encode(), special=False)
    assert model.llm.detokenize(ids).decode().strip() == text
    here, there = model.after("the first text "), model.after("one other text ")
    assert np.corrcoef(here, there)[0, 1] < 0.9
    tokens, entropies = model.say(200)
    assert len(set(tokens)) > 60
    assert 1 < np.mean(entropies) < 6


@pytest.mark.parametrize("name", shaped.SHAPES)
def test_full_shapes_have_the_parameters_of_the_models(name: str) -> None:
    assert shaped.parameters(shaped.SHAPES[name]) == COUNTS[name]
    assert shaped.scaled(shaped.SHAPES[name], 1.0) == shaped.SHAPES[name]


def test_bytes_per_weight() -> None:
    """16, 8.5 and 4.5 bits; the norms and biases in 32 bits are less than 0.1 % of the file."""
    shape = shaped.SHAPES["deepseek-llm-7b"]
    bits = {of: 8 * shaped.weights_size(shape, of) / shaped.parameters(shape) for of in FORMATS}
    assert bits == pytest.approx({"f16": 16, "q8_0": 8.5, "q4_0": 4.5}, rel=1e-3)


def test_a_scaled_shape_keeps_heads_and_vocabulary() -> None:
    small = shaped.scaled(shaped.SHAPES["mistral-7b-instruct-v0.2"], 0.125)
    assert (small.n_layer, small.n_head, small.n_head_kv, small.n_embd) == (4, 4, 1, 512)
    assert (small.n_ff, small.n_vocab) == (1792, 32_000)
    for shape in shaped.SHAPES.values():
        for scale in (0.01, 0.1, 0.3, 0.77):
            small = shaped.scaled(shape, scale)
            assert small.n_head % small.n_head_kv == small.n_ff % BLOCK == 0
            assert min(small.n_layer, small.n_head_kv, small.n_ff) > 0


@pytest.mark.slow
@pytest.mark.parametrize("of", FORMATS)
def test_weights_have_the_spread_asked_for(of: str, tmp_path: Path) -> None:
    """The mean of 8.4 million weights is within 7 standard errors of 0 (false alarm: 3e-12), the spread within 1 %."""
    weights = POOL * BLOCK
    with (tmp_path / "weights").open("wb") as file:
        Pools(FORMATS[of], seed=1).write(file, weights=weights, spread=0.02, at=5)
    data = np.fromfile(tmp_path / "weights", np.uint8).reshape(POOL, -1)
    values = dequantize(data if of != "f16" else data.view(np.float16), FORMATS[of].tensor_type).astype(np.float64)
    assert values.shape == (POOL, BLOCK)
    assert abs(values.mean()) < 7 * 0.02 / weights**0.5
    assert values.std() == pytest.approx(0.02, rel=0.01)


def test_a_tensor_goes_round_the_pool(tmp_path: Path) -> None:
    pools = Pools(FORMATS["q4_0"], seed=1)
    with (tmp_path / "a").open("wb") as a, (tmp_path / "b").open("wb") as b:
        pools.write(a, weights=POOL * BLOCK, spread=1.0, at=0)
        pools.write(b, weights=2 * POOL * BLOCK, spread=1.0, at=POOL + 3)
    once, twice = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    assert twice == (once[3 * 18 :] + once[: 3 * 18]) * 2


def test_the_vocabulary_is_filled_up(vocabularies: Path) -> None:
    have = len(spm_vocab().tokens)
    got = read_vocabulary(vocabularies / "ggml-vocab-llama-spm.gguf", size=have + 5, added=("<a>", "<b>"))
    tokens, types = got["tokenizer.ggml.tokens"].value, got["tokenizer.ggml.token_type"].value
    assert tokens[have:] == [b"<a>", b"<b>", *(b"[PAD%d]" % (have + i) for i in (2, 3, 4))]
    assert types[have:] == [TokenType.CONTROL] * 2 + [TokenType.UNUSED] * 3
    assert len(got["tokenizer.ggml.scores"].value) == len(tokens) == len(types) == have + 5
    assert got["tokenizer.ggml.eos_token_id"].value == have
    assert [text.decode() for text in tokens[:have]] == [token.text for token in spm_vocab().tokens]


def test_all_kinds_of_values_are_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "v.gguf", "llama")
    values = {"u8": 200, "i16": -5, "f32": 0.5, "u64": 2**40, "bool": True, "string": "grüß"}
    for kind, value in values.items():
        of = {"u8": "UINT8", "i16": "INT16", "f32": "FLOAT32", "u64": "UINT64"}.get(kind, kind.upper())
        writer.add_key_value(kind, value, GGUFValueType[of])
    writer.add_array("numbers", [1.5, -2.0])
    writer.add_array("texts", ["a", "", "ü"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = {key: field.value for key, field in read_metadata(tmp_path / "v.gguf").items()}
    assert read == values | {
        "general.architecture": b"llama",
        "string": "grüß".encode(),
        "numbers": [1.5, -2.0],
        "texts": [b"a", b"", "ü".encode()],
    }


def test_damaged_vocabularies_are_one_line(vocabularies: Path, tmp_path: Path) -> None:
    good = (vocabularies / "ggml-vocab-qwen2.gguf").read_bytes()
    key_at = good.index(b"tokenizer.ggml.tokens")
    bad = {
        "empty": b"",
        "other": b"PK\3\4" + good[4:],
        "cut": good[: len(good) // 2],
        "type": good[: key_at + 21] + struct.pack("<I", 99) + good[key_at + 25 :],
        "text": good[:24] + struct.pack("<Q", 2**60) + good[32:],
    }
    for name, data in bad.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(VocabularyError, match=f"{name} is damaged or no GGUF file") as caught:
            read_metadata(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(VocabularyError, match=f"cannot read {tmp_path}: Is a directory"):
        read_metadata(tmp_path)
    with pytest.raises(VocabularyError, match="has 400 tokens; with 0 more the model has room for 399"):
        read_vocabulary(vocabularies / "ggml-vocab-qwen2.gguf", size=399)


@pytest.mark.parametrize("of", slow_but(FORMATS, "q4_0"))
@pytest.mark.parametrize("name", slow_but(["qwen2.5-3b", "openchat-3.5", "deepseek-llm-7b"], "qwen2.5-3b"))
def test_small_models_run(
    name: str, of: str, vocabularies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Running]
) -> None:
    shape = shaped.SHAPES[name]
    few = len(TINY[shape.vocabulary]().tokens) + 30
    monkeypatch.setitem(shaped.SHAPES, name, shaped.replace(shape, n_vocab=few))
    made = shaped.make(name, tmp_path / "m.gguf", of=of, scale=SMALL, vocabularies=vocabularies)
    model = run(tmp_path / "m.gguf")
    assert llama_cpp.llama_model_n_params(model.llm.model) == shaped.parameters(made)
    assert llama_cpp.llama_model_size(model.llm.model) == shaped.weights_size(made, of)
    assert model.llm.n_vocab() == few
    check_sane(model, "Hello wörld 👋")


def test_the_same_call_writes_the_same_bytes_and_models_differ(
    vocabularies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("openchat-3.5", "openhermes-2.5-mistral-7b"):
        monkeypatch.setitem(shaped.SHAPES, name, shaped.replace(shaped.SHAPES[name], n_vocab=1000))
    a, b, other = (tmp_path / "new" / name for name in ("a", "b", "other"))
    shaped.make("openchat-3.5", a, scale=SMALL, vocabularies=vocabularies)
    shaped.make("openchat-3.5", b, scale=SMALL, vocabularies=vocabularies)
    shaped.make("openhermes-2.5-mistral-7b", other, scale=SMALL, vocabularies=vocabularies)
    assert a.read_bytes() == b.read_bytes()
    matrices = [{t.name: t.data for t in GGUFReader(path).tensors}["blk.0.ffn_up.weight"] for path in (a, other)]
    assert not np.array_equal(*matrices)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a", "b", "other"]


@pytest.mark.slow
def test_no_two_tokens_have_the_same_row_and_rare_ones_are_quieter(tmp_path: Path) -> None:
    """The scale of a token's blocks, at 4 bits the first two bytes, is MUTED times as large where it is not common."""
    common = np.random.default_rng(0).random(151_936) < 0.5
    tensor = shaped.Tensor("output.weight", len(common), 128, gain=4.0, speaks=True)
    with (tmp_path / "rows").open("wb") as file:
        shaped.write_tensor(file, tensor, Pools(FORMATS["q4_0"], seed=1), common, start=7)
    rows = np.fromfile(tmp_path / "rows", np.uint8).reshape(len(common), 4 * 18)
    assert len({row.tobytes() for row in rows}) == len(common)
    scales = np.abs(rows[:, :2].copy().view(np.float16)[:, 0].astype(np.float64))
    full = 4 / 128**0.5 / 21.5**0.5
    assert scales[common] == pytest.approx(full, rel=1e-3)
    assert scales[~common] == pytest.approx(full * shaped.MUTED, rel=1e-3)


@pytest.mark.slow
def test_a_failed_write_leaves_nothing(
    vocabularies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["qwen2.5-3b", str(tmp_path / "m.gguf"), "--vocabularies", str(vocabularies), "--scale", "0.07"]

    for failure, status, said in (
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written\n"),
    ):

        def fail(*_: object, failure: BaseException = failure, **__: object) -> None:
            raise failure

        monkeypatch.setattr(shaped, "write_tensor", fail)
        assert shaped.main(arguments) == status
        assert capsys.readouterr().err == said
        assert list(tmp_path.iterdir()) == []


def test_command_line(vocabularies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    given = ["qwen2.5-math-1.5b", str(path), "--type", "q8_0", "--scale", "0.05", "--vocabularies", str(vocabularies)]
    assert shaped.main(given) == 0
    assert (
        f"{path}  {shaped.parameters(shaped.scaled(shaped.SHAPES[given[0]], 0.05)):,} weights"
        in capsys.readouterr().out
    )
    given[-1] = str(tmp_path)
    assert shaped.main(given) == 1
    missing = f"error: no {tmp_path}/ggml-vocab-qwen2.gguf: run scripts/fetch_vocabularies.py"
    assert capsys.readouterr().err.startswith(missing)
    for wrong in ("0", "1.5", "x"):
        with pytest.raises(SystemExit):
            shaped.main([*given, "--scale", wrong])
    assert "--scale" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.vocabularies
@pytest.mark.parametrize("name", ["qwen2.5-3b", "openchat-3.5", "mistral-7b-instruct-v0.2", "deepseek-llm-7b"])
def test_with_the_real_vocabularies(name: str, tmp_path: Path, run: Callable[[Path], Running]) -> None:
    """What the model says is text of common pieces, 3 to 5.5 bytes each, that ends no generation."""
    shaped.make(name, tmp_path / "m.gguf", of="q4_0", scale=SMALL)
    model = run(tmp_path / "m.gguf")
    assert model.llm.n_vocab() == shaped.SHAPES[name].n_vocab
    check_sane(model, "Hello wörld 👋")
    tokens, _ = model.say(40)
    said = b"".join(model.llm.detokenize([token]) for token in tokens)
    assert 3 < len(said) / len(tokens) < 5.5
    vocab = llama_cpp.llama_model_get_vocab(model.llm.model)
    assert not any(llama_cpp.llama_vocab_is_eog(vocab, token) for token in tokens)
    if shaped.SHAPES[name].added:
        assert model.llm.tokenize(shaped.SHAPES[name].added[0].encode(), add_bos=False, special=True) == [32_000]
        assert model.llm.token_eos() == 32_000
