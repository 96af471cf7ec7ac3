"""Weights go into models.toml, and everything else stays as it is."""

import os
import stat
from pathlib import Path

import pytest

from me_local.config import load_config
from me_local.errors import ConfigError
from me_local.evaluation.weights_file import write_weights

BEFORE = """\
# A comment at the top.
[ensemble]
strategy = "me"   # why

[[members]]
name = "a"
path = "a.gguf"
weight = 0.7      # by guess

[[members]]
# no weight yet
name = "b"
path = 'b.gguf'
"""
AFTER = BEFORE.replace("weight = 0.7 ", "weight = 0.3333 ") + "weight = 0.6667\n"


def test_only_weights_change(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(BEFORE)
    path.chmod(0o640)
    write_weights(path, {"a": 1 / 3, "b": 2 / 3})
    assert path.read_text() == AFTER
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [member.weight for member in load_config(path).members] == pytest.approx([0.3333, 0.6667])
    assert list(tmp_path.iterdir()) == [path]


def test_a_member_that_is_not_last_gets_its_weight_in_its_own_table(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(BEFORE.replace("weight = 0.7      # by guess\n", ""))
    write_weights(path, {"a": 0.25, "b": 0.75})
    assert [member.weight for member in load_config(path).members] == [0.25, 0.75]
    assert 'path = "a.gguf"\nweight = 0.25\n\n[[members]]' in path.read_text()


def test_members_in_one_line_and_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(
        b'\xef\xbb\xbfmembers = [{name = "a", path = "a"}, {name = "b", path = "b", weight = 1}]\r\n# end\r\n'
    )
    write_weights(path, {"a": 0.25, "b": 0.75})
    assert [member.weight for member in load_config(path).members] == [0.25, 0.75]
    assert path.read_bytes().endswith(b"}]\r\n# end\r\n")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.toml").write_text(BEFORE)
    link = tmp_path / "models.toml"
    link.symlink_to("real.toml")
    write_weights(link, {"a": 1 / 3, "b": 2 / 3})
    assert link.is_symlink()
    assert (tmp_path / "real.toml").read_text() == AFTER


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "models.toml"
    path.write_text(BEFORE)

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ConfigError, match=r"models.toml: cannot be written: no space left on device"):
        write_weights(path, {"a": 0.5})
    assert path.read_text() == BEFORE
    assert list(tmp_path.iterdir()) == [path]
