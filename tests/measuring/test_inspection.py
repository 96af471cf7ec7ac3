import json
import logging
from pathlib import Path
from types import SimpleNamespace

import make_tiny_models
import pytest
from click.testing import CliRunner
from gguf import GGUFReader

from me_local.cli.program import main
from me_local.measuring import inspection
from me_local.measuring.inspection import (
    SAMPLE,
    boundaries,
    compare,
    inspect_member,
    longest_that_fits,
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
    # the scores of a batch, 512 tokens x 512 cells x 2 heads x 4 bytes, and something more
    assert 2 * 2**20 <= (report.working_bytes or 0) < 8 * 2**20
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


def test_the_longest_context_that_fits(open_member) -> None:
    report = inspect_member(open_member("bpe_a"))  # 128 bytes for a token
    assert longest_that_fits(report, 0) == 512
    assert longest_that_fits(report, 1000 * 128) == 1512
    assert longest_that_fits(report, 10**9) == 2048
    assert longest_that_fits(inspect_member(open_member("recurrent")), 10**9) is None


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
