"""Long texts in parts: the ids are those of the whole, and how few of them there can be."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import lone_member
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_tiny_models import write_model
from tiny_architectures import llama_model
from tiny_vocabularies import Token, TokenType, Vocab, chatml_vocab, spm_vocab
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from me_local.config import MemberConfig, Overrides
from me_local.ensemble import Ensemble, load
from me_local.errors import PromptTooLongError, RunError
from me_local.llama.member import Member
from me_local.model import EvaluationInterruptedError
from me_local.text import parts as parts_module
from me_local.text import vocabulary as vocabulary_module
from me_local.text.parts import Fewest, Parts, _rivals
from me_local.text.seams import Seams
from me_local.text.vocabulary import Vocabulary

OpenMember = Callable[..., Member]
OpenEnsemble = Callable[..., Ensemble]
USER_DEFINED = int(TokenType.USER_DEFINED)
PIECES = ["<x>", "\n", "\n\n", "\n\n\n\n", "é", "foo", "foobar", "▁▁"]


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_short(monkeypatch)


def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parts_module, vocabulary_module):
        monkeypatch.setattr(module, "LONG", 8)
    monkeypatch.setattr(parts_module, "_MANY", 2)


def parts(*user_defined: str, strips: int = 0) -> Parts:
    texts = [text.encode() for text in user_defined]
    flag = vocabulary_module.llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
    return Parts(texts, [flag | strips] * len(texts), Seams(b"\na\n", normalises=False), merges=False)


def test_a_text_is_cut_in_front_of_the_tokens_that_are_looked_for_first(short_parts: None) -> None:
    assert list(parts("<x>", "<xy>").of(b"<xy><x>abcdefghij<x><x>!")) == [b"<xy><x>abcdefghij", b"<x><x>!"]
    # Of nine line feeds four are found first, then four more, and one.
    assert list(parts("\n", "\n\n\n\n").of(b"\n" * 9 + b"a\n")) == [b"\n" * 8, b"\na\n"]
    assert list(parts("<x>").of(b"no place at all")) == [b"no", b" place", b" at all"]
    assert list(parts().of(b"noplaceatall!")) == [b"noplaceatall!"]


@pytest.mark.parametrize(
    ("tokens", "strips"),
    [
        (["ab", "bcd"], 0),  # in "abcd" llama.cpp finds the longer one first
        (["ab", "bc"], 0),  # which of the two is found first is up to a sort that is not stable
        (["<x>"], parts_module._LEFT),
        (["<x>", "\n"], parts_module._RIGHT),
    ],
)
def test_where_a_search_from_the_left_may_find_others_it_is_not_cut_there(
    short_parts: None, tokens: list[str], strips: int
) -> None:
    text = "".join(tokens).encode() * 5
    assert list(parts(*tokens, strips=strips).of(text)) == [text]


def with_user_defined(vocab: Vocab) -> Vocab:
    have = {token.text for token in vocab.tokens}
    vocab.tokens.extend(Token(p, TokenType.USER_DEFINED, p.encode()) for p in PIECES if p not in have)
    for control in {"<unk>", "<s>", "</s>", "<|endoftext|>"} - {token.text for token in vocab.tokens}:
        vocab.tokens.append(Token(control, TokenType.CONTROL, b""))  # llama.cpp looks for them in Phi-3
    return vocab


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Vocabulary]]:
    """Both kinds with tokens of a user; for models called Phi-3 llama.cpp drops the white space behind them."""
    opened, made = [], {}
    for kind, make in (("SPM", spm_vocab), ("BPE", chatml_vocab)):
        for name in ("plain", "Phi-3"):
            vocab, path = with_user_defined(make()), tmp_path_factory.mktemp(kind) / f"{name}.gguf"
            write_model(path, vocab=vocab, model=llama_model(vocab, 1))
            opened.append(lone_member(MemberConfig(name="user", path=path, n_ctx=256, n_threads=1)))
            made[kind, name] = opened[-1].__enter__().vocabulary
    yield made
    for member in opened:
        member.__exit__(None, None, None)


@pytest.mark.parametrize("name", ["plain", "Phi-3"])
@pytest.mark.parametrize("kind", ["SPM", "BPE"])
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), at_start=st.booleans())
def test_the_parts_have_the_ids_of_the_whole(
    vocabularies: dict[tuple[str, str], Vocabulary],
    short_parts: None,
    kind: str,
    name: str,
    data: st.DataObject,
    at_start: bool,
) -> None:
    words = vocabularies[kind, name]
    some = [
        *PIECES,
        "the",
        " the",
        " ",
        "  ",
        "\t",
        "a",
        "Ж",
        "字",
        "、",
        "🙂",
        "▁",
        "\r\n",
        "oo",
        "<",
        "x>",
        "harbour",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(some) | st.characters(codec="utf-8"), max_size=40))).encode()
    anchor, length = (b"", 0) if at_start else (words._anchor, words._anchor_length)
    whole = words._encode(anchor + text)[length:]
    assert words.encode(text, at_start=at_start) == whole
    assert words._fewest(text) <= len(whole)


def test_what_is_joined_by_no_token_is_cut_for_sentencepiece(
    vocabularies: dict[tuple[str, str], Vocabulary], short_parts: None
) -> None:
    assert max(map(len, vocabularies["SPM", "plain"]._parts.of("字".encode() * 50))) <= 9


def test_how_few_tokens_a_text_has_at_least() -> None:
    fewest = Fewest([b"aaaa", b"a", b"b", b"ab"])
    assert fewest.of(b"a" * 8) == 2
    assert fewest.of(b"b" * 8) == 4
    assert fewest.of(b"aaaabb") == 2
    assert fewest.of(b"zz\xff") == 0  # bytes without a token may be lost
    assert fewest.of("▁".encode() * 9) == 0  # each may be a space of a longer token


def test_the_work_ends_where_a_text_is_too_long(open_member: OpenMember) -> None:
    vocabulary = open_member("bpe_a").vocabulary
    heard: list[int] = []

    def watch(count: int) -> None:
        heard.append(count)
        if count > 2000:
            raise PromptTooLongError("enough")

    with pytest.raises(PromptTooLongError):
        vocabulary.encode(b"Z" * 100_000, watch=watch)
    assert len(heard) == 1  # before anything is tokenised
    heard.clear()
    text = b"the cat " * 4000
    with pytest.raises(PromptTooLongError):
        vocabulary.encode(text, watch=watch)
    assert heard == sorted(heard)
    assert heard[-1] < len(vocabulary.encode(text))


def test_a_closed_vocabulary_cuts_nothing(open_member: OpenMember) -> None:
    vocabulary = open_member("bpe_a").vocabulary
    vocabulary.close()
    with pytest.raises(RunError, match="the ensemble is closed"):
        vocabulary.encode(b"the cat " * 4000)


def test_several_threads_tokenise_at_once(open_member: OpenMember) -> None:
    vocabulary = open_member("bpe_a").vocabulary
    texts = [f"word {i} é".encode() * 2 for i in range(400)]
    expected = [vocabulary._encode(text) for text in texts]
    found: dict[int, list[list[int]]] = {}

    def work(index: int) -> None:
        found[index] = [vocabulary._encode(text) for text in texts]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(4)] == [expected] * 4


@pytest.mark.parametrize("raw", [True, False])
def test_a_prompt_that_nobody_waits_for_is_not_tokenised_to_its_end(open_ensemble: OpenEnsemble, raw: bool) -> None:
    ensemble, cancelled = open_ensemble("bpe_a", "spm"), threading.Event()
    cancelled.set()
    with pytest.raises(EvaluationInterruptedError, match="while the prompt was tokenised"):
        ensemble.stream("the cat " * 4000, Overrides(seed=1), raw=raw, cancelled=cancelled)


@pytest.mark.parametrize("raw", [True, False])
def test_a_prompt_that_is_far_too_long_is_not_counted(open_ensemble: OpenEnsemble, raw: bool) -> None:
    ensemble = open_ensemble("bpe_a")
    message = (
        r'^the prompt has more than 66048 tokens for member "bpe_a", which exceeds the available context size of 512'
    )
    with pytest.raises(PromptTooLongError, match=message):
        ensemble.stream("the cat " * 100_000, raw=raw)


@pytest.mark.parametrize("others", [[], ["spm"]])
def test_more_tokens_than_bytes_end_a_reply_where_the_context_is_full(
    tiny: dict[str, Path], open_member: OpenMember, tmp_path: Path, others: list[str]
) -> None:
    """NFKC makes 18 characters, of 33 bytes, of U+FDFA, which has three."""
    vocabulary = open_member("bpe_a").vocabulary
    tokenizer = Tokenizer(models.BPE(vocab={vocabulary.text_of(i): i for i in range(vocabulary.size)}, merges=[]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "nfkc.json"))
    members = [
        f'[[members]]\nname = "{n}"\npath = "{tiny[n]}"\nn_ctx = 512\nn_threads = 1\n' for n in ["bpe_a", *others]
    ]
    members[0] += 'tokenizer = "nfkc.json"\n'
    (tmp_path / "models.toml").write_text("".join(members))
    with load(tmp_path / "models.toml") as ensemble:
        text = "\ufdfa" * 15
        [first, *_] = ensemble.members
        assert first.vocabulary.expands
        assert len(first.vocabulary.encode(text.encode())) == 495
        for strategy in ("me", "ce"):
            settings = Overrides(seed=1, max_tokens=500, strategy=strategy)  # type: ignore[arg-type]
            reply = ensemble.generate(text, settings, raw=True)
            assert reply.finish_reason in ("length", "stop")
            assert len(first.caches[0].ids) <= 512


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokens",
    [
        [b"\xe2\x80\xb9" * k for k in range(3, 1499)],
        [b"a" * k for k in range(2, 2499)],
        [b"%04d" % i * 3 for i in range(10000)],
        [b"a" * (k % 60 + 2) + b"%d" % k for k in range(5000)],
    ],
)
def test_a_hostile_set_of_tokens_is_not_searched_for_long(tokens: list[bytes]) -> None:
    began = time.process_time()
    any(_rivals(tokens))
    assert time.process_time() - began < 20  # without a limit it takes hours
