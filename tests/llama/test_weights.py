"""Weights that several members share."""

import logging
from contextlib import closing
from pathlib import Path

import make_tiny_models
import numpy as np
import pytest
from conftest import logits_of

from me_local.config import MemberConfig
from me_local.llama.member import Member
from me_local.llama.weights import Shelf, VocabularyFile, Weights


def test_members_of_one_file_share_its_weights(tiny: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf()
    with caplog.at_level(logging.DEBUG, "me_local.llama_cpp"):
        configs = [MemberConfig(name=name, path=tiny["bpe_a"], n_ctx=512, n_threads=1) for name in "ab"]
        first, second = (Member(config, shelf.weights(config)) for config in configs)
    assert caplog.text.count("loaded meta data") == 1
    assert first.weights is second.weights
    right = logits_of(first, np.array([5, 6, 7], dtype=np.int32)).copy()
    assert not np.array_equal(logits_of(second, np.array([9, 8], dtype=np.int32)), right)
    np.testing.assert_array_equal(first.logits(), right)
    first.close()
    np.testing.assert_array_equal(logits_of(second, np.array([5, 6, 7], dtype=np.int32)), right)
    second.close()
    shelf.close()


def test_a_link_is_the_same_file_and_a_copy_is_another(tiny: dict[str, Path], tmp_path: Path) -> None:
    link, copy = tmp_path / "link.gguf", tmp_path / "copy.gguf"
    link.symlink_to(tiny["bpe_a"])
    copy.write_bytes(tiny["bpe_a"].read_bytes())
    shelf = Shelf()
    weights = shelf.weights(MemberConfig(name="a", path=tiny["bpe_a"]))
    assert shelf.weights(MemberConfig(name="b", path=link)) is weights
    assert shelf.weights(MemberConfig(name="c", path=copy)) is not weights
    shelf.close()


@pytest.mark.parametrize("name", make_tiny_models.NAMES)
def test_a_file_without_its_tensors_says_the_same_of_text(tiny: dict[str, Path], name: str) -> None:
    config = MemberConfig(name=name, path=tiny[name])
    with closing(Weights(config)) as weights, closing(VocabularyFile(config)) as file:
        assert file.vocabulary.identity == weights.vocabulary.identity
        assert file.vocabulary.end_ids == weights.vocabulary.end_ids
        assert file.token_texts == weights.token_texts
        assert file.chat_template == weights.chat_template
        assert file.metadata == weights.metadata
        assert file.warnings == weights.warnings
        assert file.trained_context == weights.trained_context == 2048
        assert file.description == weights.metadata["general.architecture"]
