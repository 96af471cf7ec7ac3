"""Members that are named in a line: which file is meant, and what is said where none is."""

import json
from pathlib import Path

import make_home
import pytest

from me_local.config import Config
from me_local.ensemble import Ensemble
from me_local.errors import ConfigError
from me_local.stores.members import config_of, member_of


def file_of(text: str) -> Path:
    path = member_of(text).path
    assert path is not None
    return path


@pytest.mark.parametrize("name", make_home.MODELS)
def test_each_name_of_the_list_is_a_member(stocked: Path, tiny: dict[str, Path], name: str) -> None:
    member = member_of(name)
    assert member.weight == 1
    assert member_of(f"{name}:0.25").path == member.path
    assert member_of(f"{name}:0.25").weight == 0.25
    if "split" not in name and "-of-" not in name:
        assert file_of(name).read_bytes() == tiny[make_home.MODELS[name]].read_bytes()


SAME = [
    ("ollama:tiny", "ollama:tiny:latest"),
    ("ollama:TINY:1B", "ollama:tiny:1b"),
    ("ollama:library/tiny", "ollama:tiny"),
    ("ollama:registry.ollama.ai/library/tiny:latest", "ollama:tiny"),
    ("ollama:hf.co/me/tiny-gguf:q4_k_m", "ollama:hf.co/me/tiny-GGUF:Q4_K_M"),
    ("lmstudio:me/tiny-GGUF/tiny-Q8_0.gguf", "lmstudio:me/tiny-GGUF/tiny-Q8_0"),
    ("lmstudio:me/split-GGUF", "lmstudio:me/split-GGUF/split"),
    ("lmstudio:old", "lmstudio:old/tiny/tiny"),
    ("hf:me/hub-GGUF:Q4_K_M", "hf:me/hub-GGUF:hub-Q4_K_M.gguf"),
    ("hf:me/hub-gguf:q8_0", "hf:me/hub-GGUF:Q8_0/hub-Q8_0-00001-of-00002.gguf"),
    ("hf:me/hub-GGUF:Q8_0/hub-Q8_0-00002-of-00002.gguf", "hf:me/hub-GGUF:Q8_0"),
    ("hf:me/flat-GGUF", "hf:me/flat-GGUF:flat-Q4_0.gguf"),
    ("~/gguf/own.gguf", "~/gguf/../gguf/own.gguf"),
]


@pytest.mark.parametrize(("text", "same"), SAME)
def test_several_ways_to_name_a_model(stocked: Path, text: str, same: str) -> None:
    assert file_of(text) == file_of(same)
    assert file_of(text).is_file()


def test_a_number_that_is_part_of_a_name_is_no_weight(
    stocked: Path, tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert member_of("ollama:somebody/tiny:3").weight == 1
    assert member_of("ollama:somebody/tiny:3:2").weight == 2
    assert member_of("ollama:tiny:3").weight == 3
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"1")
    assert (file_of("m.gguf:0.5").name, member_of("m.gguf:0.5").weight) == ("m.gguf", 0.5)
    Path("m.gguf:0.5").write_bytes(b"2")
    assert (file_of("m.gguf:0.5").name, member_of("m.gguf:0.5").weight) == ("m.gguf:0.5", 1)


def test_a_file_of_the_hub_that_is_not_here_is_for_the_loader(stocked: Path) -> None:
    member = member_of("hf:o/r:deep/x-00002-of-00003.gguf:0.5")
    assert (member.path, member.hf, member.weight) == (None, "o/r:deep/x-00001-of-00003.gguf", 0.5)
    assert member.name == "x"


def test_a_part_of_a_model_stands_for_all_of_it(stocked: Path) -> None:
    folder = stocked / ".lmstudio/models/me/split-GGUF"
    assert file_of(f"{folder}/split-00002-of-00002.gguf") == folder / "split-00001-of-00002.gguf"


def test_a_member_elsewhere(stocked: Path) -> None:
    member = member_of("http://box:8080/a=ollama:tiny:1b:.5")
    assert (member.url, member.path, member.weight, member.name) == (
        *("http://box:8080/a", file_of("ollama:tiny:1b"), 0.5, "tiny:1b"),
    )


def test_an_ensemble_of_them(stocked: Path) -> None:
    config = config_of(["ollama:tiny:3", "ollama:tiny:1", "~/gguf/own.gguf:0"])
    assert [(member.name, member.weight) for member in config.members] == [("tiny", 0.75), ("tiny-2", 0.25), ("own", 0)]
    assert config.path is None
    assert config == Config(path=None, members=config.members)


def test_a_name_is_made_fit_to_be_one(tmp_path: Path) -> None:
    for name, fit in [("a=b, c.gguf", "a-b-c"), ("==.gguf", "model"), ("\x1b[2J.gguf", "[2J")]:
        (tmp_path / name).write_bytes(b"")
        assert member_of(str(tmp_path / name)).name == fit


def test_split_models_and_blobs_are_loaded(stocked: Path) -> None:
    """By llama.cpp, under the names that stores give them."""
    names = ["lmstudio:me/split-GGUF", "hf:me/hub-GGUF:Q8_0", "ollama:tiny", "ollama:newer:3b", "hf:me/flat-GGUF"]
    with Ensemble(config_of(names)) as ensemble:
        assert ensemble.generate("Hi").finish_reason in ("stop", "length")


ERRORS = [
    ("none.gguf", "there is no such file; me-local models lists those on this machine"),
    ("", "no model is named; me-local models lists those on this machine"),
    (":0.5", "there is no such file"),
    ("a\0b", "there is no such file"),
    ("~/gguf", "it is a folder: name a GGUF file in it"),
    ("own", 'there is no such file; did you mean "'),
    ("tiny:1b", 'there is no such file; did you mean "ollama:tiny:1b"?'),
    ("ollama:tiny:2b", 'Ollama has no such model here; did you mean "ollama:tiny:1b"?'),
    ("ollama:", "Ollama has no such model here"),
    ("ollama:a/b/c/d/e", "Ollama has no such model here"),
    ("ollama:far:cloud", "it has no weights here"),
    ("lmstudio:", "LM Studio has no such model here"),
    ("lmstudio:me/tiny-GGUF", "several models of LM Studio are meant by this: lmstudio:me/tiny-GGUF/tiny-Q4_K_M, "),
    ("hf:me/hub-GGUF", "several models of the cache of Hugging Face are meant"),
    ("hf:me/hub-GGUF:Q5_K_M", "this quantisation of it is not here, but hub-Q4_K_M.gguf, "),
    ("hf:me/hub-GGUF:Q4_K", "this quantisation of it is not here"),
    ("hf:me/none", "the repository is not on this machine; hf:owner/repo:FILE.gguf"),
    ("hf:none", "the repository is not on this machine"),
    ("hf:o/r:a\\b.gguf", 'must look like "owner/repo:file.gguf"'),
    ("~/gguf/parts-00001-of-00002.gguf", "1 of its 2 parts are missing"),
    ("ollama:tiny:-1", "the weight: must be at least 0, got -1"),
    ("ollama:tiny:nan", "the weight: must be a finite number"),
    ("ollama:tiny:1e999", "Ollama has no such model here"),
    ("http://box:8080", "behind the url must stand =FILE"),
    ("http://box:8080=", "behind the url must stand =FILE"),
    ("http://a b=ollama:tiny", 'must look like "http://host:port"'),
    ("http://box:8080=none.gguf", "there is no such file"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_what_is_no_member_is_one_line(
    stocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        member_of(text)
    assert message in str(error.value)
    assert str(error.value).startswith(f"--member {json.dumps(text)}: ")
    assert "\n" not in str(error.value)


def test_a_projector_is_meant_by_its_whole_name_alone_and_a_lost_file_by_none(stocked: Path) -> None:
    assert file_of("lmstudio:me/tiny-GGUF/mmproj-tiny-f16").name == "mmproj-tiny-f16.gguf"  # llama.cpp says what it is
    for part, absent in [("lmstudio:me/tiny-GGUF", "mmproj"), ("hf:me/hub-GGUF", "gone")]:
        with pytest.raises(ConfigError, match="several models") as error:
            member_of(part)
        assert absent not in str(error.value)


def test_an_ensemble_without_any_weight(stocked: Path) -> None:
    with pytest.raises(ConfigError, match="--member: every weight is 0"):
        config_of(["ollama:tiny:0"])
