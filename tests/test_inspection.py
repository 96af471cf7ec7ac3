import json
import logging
from pathlib import Path
from types import SimpleNamespace

import make_tiny_models
import pytest
from click.testing import CliRunner
from gguf import GGUFReader

from me_local import inspection
from me_local.cli import main
from me_local.config import MemberConfig
from me_local.inspection import (
    SAMPLE,
    allocated_context,
    boundaries,
    compare,
    inspect_member,
    kv_cache_bytes,
    overlap,
    quantisation,
    sampleable,
)


class FakeVocabulary:
    """Cuts every text into pieces of the given lengths in bytes, over and over."""

    kind = "BPE"
    removed: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths
        self.pieces: list[bytes] = [b"x"]
        self.identity = lengths

    def encode(self, text: bytes) -> list[int]:
        ids, position = [], 0
        while position < len(text):
            length = self.lengths[len(ids) % len(self.lengths)]
            ids.append(len(self.pieces))
            self.pieces.append(text[position : position + length])
            position += length
        return ids


def fake_member(name: str, *lengths: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, vocabulary=FakeVocabulary(*lengths))


def metadata(arch: str, **numbers: object) -> dict[str, str]:
    keys = {f"{arch}.{key.replace('__', '.')}": str(value) for key, value in numbers.items()}
    return {"general.architecture": arch} | keys


LLAMA_3_8B = metadata(
    "llama", block_count=32, embedding_length=4096, attention__head_count=32, attention__head_count_kv=8
)
GEMMA_3_270M = metadata(
    "gemma3",
    block_count=18,
    embedding_length=640,
    attention__head_count=4,
    attention__head_count_kv=1,
    attention__key_length=256,
    attention__value_length=256,
)
GPT_2 = metadata("gpt2", block_count=12, embedding_length=768, attention__head_count=12)


def config(**settings: object) -> MemberConfig:
    return MemberConfig(name="a", path=Path("/a.gguf"), **settings)  # type: ignore[arg-type]


# Keys of a layer take 8 heads of 128 elements in Llama 3 8B; values take as many.
@pytest.mark.parametrize(
    ("settings", "per_layer_and_token"),
    [
        ({}, 1024 * 2 + 1024 * 2),
        ({"type_k": "f32", "type_v": "bf16"}, 1024 * 4 + 1024 * 2),
        ({"type_k": "q8_0", "type_v": "q4_0"}, 32 * 34 + 32 * 18),
        ({"type_k": "q4_1", "type_v": "iq4_nl"}, 32 * 20 + 32 * 18),
        ({"type_k": "q5_1", "type_v": "q5_0"}, 32 * 24 + 32 * 22),
    ],
)
def test_kv_cache_of_each_type(settings: dict[str, str], per_layer_and_token: int) -> None:
    size = kv_cache_bytes(LLAMA_3_8B, "full", config(**settings), 4096)
    assert size == 32 * 4096 * per_layer_and_token


def test_kv_cache_where_heads_have_a_length_of_their_own() -> None:
    # 18 layers x 4096 tokens x (256 + 256) elements x 2 bytes: 72 MiB, which is what llama.cpp's log says too.
    assert kv_cache_bytes(GEMMA_3_270M, "sliding window 512", config(), 4096) == 72 * 2**20


def test_kv_cache_without_a_count_of_kv_heads() -> None:
    assert kv_cache_bytes(GPT_2, "full", config(), 1024) == 12 * 1024 * (768 + 768) * 2


def test_kv_cache_leaves_out_layers_that_predict_further_tokens() -> None:
    more = LLAMA_3_8B | {"llama.nextn_predict_layers": "2"}
    assert kv_cache_bytes(more, "full", config(), 256) == 30 * 256 * 4096


@pytest.mark.parametrize(
    ("known", "memory"),
    [
        (LLAMA_3_8B, "recurrent"),
        (LLAMA_3_8B, "hybrid"),
        (GPT_2, "sliding window 4096"),
        ({}, "full"),
        ({key: value for key, value in LLAMA_3_8B.items() if "head_count" not in key}, "full"),
        (LLAMA_3_8B | {"llama.attention.head_count": "0"}, "full"),
        (GEMMA_3_270M | {"gemma3.attention.key_length_swa": "512"}, "sliding window 512"),
        (LLAMA_3_8B | {"llama.attention.key_length_mla": "192"}, "full"),
        (LLAMA_3_8B | {"llama.attention.shared_kv_layers": "10"}, "full"),
    ],
)
def test_no_figure_where_the_metadata_does_not_tell(known: dict[str, str], memory: str) -> None:
    assert kv_cache_bytes(known, memory, config(), 4096) is None


@pytest.mark.parametrize(("wanted", "trained", "cells"), [(1000, 8192, 1024), (0, 2048, 2048), (4096, 2048, 4096)])
def test_contexts_are_padded(wanted: int, trained: int, cells: int) -> None:
    assert allocated_context(wanted, trained) == cells


@pytest.mark.parametrize(
    ("description", "name"),
    [
        ("llama 256M Q4_1", "Q4_1"),
        ("gemma3 270M Q4_K - Medium", "Q4_K - Medium"),
        ("llama4 17Bx16E (Scout) Q2_K - Small", "Q2_K - Small"),
        ("llama ?B (guessed) all F32", "(guessed) all F32"),
        ("odd", "odd"),
    ],
)
def test_quantisation(description: str, name: str) -> None:
    assert quantisation(description) == name


def test_overlap() -> None:
    assert overlap({2, 3, 5}, {3, 5, 7}) == 2 / 4
    assert overlap({1}, {2}) == 0
    assert overlap(set(), set()) == 1


def test_boundaries_are_byte_offsets_inside_the_text() -> None:
    assert boundaries(FakeVocabulary(2, 1), "aé bc") == {2, 3, 5}  # a é b c: 1 + 2 + 1 + 1 + 1 bytes


def test_tokens_without_bytes_cut_nothing() -> None:
    vocabulary = SimpleNamespace(pieces=[b"ab", b"", b"c"], encode=lambda _: [1, 0, 1, 2, 1])
    assert boundaries(vocabulary, "abc") == {2}


def test_sampleable_pieces() -> None:
    pieces = [b"a", b"", b"b", b"a", b"</s>", b"<image>"]
    assert sampleable(SimpleNamespace(pieces=pieces, end_ids=[4], removed=[5])) == {b"a", b"b"}


def test_agreement_of_cuts_that_were_counted() -> None:
    size = len(SAMPLE.encode())
    pair = compare(fake_member("a", 1), fake_member("b", 2))
    # After each byte, and after each second one.
    assert pair.agreement == ((size - 1) // 2) / (size - 1)
    assert (pair.first, pair.second, pair.same_vocabulary, pair.risky) == ("a", "b", False, True)


def test_a_pair_that_mostly_agrees_is_not_risky() -> None:
    pair = compare(fake_member("a", 1), fake_member("b", 1, 1, 2))
    assert pair.agreement == pytest.approx(3 / 4, abs=0.001)
    assert not pair.risky


@pytest.mark.parametrize("name", ["bpe_a", "spm"])
def test_what_a_member_is(name: str, tiny: dict[str, Path], open_member) -> None:
    report = inspect_member(open_member(name))
    tensors = GGUFReader(tiny[name]).tensors
    assert report.path == str(tiny[name])
    assert (report.architecture, report.quantisation) == ("llama", "(guessed) all F32")
    assert report.weights_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert report.parameters == sum(int(tensor.n_elements) for tensor in tensors)
    assert (report.context, report.trained_context, report.memory) == (512, 2048, "full")
    # 2 layers x 512 tokens x (2 heads x 8 keys + 2 heads x 8 values) x 2 bytes
    assert report.kv_cache_bytes == 65536
    assert report.working_bytes == 512 * report.vocabulary_size * 4
    assert report.total_bytes == report.weights_bytes + 65536 + report.working_bytes


def test_vocabularies_and_templates(open_member) -> None:
    bpe, spm = inspect_member(open_member("bpe_a")), inspect_member(open_member("spm"))
    assert (bpe.vocabulary, bpe.vocabulary_size, bpe.template) == ("BPE", 400, "GGUF")
    assert set(bpe.end_tokens) == {"<|endoftext|>", "<|im_end|>"}
    size = len(make_tiny_models.spm_vocab().tokens)
    assert (spm.vocabulary, spm.vocabulary_size, spm.template, spm.end_tokens) == ("SPM", size, "plain", ("</s>",))
    assert inspect_member(open_member("bpe_a", chat_template="chatml")).template == "chatml"


def test_llama_cpp_allocates_the_kv_cache_that_is_reported(open_member, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "me_local.llama_cpp"):
        report = inspect_member(open_member("bpe_a", n_ctx=2000, type_k="f32", type_v="f32"))
    assert report.kv_cache_bytes == 2 * 2048 * 32 * 4
    assert "KV buffer size =     0.50 MiB" in caplog.text


def test_one_vocabulary(open_member) -> None:
    pair = compare(open_member("bpe_a"), open_member("bpe_b"))
    assert pair.same_vocabulary
    assert (pair.shared_pieces, pair.first_in_second, pair.second_in_first, pair.agreement) == (1, 1, 1, 1)
    assert not pair.risky


def test_shares_of_pieces(open_member) -> None:
    a = {token.piece for token in make_tiny_models.chatml_vocab().tokens} - {b""}
    c = {token.piece for token in make_tiny_models.bos_vocab().tokens} - {b""}
    pair = compare(open_member("bpe_a"), open_member("bpe_c"))
    assert not pair.same_vocabulary
    assert pair.shared_pieces == len(a & c) / len(a | c)
    assert pair.first_in_second == len([piece for piece in a if piece in c]) / 397
    assert pair.second_in_first == len([piece for piece in c if piece in a]) / 348


@pytest.mark.parametrize("name", ["bpe_a", "bpe_c", "spm"])
def test_the_sample_is_tokenised_without_loss(name: str, open_member) -> None:
    vocabulary = open_member(name).vocabulary
    assert vocabulary.joined(vocabulary.encode(SAMPLE.encode())) == SAMPLE.encode()


def test_json_is_one_object(write_models) -> None:
    result = CliRunner().invoke(main, ["inspect", "--json", "--models", str(write_models("bpe_a", "bpe_b", "spm"))])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [member["name"] for member in report["members"]] == ["bpe_a", "bpe_b", "spm"]
    assert [(p["first"], p["second"]) for p in report["pairs"]] == [
        ("bpe_a", "bpe_b"),
        ("bpe_a", "spm"),
        ("bpe_b", "spm"),
    ]
    assert report["members"][0]["end_tokens"] == ["<|endoftext|>", "<|im_end|>"]
    assert "bpe_b: it has no chat template" in result.stderr


def test_tables_are_not_folded_in_a_pipe(write_models, tiny: dict[str, Path]) -> None:
    models = write_models("bpe_a", "bpe_b")
    name = "a-file-name-that-takes-much-more-room-than-the-eighty-columns-which-a-small-terminal-may-have.gguf"
    (models.parent / name).write_bytes(tiny["bpe_a"].read_bytes())
    models.write_text(models.read_text().replace(str(tiny["bpe_a"]), name))
    result = CliRunner().invoke(main, ["inspect", "--models", str(models)])
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert lines[:2] == ["bpe_a", f"  file          {name}"]
    assert "  KV cache      65.5 kB" in lines
    assert "bpe_a  bpe_b  100.0%  100.0%  100.0%     100.0%  one vocabulary" in lines
    assert lines[-1] == "One vocabulary: pieces are token ids."
    assert "\x1b" not in result.stdout


def test_a_risky_pair_is_warned_about(write_models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "RISKY_AGREEMENT", 0.99)
    result = CliRunner().invoke(main, ["inspect", "--models", str(write_models("bpe_a", "spm"))])
    assert "Warning: bpe_a and spm cut a text at the same places only" in result.stderr
    assert "Warning" not in result.stdout
    assert "risky" in result.stdout


def test_a_single_member_has_no_pairs(write_models) -> None:
    result = CliRunner().invoke(main, ["inspect", "--models", str(write_models("spm"))])
    assert result.exit_code == 0
    assert "same cuts" not in result.stdout
