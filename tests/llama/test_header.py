"""Headers that are copied without tensors: what llama.cpp and the gguf package read there, and what is refused."""

import os
import random
import struct
from contextlib import closing
from pathlib import Path

import fetch_vocabularies
import gguf
import make_tiny_models
import numpy as np
import pytest
from selection import DEMO_FILES

from me_local.config import MemberConfig
from me_local.errors import InputError
from me_local.llama import header
from me_local.llama.header import read_header
from me_local.llama.weights import VocabularyFile

UINT32, STRING, ARRAY = 4, 8, 9


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tokens(*texts: bytes) -> bytes:
    values = b"".join(map(text, texts))
    return text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, len(texts)) + values


def number(key: bytes, value: int) -> bytes:
    return text(key) + struct.pack("<II", UINT32, value)


def file_of(*values: bytes, version: int = 3, tensors: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, len(values)) + b"".join(values)


def copied(folder: Path, data: bytes) -> bytes:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return read_header(path).data


@pytest.mark.parametrize("version", [2, 3])
def test_values_are_copied_byte_for_byte_and_tensors_are_not(tmp_path: Path, version: int) -> None:
    values = [number(b"a", 7), tokens(b"x", b"\xff\xfe", b""), text(b"b") + struct.pack("<I", STRING) + text(b"\x80")]
    whole = file_of(*values, version=version, tensors=3) + b"tensors"
    assert copied(tmp_path, whole) == file_of(*values, version=version)
    assert read_header(tmp_path / "model.gguf").tokens == 3


def test_a_part_of_a_model_forgets_the_others(tmp_path: Path) -> None:
    parts = [number(b"split.no", 0), number(b"split.count", 3), number(b"split.tensors.count", 9)]
    whole = file_of(parts[0], tokens(b"x"), parts[1], number(b"splits", 1), parts[2])
    assert copied(tmp_path, whole) == file_of(tokens(b"x"), number(b"splits", 1))


@pytest.mark.parametrize("kind", range(13))
def test_every_type_of_value_is_passed(tmp_path: Path, kind: int) -> None:
    sizes = (1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)
    if sizes[kind] is None:
        return
    one = text(b"one") + struct.pack("<I", kind) + bytes(range(sizes[kind]))
    several = text(b"several") + struct.pack("<IIQ", ARRAY, kind, 5) + bytes(range(5 * sizes[kind]))
    none = text(b"none") + struct.pack("<IIQ", ARRAY, kind, 0)
    whole = file_of(one, several, none, tokens(b"x"))
    assert copied(tmp_path, whole) == whole


DAMAGED = [
    (b"", "not a GGUF file"),
    (b"GGU", "not a GGUF file"),
    (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
    (b"GGUF", "it ends within its header, or is damaged, at byte 4"),
    (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "for big-endian machines"),
    (file_of(version=1), "version 1 of GGUF"),
    (file_of(version=4), "version 4 of GGUF"),
    (file_of(version=0), "version 0 of GGUF"),
    (file_of(number(b"a", 1)), "it has no vocabulary"),
    (file_of(tokens()), "it has no vocabulary"),
    (file_of(number(b"", 1)), "a key is empty, or there twice, at byte 24"),
    (file_of(number(b"a", 1), number(b"a", 1)), "a key is empty, or there twice, at byte 41"),
    (file_of(text(b"a") + struct.pack("<I", 13) + bytes(9)), "a value of type 13"),
    (file_of(text(b"a") + struct.pack("<IIQ", ARRAY, ARRAY, 0)), "a value of type 9"),
    (file_of(text(b"a") + struct.pack("<IIQ", ARRAY, UINT32, 2**62)), "it ends within its header"),
    (file_of(text(b"a") + struct.pack("<IIQ", ARRAY, STRING, 2**62)), "it ends within its header"),
    (file_of(struct.pack("<Q", 2**63)), "it ends within its header, or is damaged, at byte 32"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**64 - 1), "it ends within its header, or is damaged, at byte 24"),
]


@pytest.mark.parametrize(("data", "message"), DAMAGED)
def test_what_is_no_header_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InputError) as error:
        copied(tmp_path, data)
    assert str(error.value).startswith(f"{tmp_path / 'model.gguf'}: ")
    assert message in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "none.gguf", "cannot be read: No such file or directory"),
        (Path("/dev/zero"), "not a regular file"),
        (Path("a\0b"), "cannot be read: "),
    ]:
        with pytest.raises(InputError, match=message):
            read_header(path)


def test_a_damaged_header_does_not_have_all_tensors_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_MOST", 1000)
    whole = file_of(text(b"a") + struct.pack("<IIQ", ARRAY, STRING, 2**40))
    with pytest.raises(InputError, match="at byte 993"):
        copied(tmp_path, whole.ljust(1 << 22, b"\0"))


def test_it_ends_anywhere(tiny: dict[str, Path], tmp_path: Path) -> None:
    whole = tiny["spm"].read_bytes()
    end = len(read_header(tiny["spm"]).data)
    path = tmp_path / "part.gguf"
    path.write_bytes(whole[:end])  # the beginning is enough
    assert read_header(path) == read_header(tiny["spm"])
    for length in (*range(200), *range(200, end, 29)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"it ends within|not a GGUF"):
            read_header(path)


@pytest.mark.parametrize("name", make_tiny_models.NAMES)
def test_damage_anywhere_is_a_line_or_a_header_that_is_read_again(
    tiny: dict[str, Path], tmp_path: Path, name: str
) -> None:
    rng, whole = random.Random(name), tiny[name].read_bytes()[:20_000]
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(4, 2000)
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(1, 9))
        try:
            copy = copied(tmp_path, bytes(data))
        except InputError:
            refused += 1
        else:
            assert copied(tmp_path, copy) == copy
    assert refused > 100


def fields(path: Path) -> dict[str, list[bytes]]:
    reader = gguf.GGUFReader(path)
    ours = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {name: [np.asarray(part).tobytes() for part in field.parts] for name, field in ours.items()}


def the_same(model: Path, copy: Path) -> None:
    """Both say the same of text to llama.cpp."""
    configs = [MemberConfig(name="m", path=path) for path in (model, copy)]
    with closing(VocabularyFile(configs[0])) as a, closing(VocabularyFile(configs[1])) as b:
        assert a.vocabulary.identity == b.vocabulary.identity
        assert a.vocabulary.end_ids == b.vocabulary.end_ids
        assert a.vocabulary.control == b.vocabulary.control
        assert a.chat_template == b.chat_template
        assert a.token_texts == b.token_texts
        assert a.metadata == b.metadata
        assert a.warnings == b.warnings


@pytest.mark.parametrize("name", make_tiny_models.NAMES)
def test_a_copy_says_the_same_of_text(tiny: dict[str, Path], tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(read_header(tiny[name]).data)
    assert copy.stat().st_size < tiny[name].stat().st_size / 10
    assert fields(copy) == fields(tiny[name])
    assert not gguf.GGUFReader(copy).tensors
    the_same(tiny[name], copy)


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize("model", DEMO_FILES, ids=lambda path: path.stem)
def test_a_copy_of_a_demo_model_says_the_same_of_text(tmp_path: Path, model: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(read_header(model).data)
    assert copy.stat().st_size < 10e6
    the_same(model, copy)


@pytest.mark.slow
@pytest.mark.vocabularies
def test_a_file_without_tensors_is_its_own_copy() -> None:
    paths = fetch_vocabularies.kept(fetch_vocabularies.folder())
    assert paths
    for path in paths:
        data = read_header(path).data
        assert path.read_bytes()[: len(data)] == data
        assert len(path.read_bytes()) - len(data) < 32  # what fills up the last line


def test_a_part_of_a_model_is_read_without_the_others(tiny: dict[str, Path], tmp_path: Path) -> None:
    uint16 = 2
    parts = [text(key) + struct.pack("<IH", uint16, value) for key, value in ((b"split.no", 0), (b"split.count", 2))]
    whole = tiny["bpe_a"].read_bytes()
    count = struct.unpack_from("<Q", whole, 16)[0]
    first, copy = tmp_path / "m-00001-of-00002.gguf", tmp_path / "copy.gguf"
    first.write_bytes(whole[:16] + struct.pack("<Q", count + 2) + b"".join(parts) + whole[24:])
    copy.write_bytes(read_header(first).data)
    the_same(tiny["bpe_a"], copy)
