"""The fingerprint of an ensemble: where it is the same, and where it is another."""

import shutil
from pathlib import Path

import pytest
from conftest import WriteModels
from served import served

from me_local import load
from me_local.server.fingerprint import fingerprint


def of(models: Path) -> str:
    with load(models) as ensemble:
        return fingerprint(ensemble)


def test_it_is_the_same_wherever_files_lie(write_models: WriteModels, tiny: dict[str, Path], tmp_path: Path) -> None:
    models = write_models("bpe_a", "spm")
    found = of(models)
    assert found.startswith("fp_")
    assert of(models) == found
    shutil.copy(tiny["spm"], tmp_path / "moved.gguf")
    elsewhere = tmp_path / "other.toml"
    elsewhere.write_text(models.read_text().replace(str(tiny["spm"]), str(tmp_path / "moved.gguf")))
    assert of(elsewhere) == found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight = 1.0\nn_ctx = 512\nn_threads = 1\n\n[[", "weight = 2.0\nn_ctx = 512\nn_threads = 1\n\n[["),
        ("n_ctx = 512", "n_ctx = 256"),
        ("n_threads = 1", "temperature = 0.5\nn_threads = 1"),
        ("[[members]]", '[ensemble]\nstrategy = "ce"\n[[members]]'),
        ("spm.gguf", "swa.gguf"),
    ],
)
def test_it_is_another_for_other_models_and_settings(write_models: WriteModels, old: str, new: str) -> None:
    models = write_models("bpe_a", "spm")
    found = of(models)
    text = models.read_text()
    assert old in text
    models.write_text(text.replace(old, new, 1) if "ensemble" in new else text.replace(old, new))
    assert of(models) != found


def test_the_last_bytes_count(write_models: WriteModels, tiny: dict[str, Path], tmp_path: Path) -> None:
    """Weights that differ in one number make another ensemble."""
    models = write_models("bpe_a", "spm")
    changed = bytearray(tiny["spm"].read_bytes())
    changed[-2] ^= 1
    (tmp_path / "changed.gguf").write_bytes(changed)
    other = tmp_path / "other.toml"
    other.write_text(models.read_text().replace(str(tiny["spm"]), str(tmp_path / "changed.gguf")))
    assert of(other) != of(models)


def test_answers_and_chunks_have_it(two_models: Path) -> None:
    with served(two_models) as server:
        expected = fingerprint(server.ensemble)
        assert server.chat(seed=1).json()["system_fingerprint"] == expected
        ask = {"model": "me-local", "prompt": "the", "max_tokens": 2}
        assert server.openai.completions.create(**ask).system_fingerprint == expected  # type: ignore[call-overload]
        told = server.openai.completions.create(**ask, stream=True)  # type: ignore[call-overload]
        assert {chunk.system_fingerprint for chunk in told} == {expected}
