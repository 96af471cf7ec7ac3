"""A text's ids while it grows are those of the whole text, control tokens that are written included."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import make_tiny_models
import pytest
from tiny_architectures import llama_model
from tiny_vocabularies import Vocab, chatml_vocab, control, spm_vocab

from me_local.config import MemberConfig
from me_local.llama.weights import VocabularyFile
from me_local.text.growing import TokenizedText
from me_local.text.vocabulary import Vocabulary

WRITTEN = ("[THINK]", "[/THINK]", "<seed:think>", "<|END_RESPONSE|>")
PARTS = ["[THINK]", "[/THINK]", "[/", "THI", "NK]", "<seed:", "think>", "<|END_RESPONSE|>", "[INST]"]
PARTS += ["the cat", " sat", " ", "\n", "é", "analysis", "a]", "[", "<|"]
# llama.cpp lets models write the first three, and knows by the last two that the fourth does not end a reply.
CHANNELS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>")


@pytest.fixture(scope="module", params=[chatml_vocab, spm_vocab])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return read(request.param(), (*WRITTEN, "[INST]"), tmp_path_factory.mktemp("growing") / "model.gguf")


def read(vocab: Vocab, names: Sequence[str], path: Path) -> Vocabulary:
    vocab = replace(vocab, tokens=[*vocab.tokens, *control(*names)])
    make_tiny_models.write_model(path, vocab=vocab, model=llama_model(vocab, 1))
    return VocabularyFile(MemberConfig("m", path)).vocabulary


def test_control_tokens_of_thoughts_are_pieces(vocabulary: Vocabulary) -> None:
    written = {name.decode() for name in vocabulary.written}
    assert written == set(WRITTEN)
    for name, token in vocabulary.written.items():
        assert vocabulary.pieces[token] == name
        assert token not in vocabulary.empty
        assert vocabulary.canonical(name) == [token]
        assert token not in vocabulary.encode(name)
        assert token not in vocabulary.canonical(name, typed=1)
    assert vocabulary.control["[INST]"] in vocabulary.empty


@pytest.mark.parametrize("typed", [0, 1, 12])
def test_ids_of_a_growing_text_are_those_of_the_whole(vocabulary: Vocabulary, typed: int) -> None:
    found = 0
    for seed in range(60):
        random_ = random.Random(seed)
        growing = TokenizedText(vocabulary, at_start=typed > 0, typed=typed)
        text = b"[THINK]the cat"[:typed]
        for _ in range(30):
            text += random_.choice(PARTS).encode()
            ids = growing.ids(text).tolist()
            assert ids == vocabulary.canonical(text, typed=typed, at_start=typed > 0)
            assert b"".join(vocabulary.pieces[token] for token in ids).lstrip() == text.lstrip()
        found += len(set(vocabulary.written.values()) & set(ids))
    assert found > 60


def test_names_that_only_the_reply_completes(vocabulary: Vocabulary) -> None:
    token = vocabulary.written[b"[THINK]"]
    assert token in vocabulary.canonical(b"a[THINK]", typed=1)
    assert token not in vocabulary.canonical(b"a[THINK]", typed=2)


def test_channels(tmp_path: Path) -> None:
    vocabulary = read(chatml_vocab(), CHANNELS, tmp_path / "model.gguf")
    reply = b"<|channel|>analysis<|message|>the cat<|end|><|start|>assistant<|channel|>final<|message|>sat"
    ids = vocabulary.canonical(reply)
    assert vocabulary.joined(ids) == reply
    names = [vocabulary.text_of(token) for token in ids if vocabulary.text_of(token) in CHANNELS]
    assert names == ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"]
    assert {vocabulary.text_of(token) for token in vocabulary.end_ids} >= {"<|return|>", "<|call|>"}
    without = read(chatml_vocab(), ["<|end|>", "<|start|>"], tmp_path / "without.gguf")
    assert without.written == {}
