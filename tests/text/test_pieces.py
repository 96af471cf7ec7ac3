"""The tokens of a vocabulary, read in blocks: always what llama.cpp says of each one by itself."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import pytest
from conftest import lone_member
from gguf import GGUFWriter
from make_tiny_models import NAMES, write_model
from real_vocabularies import EMBEDDING, open_model
from real_vocabularies import NAMES as REAL
from selection import slow_but
from tiny_architectures import llama_model
from tiny_vocabularies import Token, TokenType, Vocab, chatml_vocab, spm_vocab

from me_local.config import MemberConfig
from me_local.llama.member import Member
from me_local.text import pieces
from me_local.text.pieces import find_end_ids, read_pieces

OpenMember = Callable[..., Member]
AWKWARD = [
    " .",
    "a , b",
    "it 's",
    " ' ",
    "  ",
    " ?",
    "\x0e",
    "a\x0eb",
    "\x10\x1e",
    "\x1e",
    "\u00ff",
    "\n\n",
    "\x0e" * 9,
]


def check(model: llama_cpp.llama_model_p) -> list[bytes]:
    """Compare with llama.cpp's answers for each id, and give them."""
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    ids = range(llama_cpp.llama_vocab_n_tokens(vocabulary))
    found = read_pieces(vocabulary)
    buffer = ctypes.create_string_buffer(1 << 12)
    for token in ids:
        length = llama_cpp.llama_token_to_piece(vocabulary, token, buffer, len(buffer), 0, False)
        assert found[token] == buffer.raw[:length], token
    assert len(found) == len(ids)
    ends = find_end_ids(model, [token for token in ids if not found[token]])
    assert ends == [token for token in ids if llama_cpp.llama_vocab_is_eog(vocabulary, token)]
    return found


@pytest.mark.vocabularies
@pytest.mark.parametrize("name", slow_but([*REAL, *EMBEDDING], "gpt-2", "llama-bpe", "llama-spm"))
def test_real_vocabularies(name: str) -> None:
    check(open_model(name))


@pytest.mark.parametrize("name", NAMES)
def test_tiny_vocabularies(open_member: OpenMember, name: str) -> None:
    member = open_member(name)
    assert check(member.weights.pointer) == member.vocabulary.pieces


@pytest.mark.parametrize("make_vocab", [chatml_vocab, spm_vocab])
def test_tokens_that_look_like_marks_or_lose_their_spaces(
    make_vocab: Callable[[], Vocab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some blocks are read whole, others token by token; a pre-tokenizer "default" has spaces dropped."""
    monkeypatch.setattr(pieces, "_BLOCK", 16)
    set_pre, read_block, whole = GGUFWriter.add_tokenizer_pre, pieces._read_block, []
    monkeypatch.setattr(GGUFWriter, "add_tokenizer_pre", lambda writer, _: set_pre(writer, "default"))

    def spy(*arguments: object) -> list[bytes] | None:
        block = read_block(*arguments)  # type: ignore[arg-type]
        whole.append(block is not None)
        return block

    vocab = make_vocab()
    added = [text for text in AWKWARD if text not in {token.text for token in vocab.tokens}]
    vocab.tokens[300:300] = [Token(text, TokenType.USER_DEFINED, text.encode()) for text in added]
    path = tmp_path / "awkward.gguf"
    write_model(path, vocab=vocab, model=llama_model(vocab, 1))
    with lone_member(MemberConfig(name="awkward", path=path, n_ctx=256, n_threads=1)) as member:
        monkeypatch.setattr(pieces, "_read_block", spy)
        assert check(member.weights.pointer)[300 : 300 + len(added)] == [text.encode() for text in added]
    assert set(whole) == {False, True}


@pytest.mark.parametrize("key", ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_an_end_of_generation_that_is_an_ordinary_token(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token 65 is a byte; the header alone makes it the end of something."""
    name, set_eos = f"tokenizer.ggml.{key}_token_id", GGUFWriter.add_eos_token_id
    if key == "eos":
        monkeypatch.setattr(GGUFWriter, "add_eos_token_id", lambda writer, _: set_eos(writer, 65))
    else:
        added = lambda writer, token: (set_eos(writer, token), writer.add_uint32(name, 65))  # noqa: E731
        monkeypatch.setattr(GGUFWriter, "add_eos_token_id", added)
    vocab, path = chatml_vocab(), tmp_path / "ends.gguf"
    write_model(path, vocab=vocab, model=llama_model(vocab, 1))
    with lone_member(MemberConfig(name="ends", path=path, n_ctx=256, n_threads=1)) as member:
        assert len(check(member.weights.pointer)[65]) == 1
        assert 65 in member.vocabulary.end_ids
