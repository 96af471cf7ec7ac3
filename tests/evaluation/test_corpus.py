"""Texts in windows, and files of prompts and continuations."""

import json
from pathlib import Path

import pytest

from me_local.errors import InputError
from me_local.evaluation.corpus import read_blocks

PROSE = "\n".join(f"Line {i} of a text that is long enough, with äöü in it." for i in range(200)) + "\n"


def windows(path: Path, text: str | bytes, room: int = 600) -> list[tuple[str, str]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(block.prompt, block.continuation) for block in read_blocks(path, raw=False, room=room)]


@pytest.mark.parametrize("text", [PROSE, "春" * 2000 + " x", "x" + " " * 3000 + "y", "one two", "\n\n one\ttwo \n"])
def test_windows_make_up_the_text(tmp_path: Path, text: str) -> None:
    found = windows(tmp_path / "text.txt", text)
    assert found[0][0] + "".join(continuation for _, continuation in found) == text.lstrip()
    assert len(found[0][0].split()) == 1
    before = found[0][0]
    for prompt, continuation in found:
        assert before.endswith(prompt)
        assert prompt
        assert len((prompt + continuation).encode()) <= 592 + 4
        before += continuation


def test_windows_begin_where_words_do(tmp_path: Path) -> None:
    found = windows(tmp_path / "text.txt", PROSE)
    assert len(found) > 8
    for prompt, continuation in found:
        assert continuation[0] in " \n"
        assert not prompt[0].isspace()
        assert not prompt[-1].isspace()


def test_a_short_text_has_eight_windows_a_long_one_larger(tmp_path: Path) -> None:
    assert len(windows(tmp_path / "text.txt", PROSE[:3000], 4096)) in (8, 9)
    sizes = [len(continuation.encode()) for _, continuation in windows(tmp_path / "text.txt", PROSE * 10, 5000)]
    assert min(sizes[:-1]) >= 3050
    assert max(sizes) <= 3072


def test_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "continuation": " b", "id": 3}, {"prompt": "c", "completion": "dé"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_blocks(path, raw=True, room=600)
    assert [(b.prompt, b.continuation, b.raw, b.where) for b in found] == [
        ("a", " b", True, f"{path}, line 1"),
        ("c", "dé", True, f"{path}, line 2"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "t.txt: at least two words are wanted"),
        ("t.txt", b" \n", "t.txt: at least two words are wanted"),
        ("t.txt", b"one\n", "t.txt: at least two words are wanted"),
        ("t.txt", b"one\ntwo\n\xff", r"t.txt, line 3: not UTF-8 \(byte 0xff\)"),
        ("none.txt", None, "none.txt: cannot be read: No such file"),
        ("none.jsonl", None, "none.jsonl: cannot be read: No such file"),
        ("p.jsonl", b"", "p.jsonl: it is empty"),
        ("p.jsonl", b'{"prompt": "a", "continuation": "b"}\n{"prompt": "a"}\n', 'line 2: "continuation" is missing'),
        ("p.jsonl", b'\n{"continuation": "a"}\n', 'p.jsonl, line 2: "prompt" is missing'),
        ("p.jsonl", b'{"prompt": "a", "completion": 3}', "line 1: completion: must be a text that is not blank, got 3"),
        ("p.jsonl", b'{"prompt": ["a"], "completion": "x"}', "line 1: prompt: must be a text"),
        ("p.jsonl", b"[1]", "p.jsonl, line 1: must be an object"),
        ("p.jsonl", b"{", "p.jsonl, line 1: not JSON"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_blocks(path, raw=True, room=600)
