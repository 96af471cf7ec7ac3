"""`me-local vocabulary`: what it writes, and what it leaves as it was."""

import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from commands import one_line

from me_local.cli.program import main
from me_local.llama.header import read_header


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["vocabulary", *map(str, arguments)])


def test_writes_a_vocabulary_and_says_so_in_a_line(tiny: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = run(tiny["bpe_a"], out)
    assert result.exit_code == 0, result.output
    header = read_header(tiny["bpe_a"])
    assert out.read_bytes() == header.data
    assert result.stdout == ""
    assert result.stderr == f"{out}: the vocabulary of bpe_a.gguf, 400 tokens, {len(header.data) / 1000:.1f} kB\n"
    assert os.listdir(tmp_path) == ["out.gguf"]


def test_what_exists_is_replaced_with_force_alone(tiny: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("something")
    one_line(run(tiny["bpe_a"], out), 2, f"{out}: it exists already; --force replaces it")
    assert out.read_text() == "something"
    assert run(tiny["bpe_a"], out, "--force").exit_code == 0
    assert out.read_bytes() == read_header(tiny["bpe_a"]).data


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_model_is_never_written_to(tiny: dict[str, Path], tmp_path: Path, force: list[str]) -> None:
    model, link, hard = tmp_path / "m.gguf", tmp_path / "link.gguf", tmp_path / "hard.gguf"
    data = tiny["bpe_a"].read_bytes()
    model.write_bytes(data)
    link.symlink_to(model)
    hard.hardlink_to(model)
    for out in (model, link, hard, tmp_path / "." / "m.gguf"):
        one_line(run(model, out, *force), 2, f"{out}: it is the model itself")
    assert model.read_bytes() == data


def test_places_that_take_no_file_are_one_line(tiny: dict[str, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "pipe", Path("/dev/null")):
        one_line(run(tiny["bpe_a"], out, "--force"), 2, f"{out}: not a regular file")
    one_line(run(tiny["bpe_a"], tmp_path, "--force"), 2, "is a directory")
    one_line(run(tiny["bpe_a"], tmp_path / "none" / "out.gguf"), 1, "out.gguf: No such file or directory")
    one_line(run(tiny["bpe_a"], tmp_path / ("x" * 300)), 2, "File name too long")


def test_wrong_models_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0")
    out = tmp_path / "out.gguf"
    one_line(run(tmp_path / "m.gguf", out), 2, "m.gguf: it ends within its header, or is damaged, at byte 8")
    one_line(run(tmp_path / "n.gguf", out), 2, "n.gguf: cannot be read: No such file or directory")
    one_line(run("/dev/zero", out), 2, "/dev/zero: not a regular file")
    assert not out.exists()


def test_a_full_disk_leaves_what_was_there(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out.gguf"
    out.write_text("something")
    monkeypatch.setattr(os, "fsync", full)
    one_line(run(tiny["bpe_a"], out, "--force"), 1, f"{out}: No space left on device")
    assert out.read_text() == "something"
    assert os.listdir(tmp_path) == ["out.gguf"]
