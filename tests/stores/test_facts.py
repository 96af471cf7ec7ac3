"""What headers say: the same as the gguf package reads, whatever was read before; and damage is one error."""

import os
import struct
from pathlib import Path

import gguf
import make_tiny_models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection import DEMO_FILES

import me_local.gguf
from me_local.gguf import DamagedError
from me_local.stores.facts import Facts, Reader
from me_local.stores.quantisations import FILE_TYPES, TENSOR_TYPES

THINKING = "{{ messages[0].content }}<think>\n"


def read(*files: Path) -> Facts:
    return Reader().read(files)


def write(path: Path, architecture: str = "llama", tokens: int = 3, **values: object) -> Path:
    """A file with a tensor; keys have "__" for ".", and numbers are 32 bits."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        kinds[type(value)](key.replace("__", "."), value)  # type: ignore[operator]
    if tokens:
        writer.add_token_list([str(i) for i in range(tokens)])
    writer.add_tensor_info("t", (32, 2), np.dtype("float16"), 128, gguf.GGMLQuantizationType.F16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    path.write_bytes(path.read_bytes() + bytes(-len(path.read_bytes()) % 32 + 128))
    return path


@pytest.mark.parametrize("name", make_tiny_models.NAMES)
def test_facts_are_those_of_the_gguf_package(tiny: dict[str, Path], name: str) -> None:
    facts, reader = read(tiny[name]), gguf.GGUFReader(tiny[name])
    field = {key: value.contents() for key, value in reader.fields.items() if key != "tokenizer.ggml.tokens"}
    assert facts.title == field["general.name"] == name
    assert facts.architecture == field["general.architecture"]
    assert facts.context == field[f"{facts.architecture}.context_length"]
    assert facts.parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert facts.vocabulary_size == len(reader.fields["tokenizer.ggml.tokens"].data)
    assert facts.vocabulary == {"gpt2": "BPE", "llama": "SPM"}[field["tokenizer.ggml.model"]]
    assert facts.template == field.get("tokenizer.chat_template")
    assert facts.quantisation == "F32"
    assert not facts.thinks
    assert not facts.unfit


def test_vocabularies_are_told_apart(tiny: dict[str, Path]) -> None:
    ids = {name: read(tiny[name]).vocabulary_id for name in make_tiny_models.NAMES}
    assert ids["bpe_a"] == ids["bpe_b"] == ids["hybrid"]
    assert ids["spm"] == ids["swa"]
    assert ids["bpe_c"] == ids["recurrent"]
    assert len(set(ids.values())) == 3


@pytest.mark.demo
@pytest.mark.parametrize("model", DEMO_FILES, ids=lambda path: path.stem)
def test_a_list_that_is_known_is_read_as_if_it_were_not(model: Path) -> None:
    reader = Reader()
    first = reader.read([model])
    assert reader.read([model]) == first == read(model)
    assert first.quantisation.lower() in model.name.lower()
    assert first.vocabulary_size in (49_152, 262_144)


def test_what_the_types_are_called() -> None:
    """As in the gguf package, which has them from llama.cpp."""
    ours = {
        number: name.replace("F32", "ALL_F32") if not number else f"MOSTLY_{name}"
        for number, name in FILE_TYPES.items()
    }
    assert ours == {int(kind): kind.name for kind in gguf.LlamaFileType if kind != gguf.LlamaFileType.GUESSED}
    for kind in gguf.GGMLQuantizationType:
        assert TENSOR_TYPES[int(kind)] == (kind.name, *gguf.GGML_QUANT_SIZES[kind])


UNFIT = [
    ("clip", {"tokens": 0}, "a projector"),
    ("llama", {"general__type": "adapter"}, "a LoRA adapter"),
    ("llama", {"general__type": "mmproj"}, "a projector"),
    ("flux", {"tokens": 0}, "it has no vocabulary"),
    ("bert", {"bert__attention__causal": False}, "it generates no text"),
    ("qwen3", {"qwen3__pooling_type": 3}, "it generates no text"),
    ("t5", {}, "it has an encoder"),
]
FIT = [{}, {"general__type": "model"}, {"llama__pooling_type": 0}, {"llama__attention__causal": True}]


@pytest.mark.parametrize(("architecture", "values", "reason"), UNFIT)
def test_what_is_no_generating_model(tmp_path: Path, architecture: str, values: dict[str, int], reason: str) -> None:
    assert read(write(tmp_path / "m.gguf", architecture, **values)).unfit.startswith(reason)


@pytest.mark.parametrize("values", FIT)
def test_what_is_one(tmp_path: Path, values: dict[str, object]) -> None:
    assert read(write(tmp_path / "m.gguf", **values)).unfit == ""  # type: ignore[arg-type]


def test_a_vocabulary_alone(tiny: dict[str, Path], tmp_path: Path) -> None:
    from me_local.llama.header import read_header

    (tmp_path / "v.gguf").write_bytes(read_header(tiny["spm"]).data)
    facts = read(tmp_path / "v.gguf")
    assert facts.unfit == "a vocabulary without weights: for a member behind a url"
    assert (facts.parameters, facts.quantisation) == (0, "")


def test_thoughts_are_seen_in_a_template(tmp_path: Path) -> None:
    assert read(write(tmp_path / "m.gguf", tokenizer__chat_template=THINKING)).thinks
    assert not read(write(tmp_path / "n.gguf", tokenizer__chat_template="{{ messages[0].content }}")).thinks


@pytest.mark.parametrize(("number", "name"), [(15, "Q4_K_M"), (1024 + 7, "Q8_0"), (999, "F16"), (5, "F16")])
def test_quantisation_is_what_a_file_says_or_what_most_of_it_is(tmp_path: Path, number: int, name: str) -> None:
    assert read(write(tmp_path / "m.gguf", general__file_type=number)).quantisation == name


def test_values_of_wrong_types_are_none(tmp_path: Path) -> None:
    facts = read(write(tmp_path / "m.gguf", llama__context_length="long", tokenizer__chat_template=7))
    assert (facts.context, facts.template) == (0, None)


def test_a_download_that_was_cut_off_is_not_whole(tmp_path: Path) -> None:
    data = write(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:-1])
    with pytest.raises(DamagedError, match=f"it is not whole: {len(data) - 1} bytes of at least {len(data)}"):
        read(tmp_path / "m.gguf")


def test_weights_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    os.truncate(path, 1 << 36)  # of which nothing is on the disk
    reader = Reader()
    assert reader.read([path]).parameters == 64
    assert len(reader._buffer) <= 1 << 20


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "none", "there is no such file"),
        (Path("/dev/zero"), "not a regular file"),
    ]:
        with pytest.raises(DamagedError, match=message):
            read(path)


DAMAGED = [
    (struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0).ljust(1 << 20, b"\0"), "a tensor without a name"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60).ljust(1 << 20, b"\0"), "a key is empty"),
    (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 1, 0, 1, b"t", 5) + bytes(99), "a tensor of 5 dimensions"),
]


@pytest.mark.parametrize(("data", "message"), DAMAGED)
def test_counts_are_not_trusted(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(DamagedError, match=message):
        read(tmp_path / "m.gguf")


def outcome(reader: Reader, path: Path) -> Facts | str:
    try:
        return reader.read([path])
    except DamagedError as error:
        return str(error)


@pytest.mark.parametrize("examples", [40, pytest.param(5000, marks=pytest.mark.slow)])
def test_damage_anywhere_is_facts_or_one_error(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    """Truncations and changed bits; a reader that has read much before says the same as a new one."""
    monkeypatch.setattr(me_local.gguf, "_MANY", 1)
    path = tmp_path / "m.gguf"
    experienced = Reader()
    wholes = [tiny[name].read_bytes() for name in ("bpe_a", "spm", "hybrid")]
    for name in ("bpe_a", "spm", "hybrid"):
        experienced.read([tiny[name]])

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.data())
    def damage(data: st.DataObject) -> None:
        whole = bytearray(data.draw(st.sampled_from(wholes)))
        header = 20_000
        for _ in range(data.draw(st.integers(0, 4))):
            place = data.draw(st.integers(0, header) | st.integers(0, 200))
            whole[place] ^= 1 << data.draw(st.integers(0, 7))
        end = data.draw(st.just(len(whole)) | st.integers(0, header))
        path.write_bytes(whole[:end])
        assert outcome(experienced, path) == outcome(Reader(), path)

    damage()
