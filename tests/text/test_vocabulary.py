"""Bytes and ids: single vocabularies, growing texts, and the unified vocabulary."""

import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import lone_member
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_tiny_models import write_model
from tiny_architectures import llama_model
from tiny_vocabularies import Token, TokenType, chatml_vocab, spm_vocab
from tokenizers import AddedToken, Tokenizer, models

from me_local.config import MemberConfig
from me_local.errors import InputError, LoadError
from me_local.llama.member import Member
from me_local.text import vocabulary as vocabulary_module
from me_local.text.growing import TokenizedText
from me_local.text.unified import END, UnifiedVocabulary
from me_local.text.utf8 import utf8_runs
from me_local.text.vocabulary import Vocabulary

OpenMember = Callable[..., Member]
NAMES = ["bpe_a", "bpe_c", "spm"]
TEXT = "Hello wörld 👋\n\n  the cat sat, 12 times.<|im_end|></s>\x00".encode()


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        (b"", []),
        (b"abc", [(b"abc", True)]),
        (b"a\xc3", [(b"a", True), (b"\xc3", False)]),
        (b"\xc3\xa4\xff\xfeb", [("ä".encode(), True), (b"\xff", False), (b"\xfe", False), (b"b", True)]),
        (b"\xf0\x9f\x91", [(b"\xf0\x9f\x91", False)]),
        (b"\xe2\x82x", [(b"\xe2\x82", False), (b"x", True)]),
        (b"\xed\xa0\x80", [(b"\xed", False), (b"\xa0", False), (b"\x80", False)]),
    ],
)
def test_runs_of_utf8(text: bytes, runs: list[tuple[bytes, bool]]) -> None:
    assert list(utf8_runs(text)) == runs


@pytest.mark.parametrize("name", NAMES)
def test_encoding_and_joining_gives_the_text_back(open_member: OpenMember, name: str) -> None:
    vocabulary = open_member(name).vocabulary
    assert vocabulary.joined(vocabulary.encode(TEXT)) == TEXT
    ids = vocabulary.encode(TEXT, at_start=True)
    assert vocabulary.joined(ids) == (b" " if name == "spm" else b"") + TEXT


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_in_a_text_stay_text(open_member: OpenMember, name: str) -> None:
    vocabulary = open_member(name).vocabulary
    assert vocabulary.control
    for text in vocabulary.control:
        ids = vocabulary.encode(text.encode())
        assert not set(ids) & set(vocabulary.control.values())
        assert vocabulary.joined(ids) == text.encode()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_are_no_characters_become_single_byte_tokens(open_member: OpenMember, name: str) -> None:
    vocabulary = open_member(name).vocabulary
    ids = vocabulary.encode(b"the\xff\xc3 cat\xf0\x9f")
    assert [vocabulary.pieces[i] for i in ids if max(vocabulary.pieces[i]) >= 0x80] == [
        b"\xff",
        b"\xc3",
        b"\xf0",
        b"\x9f",
    ]
    assert vocabulary.joined(ids) == b"the\xff\xc3 cat\xf0\x9f"
    assert vocabulary.can_write(frozenset({0xFF, 0x80}))


def test_the_facts_of_the_tiny_vocabularies(open_member: OpenMember) -> None:
    bpe_a, bpe_c, spm = (open_member(name).vocabulary for name in NAMES)
    assert (bpe_a.kind, bpe_c.kind, spm.kind) == ("BPE", "BPE", "SPM")
    assert (bpe_a.adds_space, spm.adds_space) == (False, True)
    assert bpe_a.bos is None
    assert bpe_c.text_of(bpe_c.bos or 0) == spm.text_of(spm.bos or 0) == "<s>"
    assert {bpe_a.text_of(i) for i in bpe_a.end_ids} == {"<|endoftext|>", "<|im_end|>"}
    assert all(v.seams.ascii for v in (bpe_a, bpe_c, spm))


def words() -> st.SearchStrategy[bytes]:
    """Texts that are likely to merge in odd ways: words, white space, cut characters, control look-alikes."""
    parts = st.sampled_from(
        [
            *(
                b" the",
                b"the",
                b" cat",
                b"s",
                b" ",
                b"  ",
                b"\n",
                b"a1",
                b" 12",
                b"\xc3\xa9",
                b"\xc3",
                b"\xa9",
                b"\xff",
            ),
            *("👋".encode()[:2], "👋".encode()[2:], b"<|im_end|>", b"</s>", b"\x00", "你好".encode(), b" Hello", b"."),
        ]
    )
    return st.lists(parts | st.binary(max_size=3), max_size=12).map(b"".join)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(words(), max_size=8), at_start=st.booleans())
def test_a_growing_text_has_the_ids_of_the_whole(
    open_member: OpenMember, name: str, pieces: list[bytes], at_start: bool
) -> None:
    vocabulary = _cached(open_member, name)
    growing = TokenizedText(vocabulary, at_start=at_start)
    text, saved = b"", 0
    for piece in pieces:
        text += piece
        assert growing.ids(text).tolist() == vocabulary.encode(text, at_start=at_start)
        assert len(growing.ids(text)) <= len(text) - saved + 1  # a space may stand in front
        assert growing.saved >= saved - 1
        saved = growing.saved


_members: dict[str, Vocabulary] = {}


def _cached(open_member: OpenMember, name: str) -> Vocabulary:
    """One vocabulary for all examples of a test; reading it does not need its context any more."""
    if name not in _members:
        _members[name] = open_member(name).vocabulary
    return _members[name]


@pytest.fixture(autouse=True)
def _forget_closed_members() -> None:
    _members.clear()


def test_a_text_grows_past_its_first_buffer(open_member: OpenMember) -> None:
    vocabulary = open_member("bpe_a").vocabulary
    growing = TokenizedText(vocabulary, at_start=False)
    text = b"the cat sat on the mat. " * 1000
    growing.ids(text[:100])
    assert growing.ids(text).tolist() == vocabulary.encode(text)


def test_without_seams_the_whole_text_is_tokenised(open_member: OpenMember) -> None:
    vocabulary = open_member("bpe_a").vocabulary
    vocabulary.seams.ascii = vocabulary.seams.other = vocabulary.seams.wide = False
    calls: list[bytes] = []
    encode = vocabulary.encode

    def spy(text: bytes, *, at_start: bool = False) -> list[int]:
        calls.append(text)
        return encode(text, at_start=at_start)

    vocabulary.encode = spy  # type: ignore[method-assign]
    growing = TokenizedText(vocabulary, at_start=False)
    growing.ids(b"the cat")
    growing.ids(b"the cat sat")
    assert calls == [b"the cat", b"the cat sat"]


def test_a_tokenizer_with_a_state_has_no_seams(open_member: OpenMember, monkeypatch: pytest.MonkeyPatch) -> None:
    read = vocabulary_module.header_value
    key = b"tokenizer.ggml.model"
    monkeypatch.setattr(vocabulary_module, "header_value", lambda m, k: b"hybriddna" if k == key else read(m, k))
    seams = open_member("bpe_a").vocabulary.seams
    assert (seams.ascii, seams.other, seams.wide) == (False, False, False)


def test_behind_tokens_that_were_added_to_a_tokenizer_file_there_are_no_seams(
    open_member: OpenMember, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    plain = open_member("bpe_a").vocabulary
    tokenizer = Tokenizer(_byte_level(plain))
    tokenizer.save(str(path))
    assert open_member("bpe_a", tokenizer=path).vocabulary.seams.ascii
    tokenizer.add_tokens([AddedToken(plain.text_of(plain.encode(b"a")[0]), rstrip=True, special=False)])
    tokenizer.save(str(path))
    seams = open_member("bpe_a", tokenizer=path).vocabulary.seams
    assert (seams.ascii, seams.other) == (False, False)


def test_a_unified_vocabulary_numbers_equal_bytes_alike(open_member: OpenMember) -> None:
    bpe, spm = open_member("bpe_c").vocabulary, open_member("spm").vocabulary
    unified = UnifiedVocabulary([bpe, spm])
    assert not unified.same
    assert len(set(unified.pieces)) == len(unified.pieces)
    for vocabulary, numbers in zip((bpe, spm), unified.numbers, strict=True):
        for token, piece in enumerate(vocabulary.pieces):
            if token in vocabulary.end_ids:
                assert numbers[token] == END
            elif not piece:
                assert numbers[token] == -1
            else:
                assert unified.pieces[numbers[token]] == piece


def test_one_shared_vocabulary_keeps_its_ids(open_member: OpenMember) -> None:
    first, second = open_member("bpe_a").vocabulary, open_member("bpe_b").vocabulary
    unified = UnifiedVocabulary([first, second])
    assert unified.same
    assert all(n in (-1, END, token + 1) for token, n in enumerate(unified.numbers[0]))
    assert [unified.pieces[token + 1] for token in range(first.size)] == first.pieces


def test_a_tokenizer_file_replaces_the_tokenizer_of_the_gguf(open_member: OpenMember, tmp_path: Path) -> None:
    vocabulary = open_member("bpe_a").vocabulary
    path = tmp_path / "tokenizer.json"
    Tokenizer(_byte_level(vocabulary)).save(str(path))
    # A byte-level model without merges, whose alphabet renders as itself: one id for each ASCII character.
    own = open_member("bpe_a", tokenizer=path).vocabulary
    assert own.encode(b"cat") == [vocabulary.encode(bytes([byte]))[0] for byte in b"cat"]
    assert vocabulary.encode(b" cat") != own.encode(b"cat")


def _byte_level(vocabulary: Vocabulary) -> models.BPE:
    return models.BPE(vocab={vocabulary.text_of(i): i for i in range(vocabulary.size)}, merges=[])


def test_a_tokenizer_file_of_another_model_is_refused(open_member: OpenMember, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE(vocab={"x": 0, "y": 1}, merges=[])).save(str(path))
    with pytest.raises(LoadError, match=r'token 0 is "x" here .* another model'):
        open_member("bpe_a", tokenizer=path)
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(LoadError, match=r"not a tokenizer\.json"):
        open_member("bpe_a", tokenizer=path)


def test_the_same_pieces_with_another_tokenizer_are_another_vocabulary(open_member: OpenMember, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    plain = open_member("bpe_a").vocabulary
    Tokenizer(_byte_level(plain)).save(str(path))
    assert not UnifiedVocabulary([plain, open_member("bpe_a", tokenizer=path).vocabulary]).same


def test_a_tokenizer_file_does_not_cut_or_fill_texts(open_member: OpenMember, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(_byte_level(open_member("bpe_a").vocabulary))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(path))
    assert len(open_member("bpe_a", tokenizer=path).vocabulary.encode(b"abcdefghijklmnopqrst")) == 20


def test_a_tokenizer_file_with_tokens_that_the_model_lacks_is_refused(open_member: OpenMember, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(_byte_level(open_member("bpe_a").vocabulary))
    tokenizer.add_tokens(["one more"])
    tokenizer.save(str(path))
    with pytest.raises(LoadError, match=r'its token "one more" is not in the GGUF, which has 400 tokens'):
        open_member("bpe_a", tokenizer=path)


def test_an_spm_vocabulary_without_a_byte_that_characters_need_is_refused(tmp_path: Path) -> None:
    """llama.cpp would end the process at the first character without a token. 0xC0 stands in no character."""
    whole, path = spm_vocab(), tmp_path / "model.gguf"

    def load(*lacking: bytes) -> Member:
        vocab = replace(whole, tokens=[token for token in whole.tokens if token.piece not in lacking])
        write_model(path, vocab=vocab, model=llama_model(vocab, 1))
        return stack.enter_context(lone_member(MemberConfig(name="spm", path=path, n_ctx=512, n_threads=1)))

    with ExitStack() as stack:
        with pytest.raises(LoadError, match=r'member "spm": .*: its vocabulary has no token for byte 0x9F'):
            load(b"\x9f", b"\xf0", b"\xff")
        member = load(b"\xc0", b"\xff")
        assert member.vocabulary.joined(member.vocabulary.encode(TEXT)) == TEXT


def test_a_token_of_any_length_is_read_whole(tmp_path: Path) -> None:
    vocab = chatml_vocab()
    long = "=" * 1000
    vocab.tokens.append(Token(long, TokenType.USER_DEFINED, long.encode()))
    path = tmp_path / "long.gguf"
    write_model(path, vocab=vocab, model=llama_model(vocab, 1))
    with lone_member(MemberConfig(name="long", path=path, n_ctx=256, n_threads=1)) as member:
        assert member.vocabulary.pieces[-1] == long.encode()


def test_a_long_text_is_tokenised_whole(open_member: OpenMember) -> None:
    vocabulary = open_member("bpe_a").vocabulary
    text = b"x" * 20_000 + b"\n"
    stack = threading.stack_size()
    assert vocabulary.encode(text) == vocabulary.encode(b"x") * 20_000 + vocabulary.encode(b"\n")
    assert threading.stack_size() == stack


def test_a_text_that_no_stack_is_large_enough_for(open_member: OpenMember, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = open_member("bpe_a").vocabulary

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    with pytest.raises(InputError, match="a text of 10,000 bytes is too long: no memory to tokenise it in"):
        vocabulary.encode(b"a" * 10_000)


@pytest.mark.parametrize("name", ["bpe_a", "spm"])
@pytest.mark.parametrize("text", [b"the cat", b" the cat", "caf\u00e9".encode(), b"x"])
def test_ids_spell_the_text_that_they_are_of(open_member: OpenMember, name: str, text: bytes) -> None:
    """Without the space that some put in front of it."""
    vocabulary = open_member(name).vocabulary
    begin = [] if vocabulary.bos is None else [vocabulary.bos]
    ids = vocabulary.encode(text, at_start=True)
    assert vocabulary.spelled(ids) == text
    assert vocabulary.spelled(begin + ids) == text
