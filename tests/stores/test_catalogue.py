"""What is found in a home in which four programs keep models, in the layouts of today and of earlier."""

import json
import os
from pathlib import Path

import make_home
import pytest
from conftest import live_in
from hypothesis import given, settings
from hypothesis import strategies as st

from me_local.stores import ollama
from me_local.stores.catalogue import Found, entries, found
from me_local.stores.facts import Reader

KEYS = ("layers", "mediaType", "digest", "manifests", "runner", "config")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=9,
)


def by_name() -> dict[str, Found]:
    models = found()
    named = {model.entry.name: model for model in models}
    assert len(named) == len(models)
    return named


def names() -> set[str]:
    return {entry.name for entry in entries()}


def store(name: str, data: bytes = b"GGUF") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with nothing in it."""
    live_in(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_models_of_all_stores_are_found(stocked: Path, tiny: dict[str, Path]) -> None:
    models = by_name()
    usable = {name for name, model in models.items() if not model.problem}
    assert usable == {*make_home.MODELS, str(stocked / "gguf" / "own.gguf")}
    for name, kind in make_home.MODELS.items():
        facts, wanted = models[name].facts, Reader().read([tiny[kind]])
        assert facts is not None
        assert (facts.architecture, facts.parameters, facts.vocabulary_id, facts.context) == (
            *(wanted.architecture, wanted.parameters, wanted.vocabulary_id, wanted.context),
        )
        assert models[name].size == sum(file.stat().st_size for file in models[name].entry.files)
        assert models[name].size >= tiny[kind].stat().st_size


def test_what_is_no_member_is_found_with_a_reason(stocked: Path) -> None:
    own = stocked / "gguf"
    wanted = {
        "ollama:damaged:latest": "its manifest cannot be read: ",
        "ollama:far:cloud": "it has no weights here",
        "ollama:lost:latest": "there is no such file",
        "lmstudio:me/tiny-GGUF/mmproj-tiny-f16": "a projector",
        "hf:me/hub-GGUF:gone.gguf": "there is no such file",
        f"{own}/deep/cut off.gguf": "it is not whole",
        f"{own}/embedding.gguf": "it generates no text",
        f"{own}/page.gguf": "not a GGUF file",
        f"{own}/parts-00001-of-00002.gguf": "1 of its 2 parts are missing, first of all parts-00002-of-00002.gguf",
    }
    problems = {name: model.problem for name, model in by_name().items() if model.problem}
    assert problems.keys() == wanted.keys()
    for name, problem in problems.items():
        assert problem.startswith(wanted[name])


def test_labels_are_short(stocked: Path) -> None:
    labels = {entry.name: entry.label for entry in entries()}
    assert labels["ollama:tiny:latest"] == "tiny"
    assert labels["ollama:hf.co/me/tiny-GGUF:Q4_K_M"] == "tiny-GGUF:Q4_K_M"
    assert labels["lmstudio:me/split-GGUF/split"] == "split"
    assert labels["hf:me/hub-GGUF:Q8_0/hub-Q8_0-00001-of-00002.gguf"] == "hub-Q8_0"
    assert labels["hf:me/flat-GGUF:flat-Q4_0.gguf"] == "flat-Q4_0"


def test_nothing_is_found_where_there_is_nothing(home: Path) -> None:
    assert found() == []


def test_folders_that_variables_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store("a/models--o--r/snapshots/1/a.gguf")
    store("b/hub/models--o--r/snapshots/1/b.gguf")
    store("c/o_r_c.gguf")
    store("c/models--o--r/snapshots/1/d.gguf")
    store("e/x.gguf")
    store("f/y.GGUF")
    monkeypatch.setenv("HF_HOME", "b")
    monkeypatch.setenv("ME_LOCAL_MODEL_DIRS", f"{home}/e:{home}/f::{home}/e:{home}/none")
    assert names() == {"hf:o/r:b.gguf", f"{home}/e/x.gguf", f"{home}/f/y.GGUF"}
    monkeypatch.setenv("HF_HUB_CACHE", "~/a")
    monkeypatch.setenv("LLAMA_CACHE", f"{home}/c")
    monkeypatch.delenv("ME_LOCAL_MODEL_DIRS")
    assert names() == {"hf:o/r:a.gguf", f"{home}/c/o_r_c.gguf", "hf:o/r:d.gguf"}


def test_a_folder_of_ollama_that_a_variable_names(home: Path, stocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "none"))
    assert not any(name.startswith("ollama:") for name in names())


def test_lm_studio_says_where_its_models_are(home: Path) -> None:
    store("far/models/p/m/a.gguf")
    store("downloads/p/m/b.gguf")
    store(".lmstudio-home-pointer", f"{home}/far\n".encode())
    assert names() == {"lmstudio:p/m/a"}
    store("far/settings.json", json.dumps({"downloadsFolder": f"{home}/downloads"}).encode())
    assert names() == {"lmstudio:p/m/b"}
    store("far/settings.json", b'{"downloadsFolder": 7}')
    assert names() == {"lmstudio:p/m/a"}
    store(".lmstudio-home-pointer", b"\xff\0")
    assert names() == set()


def test_the_snapshot_that_is_the_latest_is_taken(home: Path) -> None:
    hub = ".cache/huggingface/hub/models--o--r"
    for commit in ("1", "2", "3"):
        store(f"{hub}/snapshots/{commit}/a.gguf")
        os.utime(f"{hub}/snapshots/{commit}", (9, int(commit)))
    assert [entry.files[0].parent.name for entry in entries()] == ["3"]
    store(f"{hub}/refs/main", b"2")
    assert [entry.files[0].parent.name for entry in entries()] == ["2"]


def test_names_of_later_manifests_go_first(home: Path) -> None:
    models = Path(".ollama/models")
    for manifests, host, blob in [("manifests", "registry.ollama.ai", "1"), ("manifests-v2", "ollama.com", "2")]:
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{blob * 64}"}]
        store(f"{models}/{manifests}/{host}/library/a/b", json.dumps({"layers": layers}).encode())
    assert [(entry.name, entry.files[0].name) for entry in entries()] == [("ollama:a:b", f"sha256-{'2' * 64}")]


def test_an_adapter_goes_with_its_model(home: Path) -> None:
    kind = "application/vnd.ollama.image."
    layers = [
        {"mediaType": f"{kind}model", "digest": f"sha256:{'1' * 64}"},
        {"mediaType": f"{kind}adapter", "digest": f"sha256:{'2' * 64}"},
    ]
    manifest = ".ollama/models/manifests/registry.ollama.ai/library/a/b"
    store(manifest, json.dumps({"layers": layers}).encode())
    (entry,) = entries()
    assert (entry.files[0].name, entry.lora and entry.lora.name) == (f"sha256-{'1' * 64}", f"sha256-{'2' * 64}")
    store(manifest, json.dumps({"layers": [*layers, layers[0]]}).encode())
    assert next(entries()).problem.startswith("it is made of several files")
    tensor = {"mediaType": f"{kind}tensor", "digest": f"sha256:{'3' * 64}"}
    store(manifest, json.dumps({"layers": [tensor]}).encode())
    assert next(entries()).problem == "its weights are no GGUF file"


def test_a_digest_leads_nowhere_else(home: Path) -> None:
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../../etc/passwd"}]
    store(".ollama/models/manifests/registry.ollama.ai/library/a/b", json.dumps({"layers": layers}).encode())
    (model,) = found()
    assert model.problem == "its manifest cannot be read: a layer has no SHA-256"


@pytest.mark.parametrize("examples", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_manifest_is_an_entry(home: Path, examples: int) -> None:
    manifest = Path(".ollama/models/manifests/registry.ollama.ai/library/a/b")

    @settings(max_examples=examples, deadline=None, database=None)
    @given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20))
    def any_manifest(data: bytes) -> None:
        store(str(manifest), data)
        (model,) = found()
        assert model.problem

    any_manifest()


def test_folders_in_circles_and_what_cannot_be_read(home: Path) -> None:
    store("gguf/a/x.gguf")
    os.symlink("..", "gguf/a/up")
    os.symlink("loop", "gguf/loop")
    os.symlink("loop.gguf", "gguf/loop.gguf")
    os.mkfifo("gguf/pipe.gguf")
    os.mkdir("gguf/folder.gguf")
    problems = {Path(model.entry.name).name: model.problem for model in found()}
    assert problems.keys() == {"x.gguf", "loop.gguf", "pipe.gguf"}
    assert problems["pipe.gguf"] == "not a regular file"
    assert problems["loop.gguf"].startswith("cannot be read: ")


def test_names_as_somebody_types_them() -> None:
    for text, name in [
        ("Llama3.2", "llama3.2:latest"),
        ("llama3.2:3b", "llama3.2:3b"),
        ("me/x", "me/x:latest"),
        ("registry.ollama.ai/library/x:1", "x:1"),
        ("hf.co/Me/x-GGUF:Q4_K_M", "hf.co/me/x-gguf:q4_k_m"),
    ]:
        assert ollama.full_name(text) == name
