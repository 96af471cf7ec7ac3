"""Growing texts in the vocabularies of known models: always the ids that the whole text has.

Two places where a text is not what its ids stand for, both of the models' own tokenizers: those that write a space as
U+2581 take that character for a space, and a vocabulary without a token for some byte leaves it out (`read_back`).
"""

import functools
import string
import time
from pathlib import Path

import fetch_vocabularies
import llama_cpp
import numpy as np
import pytest
from conftest import lone_member
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_tiny_models import write_model
from real_vocabularies import EMBEDDING, NAMES, open_model, vocabulary
from selection import slow_but
from tiny_architectures import llama_model
from tiny_vocabularies import Token, TokenType, Vocab, chatml_vocab, spm_vocab

from me_local.config import MemberConfig
from me_local.text import parts as parts_module
from me_local.text import vocabulary as vocabulary_module
from me_local.text.growing import TokenizedText
from me_local.text.messages import Message
from me_local.text.prompts import PromptWriter
from me_local.text.templates import built_in_render, jinja_render
from me_local.text.utf8 import utf8_runs
from me_local.text.vocabulary import Vocabulary

real = pytest.mark.vocabularies
WITHOUT = {("deepseek-llm", "other")}  # kinds of seams that are inside its tokens
CHECKED_BY_LLAMA_CPP = sorted(set(NAMES) - {"aquila", "baichuan", "gpt-neox"})  # these have texts with ids beside them
QUICK = ("gpt-2", "llama-bpe", "llama-spm")  # the other vocabularies are slow tests
WITH_MARKUP = {"command-r": None, "deepseek-coder": "deepseek", "gemma-4": None}  # None: the template in the GGUF

WORDS = [
    "The",
    " the",
    " cat",
    " harbour",
    "s",
    "ing",
    " doesn't",
    " naïve",
    " Straße",
    " дом",
    " है",
    " 한국",
    " 12",
    " a1",
    ".",
    ",",
    "\n",
]
EMOJI = ["🙂", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷🇩🇪", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️", "1️⃣", "\u200d", "\ufe0f", "🏽"]
CODE = [
    "def f(x):\n\treturn x**2",
    "  if (a != b) {\n    i++;\n  }\n",
    "</div>",
    "a[i]=&b;//",
    "#include <x.h>\r\n",
    "0x1F",
]
CJK = "的一是不了人我在有他这中大来上国個時日本語東京にほんごカタカナ한국어。，「」！"
LOOK_ALIKES = ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "<bos>", "<eos>", "<unk>", "<|endoftext|>", "<|eot_id|>"]
LOOK_ALIKES += ["<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<|User|>", "<|USER_TOKEN|>", "[INST]"]
LOOK_ALIKES += ["<|START_OF_TURN_TOKEN|>", "<|channel>", '<|"|>', "<tool_call|>", "<fim_prefix>", "<|im_", "|>", "<|"]
SPACES = " \t\n\r\v\f\u00a0\u3000\u2009\u2028\u200b\u2581"
CUT = [char.encode()[:n] for char in "é你🙂\U000e0067" for n in range(1, len(char.encode()))]


def in_plane(plane: int) -> st.SearchStrategy[str]:
    """One character of a plane of Unicode, assigned or not."""
    codes = st.integers(plane << 16, (plane << 16) + 0xFFFF)
    return codes.filter(lambda code: not 0xD800 <= code < 0xE000).map(chr)


def texts() -> st.SearchStrategy[bytes]:
    """A text of a few parts of any kind, some of them no UTF-8."""
    valid = [
        st.sampled_from(WORDS),
        st.sampled_from(WORDS),
        st.lists(st.sampled_from(WORDS), min_size=3, max_size=8).map("".join),
        st.integers(0, 16).flatmap(in_plane),
        st.text(st.characters(categories=["Mn", "Mc", "Me"]), min_size=1, max_size=3),
        st.sampled_from(EMOJI),
        st.sampled_from(CODE),
        st.text(string.digits, min_size=1, max_size=30),
        st.text(CJK, min_size=1, max_size=12),
        st.sampled_from(LOOK_ALIKES),
        st.text(SPACES, min_size=1, max_size=8),
        st.integers(2, 40).map(lambda n: " " * n),
    ]
    cut = st.sampled_from(CUT) | st.binary(min_size=1, max_size=3)
    parts = st.one_of([*(s.map(str.encode) for s in valid), cut])
    return st.lists(parts, min_size=1, max_size=10).map(b"".join)


def prefixes(text: bytes, sizes: list[int]) -> list[bytes]:
    """What a text has grown to after each piece, of `sizes` bytes in turn."""
    ends, end = [], 0
    while end < len(text):
        end += sizes[len(ends) % len(sizes)]
        ends.append(text[:end])
    return ends


def writable(vocabulary: Vocabulary, text: bytes) -> bool:
    """Whether a member with this vocabulary is ever asked for its ids of this text."""
    strays = [byte for run, valid in utf8_runs(text) if not valid for byte in run]
    return vocabulary.can_write(frozenset(strays))


@functools.cache
def has_no_piece_for(vocabulary: Vocabulary) -> bytes:
    """The bytes that stand in no token of their own."""
    have = {piece[0] for piece in vocabulary.pieces if len(piece) == 1}
    return bytes(byte for byte in range(256) if byte not in have)


@functools.cache
def writes_spaces_as_a_character(vocabulary: Vocabulary) -> bool:
    return any(vocabulary.text_of(i) == "▁" and vocabulary.pieces[i] == b" " for i in range(vocabulary.size))


def read_back(vocabulary: Vocabulary, text: bytes) -> bytes:
    """The text as the vocabulary can hold it (see above)."""
    if writes_spaces_as_a_character(vocabulary):
        text = text.replace("▁".encode(), b" ")
    return text.translate(None, has_no_piece_for(vocabulary))


@real
def test_every_file_is_listed() -> None:
    names = {path.stem.removeprefix("ggml-vocab-") for path in fetch_vocabularies.kept(fetch_vocabularies.folder())}
    assert names == set(NAMES) | set(EMBEDDING)


@real
@pytest.mark.parametrize("name", slow_but(CHECKED_BY_LLAMA_CPP, *QUICK))
def test_ids_are_those_of_the_models_own_tokenizer(name: str) -> None:
    path = fetch_vocabularies.folder() / f"ggml-vocab-{name}.gguf"
    given_texts = path.with_name(path.name + ".inp").read_bytes().split(b"\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().splitlines()
    for text, line in zip(given_texts, lines, strict=False):
        expected = [int(token) for token in line.split()]
        growing = TokenizedText(vocabulary(name), at_start=True)
        for prefix in prefixes(text, [1]):
            ids = growing.ids(prefix)
        assert not text or ids.tolist() == expected, text


@real
@pytest.mark.parametrize("name", slow_but(NAMES, *QUICK))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=texts(), sizes=st.lists(st.integers(1, 16), min_size=1, max_size=6), at_start=st.booleans())
@example(text="He said ▁hi there ▁▁ x".encode(), sizes=[3], at_start=True)
@example(text=b"\x03 \x0b a \xf2\x80\x80\x80 b \xf1\x80\x80\x80 c", sizes=[1], at_start=False)
def test_a_growing_text_has_the_ids_of_the_whole(name: str, text: bytes, sizes: list[int], at_start: bool) -> None:
    words = vocabulary(name)
    growing = TokenizedText(words, at_start=at_start)
    final = np.empty(0, dtype=np.int32)
    for prefix in prefixes(text, sizes):
        if not writable(words, prefix):
            continue
        ids = growing.ids(prefix)
        assert ids.tolist() == words.encode(prefix, at_start=at_start)
        assert len(final) <= growing.final <= len(ids)
        assert np.array_equal(ids[: len(final)], final)
        final = ids[: growing.final].copy()


@real
@pytest.mark.parametrize("name", slow_but(NAMES, *QUICK))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(text=texts())
def test_ids_give_the_text_back_and_no_control_token(name: str, text: bytes) -> None:
    words = vocabulary(name)
    if not writable(words, text):
        text = text.decode("utf-8", "ignore").encode()
    ids = words.encode(text)
    assert words.joined(ids) == read_back(words, text)
    space = b" " if words.adds_space and text and next(utf8_runs(text))[1] else b""
    assert words.joined(words.encode(text, at_start=True)) == space + read_back(words, text)
    assert not set(ids) & (set(words.control.values()) | set(words.end_ids))


def seams() -> st.SearchStrategy[tuple[str, str, str]]:
    """A kind of seam, and what stands on either side of one."""
    letters = st.characters(min_codepoint=128, categories=["L", "N", "M"])
    ideographs = st.characters(min_codepoint=0x4E00, max_codepoint=0x9FBF)
    return st.one_of(
        st.tuples(st.just("ascii"), st.sampled_from(string.ascii_letters + string.digits), st.just(" ")),
        st.tuples(st.just("other"), st.sampled_from("жЯёéßñαΩבّعيहीकไทยำ한글字ー５²") | letters, st.just(" ")),
        st.tuples(st.just("wide"), st.sampled_from("的一㐀をんーカナ") | ideographs, st.sampled_from("、。！，：；？")),
    )


@real
@pytest.mark.parametrize("name", slow_but(NAMES, *QUICK))
@settings(max_examples=200, deadline=None, derandomize=True)
@given(left=texts(), right=texts(), seam=seams())
def test_the_two_sides_of_a_seam_do_not_depend_on_each_other(
    name: str, left: bytes, right: bytes, seam: tuple[str, str, str]
) -> None:
    words = vocabulary(name)
    kind, end, start = seam
    assert getattr(words.seams, kind) == ((name, kind) not in WITHOUT)
    if (name, kind) in WITHOUT:
        return
    before, behind = left + end.encode(), start.encode() + right
    assert len(before) in words.seams.find(before + behind, 0)
    if writable(words, before + behind):
        assert words.encode(before + behind) == words.encode(before) + words.encode(behind)


@real
@pytest.mark.parametrize("name", slow_but(NAMES, *QUICK))
def test_no_control_token_is_found_in_a_text(name: str) -> None:
    words = vocabulary(name)
    for control in list(words.control)[:40]:
        for text in (control.encode(), b"a " + control.encode() + b" b", control.encode() * 2):
            assert not set(words.encode(text)) & set(words.control.values())


@real
@pytest.mark.parametrize("name", slow_but(NAMES, *QUICK))
def test_long_runs_without_a_seam(name: str) -> None:
    """llama.cpp's regular expressions recurse once for each character of a match: 30,000 overflow a usual stack."""
    words = vocabulary(name)
    for char in ("a", "7", "!", " ", "你"):
        text = char.encode() * 40_000
        assert words.joined(words.encode(text)) == text


@functools.cache
def user_defined(name: str) -> list[str]:
    return [token.decode() for token in vocabulary(name)._parts._user_defined] or ["a"]


@real
@pytest.mark.parametrize("name", slow_but(NAMES, "llama-spm"))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), at_start=st.booleans())
def test_a_long_text_in_parts_has_the_ids_of_the_whole(name: str, data: st.DataObject, at_start: bool) -> None:
    words = vocabulary(name)
    often = ["\n", "\n\n", "  ", "\t", "word", " the", "字", "🙂", "ø", "1"]
    some = st.sampled_from(user_defined(name)) | st.sampled_from(often)
    drawn = data.draw(st.lists(st.tuples(some | st.characters(codec="utf-8"), st.integers(1, 5)), max_size=30))
    text = "".join(part * times for part, times in drawn).encode()
    anchor, length = (b"", 0) if at_start else (words._anchor, words._anchor_length)
    whole = words._encode(anchor + text)[length:]
    with pytest.MonkeyPatch.context() as patch:
        for module in (parts_module, vocabulary_module):
            patch.setattr(module, "LONG", 16)
        patch.setattr(parts_module, "_MANY", 3)
        assert words.encode(text, at_start=at_start) == whole
    assert words._fewest(text) <= len(whole)


PATHOLOGICAL = {
    "line feeds": "\n\na" * 333_333,
    "yes": "y\n" * 500_000,
    "one letter": "a" * 1_000_000,
    "spaces": " " * 1_000_000,
    "control": "<|im_end|>" * 100_000,
    "empty lines": "\n" * 1_000_000,
}


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_megabyte_without_seams_takes_no_time_that_grows_with_its_square(name: str) -> None:
    """Parts of at most a few KB each where llama.cpp's time would grow so; it is linear in the others."""
    words = vocabulary(name)
    for kind, text in PATHOLOGICAL.items():
        began = time.process_time()
        ids = words.encode(text.encode(), at_start=True)
        assert time.process_time() - began < 20, kind  # by the square of the length it took minutes
        assert words.joined(ids).removeprefix(b" " if words.adds_space else b"") == text.encode(), kind


@functools.cache
def markup_writer(name: str) -> PromptWriter:
    words, model = vocabulary(name), open_model(name)
    built_in = WITH_MARKUP[name]
    if built_in is not None:
        return PromptWriter(words, built_in_render(built_in))
    source = llama_cpp.llama_model_chat_template(model, None).decode()
    tokens = {"bos_token": words.text_of(words.bos or 0), "eos_token": words.text_of(words.end_ids[0])}
    return PromptWriter(words, jinja_render(source, tokens, name))


@pytest.mark.slow
@real
def test_which_vocabularies_have_markup() -> None:
    assert {name for name in NAMES if vocabulary(name).markup} == set(WITH_MARKUP)


@real
@pytest.mark.parametrize("name", list(WITH_MARKUP))
def test_tokenizers_find_markup_in_any_text(name: str) -> None:
    """Why prompts need care: `encode` alone takes a user's text for markup."""
    words = vocabulary(name)
    for text in words.markup:
        assert [words.text_of(token) for token in words.encode(text.encode())] == [text]


@real
@pytest.mark.parametrize("name", list(WITH_MARKUP))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), role=st.sampled_from(["user", "system"]))
def test_markup_in_a_message_stays_text(name: str, data: st.DataObject, role: str) -> None:
    words, writer = vocabulary(name), markup_writer(name)
    whole = [*words.markup, *list(words.control)[:20]]
    halves = [text[:n] for text in whole for n in (1, 2, len(text) // 2)] + [text[2:] for text in whole]
    parts = st.sampled_from(whole) | st.sampled_from(halves) | st.sampled_from(["x", " ", "\n", "ä", "|", ">"])
    text = "x" + "".join(data.draw(st.lists(parts, min_size=1, max_size=6))) + "x"  # templates strip messages
    structure = {words.encode(markup.encode())[0] for markup in words.markup} | set(words.control.values())

    def prompt(content: str) -> list[int]:
        opening = [Message("system", content)] if role == "system" else []
        return writer.prompt([*opening, Message("user", content), Message("assistant", "Yes."), Message("user", "x")])

    ids, harmless = list(prompt(text)), list(prompt("x"))
    assert [i for i in ids if i in structure] == [i for i in harmless if i in structure]
    assert text.encode() in words.joined(ids)


def seams_inside(kind: str) -> tuple[Vocab, bytes]:
    """A made-up vocabulary with a token that has a seam inside it, and the text of this token."""
    if kind == "SPM":
        vocab = spm_vocab()
        # SentencePiece merges any two neighbours that are a token together.
        vocab.tokens.append(Token("e▁t", TokenType.NORMAL, b"e t", 1.0))
        vocab.tokens.append(Token("e▁", TokenType.NORMAL, b"e ", 2.0))
        return vocab, b"e t"
    vocab = chatml_vocab()
    vocab.tokens.append(Token("New York", TokenType.USER_DEFINED, b"New York"))
    return vocab, b"New York"


@pytest.mark.parametrize("kind", ["SPM", "BPE"])
def test_a_vocabulary_with_a_seam_inside_a_token_takes_the_full_path(tmp_path: Path, kind: str) -> None:
    vocab, piece = seams_inside(kind)
    path = tmp_path / "seam.gguf"
    write_model(path, vocab=vocab, model=llama_model(vocab, 1))
    with lone_member(MemberConfig(name="seam", path=path, n_ctx=256, n_threads=1)) as member:
        words = member.vocabulary
        assert not words.seams.ascii
        seam = piece.index(b" ")
        # Tokenised apart, the two sides are not what the whole is: the rule does not hold here.
        assert words.encode(piece) != words.encode(piece[:seam]) + words.encode(piece[seam:])
        assert [words.pieces[token] for token in words.encode(piece)] == [piece]
        _check_growth(words, piece)


@pytest.mark.parametrize("name", ["plain", "Phi-3"])
@pytest.mark.parametrize("kind", ["SPM", "BPE"])
@pytest.mark.parametrize("piece", ["foo", "Ж", "字", "<x>", "é="])
def test_behind_a_token_of_a_user_the_space_may_be_another(tmp_path: Path, name: str, kind: str, piece: str) -> None:
    """An SPM tokenizer adds one there, and for models called Phi-3 llama.cpp drops those that there are."""
    vocab = spm_vocab() if kind == "SPM" else chatml_vocab()
    vocab.tokens.append(Token(piece, TokenType.USER_DEFINED, piece.encode()))
    for control in {"<unk>", "<s>", "</s>", "<|endoftext|>"} - {token.text for token in vocab.tokens}:
        vocab.tokens.append(Token(control, TokenType.CONTROL, b""))  # llama.cpp looks for them in Phi-3
    path = tmp_path / f"{name}.gguf"
    write_model(path, vocab=vocab, model=llama_model(vocab, 1))
    text = f"the {piece} the{piece}\uff0c at {piece}\u3002字\u3002  Ж 字 the é cat".encode()
    with lone_member(MemberConfig(name="user", path=path, n_ctx=256, n_threads=1)) as member:
        words = member.vocabulary
        alone = words.encode(piece.encode())
        changed = any(words.encode(piece.encode() + t) != alone + words.encode(t) for t in (b" t", b"  t"))
        assert changed == (kind == "SPM" or name == "Phi-3")
        whole = (True, True, True)
        left = {"foo": (False, False, True), "Ж": (True, False, True), "字": (True, False, False)}.get(piece, whole)
        assert (words.seams.ascii, words.seams.other, words.seams.wide) == (left if changed else whole)
        growing = TokenizedText(words, at_start=False)
        for prefix in prefixes(text, [1]):
            if writable(words, prefix):
                assert growing.ids(prefix).tolist() == words.encode(prefix)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def _check_growth(words: Vocabulary, piece: bytes, data: st.DataObject) -> None:
    parts = st.sampled_from([piece, piece[:2], piece[2:], b"the", b" the", b"New", b" ", b"e", b"t", b"\xc3", b"12"])
    text = b"".join(data.draw(st.lists(parts, max_size=12)))
    growing = TokenizedText(words, at_start=False)
    for prefix in prefixes(text, data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))):
        assert growing.ids(prefix).tolist() == words.encode(prefix)
        assert growing.final == 0
