"""The tiny models: the same bytes on every run, loadable, with vocabularies and distributions as promised."""

import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import llama_cpp
import make_tiny_models as tiny
import numpy as np
import pytest
import tiny_architectures
import tiny_vocabularies
from numpy.typing import NDArray

TEXT = "Hello wörld 👋\n"
GGML_LEVEL_WARN, GGML_LEVEL_ERROR = 3, 4
# What llama.cpp always warns of with such architectures.
HARMLESS = {"swa": "using full-size SWA cache", "hybrid": "the V embeddings have different sizes across layers"}
VOCABS = {name: recipe.vocab() for name, recipe in tiny.MODELS.items()}


@dataclass
class Loaded:
    """One model in llama.cpp, with what llama.cpp logged while loading it."""

    name: str
    llm: llama_cpp.Llama
    log: list[tuple[int, str]]

    @property
    def spm(self) -> bool:
        return VOCABS[self.name].model == "llama"

    @property
    def vocab(self) -> ctypes.c_void_p:
        return llama_cpp.llama_model_get_vocab(self.llm.model)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        data, ids = text.encode(), (ctypes.c_int32 * 1000)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, 1000, add_special, False)
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, 256, 0, False)
        return buffer.raw[:size]

    def distribution(self) -> NDArray[np.float64]:
        row = llama_cpp.llama_get_logits_ith(self.llm.ctx, -1)
        logits = np.ctypeslib.as_array(row, shape=(self.llm.n_vocab(),)).astype(np.float64)
        exp = np.exp(logits - logits.max())
        return exp / exp.sum()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.make_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=tiny.NAMES)
def loaded(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Iterator[Loaded]:
    log: list[tuple[int, str]] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        log.append((level, text.decode(errors="replace")))

    before, user_data = current_logger()
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    llm = llama_cpp.Llama(str(paths[request.param]), n_ctx=512, n_threads=1, verbose=False)
    yield Loaded(request.param, llm, log)
    llm.close()
    llama_cpp.llama_log_set(before, user_data)


def current_logger() -> tuple[llama_cpp.llama_log_callback, ctypes.c_void_p]:
    callback, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p(0)
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(user_data))
    return callback, user_data


@dataclass
class Sample:
    """What 400 sampled steps of a model looked like; the rows are steps."""

    entropy: NDArray[np.float64]
    end: NDArray[np.float64]  # probability of an end of generation
    high: NDArray[np.float64]  # probability of a piece with a byte of 0x80 or more
    pieces: list[bytes]


@pytest.fixture(scope="module")
def sample(loaded: Loaded) -> Sample:
    rng = np.random.default_rng(0)
    kinds = np.array([tiny_architectures.kind(token) for token in VOCABS[loaded.name].tokens])
    steps, pieces = [], []
    loaded.llm.reset()
    loaded.llm.eval(loaded.tokenize(TEXT, add_special=True))
    for _ in range(400):
        p = loaded.distribution()
        steps.append((-(p * np.log(p + 1e-300)).sum(), p[kinds == "end"].sum(), p[kinds == "high"].sum()))
        p[kinds == "end"] = 0.0
        token = int(rng.choice(len(p), p=p / p.sum()))
        pieces.append(loaded.piece(token))
        loaded.llm.eval([token])
    return Sample(*np.array(steps).T, pieces)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_run_writes_the_same_bytes(paths: dict[str, Path], tmp_path: Path) -> None:
    again = tiny.make_all(tmp_path / "made" / "for" / "it")
    assert tuple(paths) == tuple(again) == ("bpe_a", "bpe_b", "bpe_c", "spm", "swa", "recurrent", "hybrid")
    assert [digest(path) for path in paths.values()] == [digest(path) for path in again.values()]


def test_files_are_small_and_differ(paths: dict[str, Path]) -> None:
    assert max(path.stat().st_size for path in paths.values()) < 300_000
    assert len({digest(path) for path in paths.values()}) == len(paths)


def test_vocabulary_sizes() -> None:
    sizes = {name: len(vocab.tokens) for name, vocab in VOCABS.items()}
    assert (sizes["bpe_a"], sizes["bpe_b"], sizes["bpe_c"]) == (400, 400, 350)
    assert (sizes["swa"], sizes["recurrent"], sizes["hybrid"]) == (sizes["spm"], 350, 400)
    assert 550 <= sizes["spm"] <= 700


@pytest.mark.parametrize("name", tiny.NAMES)
def test_tokens_are_distinct_and_cover_every_byte(name: str) -> None:
    tokens = VOCABS[name].tokens
    assert len({token.text for token in tokens}) == len(tokens)
    singles = {token.piece for token in tokens if len(token.piece) == 1}
    assert singles == {bytes([byte]) for byte in range(256)}


def test_byte_level_vocabularies_overlap_in_part_with_other_numbers() -> None:
    ids_a = {token.piece: i for i, token in enumerate(VOCABS["bpe_a"].tokens) if token.piece}
    ids_c = {token.piece: i for i, token in enumerate(VOCABS["bpe_c"].tokens) if token.piece}
    shared = ids_a.keys() & ids_c.keys()
    assert 256 < len(shared) < len(ids_c)  # all bytes, some longer pieces, not all
    assert all(ids_a[piece] != ids_c[piece] for piece in shared)


def test_gpt2_byte_map() -> None:
    to_byte = tiny_vocabularies.gpt2_bytes()
    assert sorted(to_byte.values()) == list(range(256))
    assert (to_byte["A"], to_byte["Ġ"], to_byte["Ċ"], to_byte["Ã"]) == (0x41, 0x20, 0x0A, 0xC3)


@pytest.mark.parametrize(
    ("piece", "unfinished"),
    [(b"\xc3", True), (b"a\xe2\x82", True), (b"\xf0\x9f\x98", True), (b"\xc3\xb6", False), (b"\x82", False)],
)
def test_unfinished_characters(piece: bytes, unfinished: bool) -> None:
    assert bool(tiny_architectures.UNFINISHED.search(piece)) is unfinished


def test_loading_logs_no_warning(loaded: Loaded) -> None:
    assert loaded.log
    loud = [text for level, text in loaded.log if level in (GGML_LEVEL_WARN, GGML_LEVEL_ERROR)]
    harmless = HARMLESS.get(loaded.name)
    assert [text for text in loud if harmless is None or harmless not in text] == []


def test_every_kind_of_memory(loaded: Loaded) -> None:
    model = loaded.llm.model
    window = llama_cpp.llama_model_n_swa(model)
    recurrent, hybrid = llama_cpp.llama_model_is_recurrent(model), llama_cpp.llama_model_is_hybrid(model)
    expected = {"swa": (16, False, False), "recurrent": (0, True, False), "hybrid": (0, False, True)}
    assert (window, recurrent, hybrid) == expected.get(loaded.name, (0, False, False))


def test_llama_cpp_renders_the_pieces_that_the_vocabulary_claims(loaded: Loaded) -> None:
    pieces = [loaded.piece(token) for token in range(loaded.llm.n_vocab())]
    assert pieces == [token.piece for token in VOCABS[loaded.name].tokens]


def test_text_survives_tokenising(loaded: Loaded) -> None:
    back = b"".join(loaded.piece(token) for token in loaded.tokenize(TEXT)).decode()
    assert back == (" " + TEXT if loaded.spm else TEXT)


def test_every_learnt_piece_can_be_reached(loaded: Loaded) -> None:
    spm = loaded.spm
    for token, entry in enumerate(VOCABS[loaded.name].tokens):
        text = entry.piece.decode(errors="replace")
        if len(entry.piece) == 1 or "\ufffd" in text or (spm and not text.startswith(" ")) or not text:
            continue
        assert loaded.tokenize(text.removeprefix(" ") if spm else text) == [token], text


def test_control_tokens(loaded: Loaded) -> None:
    texts = [token.text for token in VOCABS[loaded.name].tokens]
    ends = {texts[i] for i in range(len(texts)) if llama_cpp.llama_vocab_is_eog(loaded.vocab, i)}
    bos = texts[llama_cpp.llama_vocab_bos(loaded.vocab)]
    eos = texts[llama_cpp.llama_vocab_eos(loaded.vocab)]
    template = llama_cpp.llama_model_chat_template(loaded.llm.model, None)
    chatml = tiny.MODELS[loaded.name].vocab is tiny_vocabularies.chatml_vocab
    if chatml:
        assert (ends, bos, eos) == ({"<|endoftext|>", "<|im_end|>"}, "<|endoftext|>", "<|endoftext|>")
    else:
        assert (ends, bos, eos) == ({"</s>"}, "<s>", "</s>")
    assert llama_cpp.llama_vocab_get_add_bos(loaded.vocab) != chatml
    assert (template is not None) == (loaded.name == "bpe_a")


def test_entropy_is_a_models_and_depends_on_the_context(sample: Sample) -> None:
    low, middle, top = np.quantile(sample.entropy, [0.05, 0.5, 0.95])
    assert 1.0 < low < 3.0
    assert 2.5 < middle < 4.0
    assert top < 4.7


def test_end_of_generation_is_rare_but_always_possible(sample: Sample) -> None:
    assert 0.01 < sample.end.mean() < 0.03
    assert sample.end.min() > 1e-4
    assert sample.end.max() < 0.25


def test_partial_characters_come_regularly(sample: Sample) -> None:
    assert 0.02 < sample.high.mean() < 0.15
    assert any(tiny_architectures.UNFINISHED.search(piece) for piece in sample.pieces)
    letters = sum(piece.strip().isalpha() for piece in sample.pieces)
    assert letters > len(sample.pieces) / 2


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["the water and the other things", "one, two, and the next " * 4])
def test_logits_depend_on_tokens_far_back(loaded: Loaded, tail: str) -> None:
    rows = []
    for first in loaded.tokenize("a")[-1:], loaded.tokenize("9")[-1:]:
        loaded.llm.reset()
        loaded.llm.eval(first + loaded.tokenize(tail))
        rows.append(loaded.distribution())
    total_variation = np.abs(rows[0] - rows[1]).sum() / 2
    assert 0.001 < total_variation < 0.9


def test_a_damaged_model_does_not_load(tmp_path: Path) -> None:
    vocab = VOCABS["bpe_a"]
    model = tiny_architectures.llama_model(vocab, seed=0)
    tensors = {name: tensor for name, tensor in model.tensors.items() if name != "blk.1.attn_k.weight"}
    tiny.write_model(tmp_path / "broken.gguf", vocab=vocab, model=replace(model, tensors=tensors))
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(str(tmp_path / "broken.gguf"), verbose=False)
