"""Building the servers, out of a small made-up source and with a compiler that is none, and a server that was built."""

import io
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import build_llama_server as servers
import httpx
import pytest
import remote
from pip_downloads import FetchError

SOURCE = "vendor/llama.cpp/CMakeLists.txt"


def archive(folder: Path, *names: str) -> Path:
    path = folder / "source.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(f"llama_cpp_python-1.0/{name}"), io.BytesIO())
    return path


class Workshop:
    """Downloads a source, and builds programs of it, or fails; counts what it builds."""

    def __init__(self) -> None:
        self.names = [SOURCE, "llama_cpp/llama.py"]
        self.failure: BaseException | None = None
        self.built = 0

    def download(self, requirement: str, folder: Path) -> Path:
        assert requirement == "llama-cpp-python==1.0"
        return archive(folder, *self.names)

    def build(self, source: Path, work: Path, programs: Path, progress: Callable[[str], None]) -> None:
        assert [path.name for path in source.iterdir()] == ["CMakeLists.txt"]
        progress("[1/2]")
        for name in servers.PROGRAMS:
            (programs / name).write_text("#!/bin/sh\n")
            (programs / name).chmod(0o755)
            if self.failure:
                raise self.failure
        self.built += 1

    def main(self) -> int:
        return servers.main([], download=self.download, build=self.build)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(servers, "version", lambda package: "1.0")
    return Workshop()


def test_builds_once_and_prints_where_the_programs_are(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    place = servers.folder()
    paths = [str(place / "llama-server"), str(place / "ggml-rpc-server")]
    for _ in range(2):
        assert workshop.main() == 0
        assert capsys.readouterr().out.split() == paths
    assert workshop.built == 1
    assert sorted(path.name for path in place.parent.iterdir()) == ["llama-server-1.0", "llama-server-1.0.lock"]


def test_what_was_built_otherwise_is_built_again(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workshop.main() == 0
    assert servers.built(servers.folder())
    monkeypatch.setattr(servers, "processor_identity", lambda: "another one")
    assert not servers.built(servers.folder())
    assert workshop.main() == 0
    assert workshop.built == 2
    (servers.folder() / "ggml-rpc-server").unlink()
    assert workshop.main() == 0
    assert workshop.built == 3


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (FetchError("ninja failed: a.cpp:1: error: b"), 1, "error: ninja failed: a.cpp:1: error: b"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted: what was complete is kept, the rest is removed"),
    ],
)
def test_half_of_a_build_is_none(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], failure: BaseException, status: int, message: str
) -> None:
    workshop.failure = failure
    assert workshop.main() == status
    assert capsys.readouterr().err.splitlines()[1:] == [message]
    assert not servers.built(servers.folder())
    assert [path.name for path in servers.folder().parent.iterdir()] == ["llama-server-1.0.lock"]


def test_what_a_killed_build_has_left_is_taken_away(workshop: Workshop) -> None:
    left = servers.folder().parent / f"{servers.WORK}left"
    left.mkdir(parents=True)
    assert workshop.main() == 0
    assert not left.exists()


def test_a_source_without_llama_cpp_is_one_line(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.names = ["llama_cpp/llama.py"]
    assert workshop.main() == 1
    assert capsys.readouterr().err.splitlines()[1:] == ["error: source.tar.gz has no vendor/llama.cpp"]


def test_of_two_at_once_one_builds(workshop: Workshop) -> None:
    started, statuses = threading.Barrier(2), list[int]()

    def run() -> None:
        started.wait(30)
        statuses.append(workshop.main())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [0, 0]
    assert workshop.built == 1


def test_a_missing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(FetchError, match=r"no compiler no-such-compiler: apt-get install build-essential"):
        servers.tools(tmp_path)


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    script = "echo '[1/2] first'; echo 'a.cpp:1: error: no such thing'; echo '1 error generated'; exit 3"
    with pytest.raises(FetchError, match=r"^sh failed: a\.cpp:1: error: no such thing$"):
        servers.run(["sh", "-c", script], os.environ, tmp_path, lambda _: None)
    with pytest.raises(FetchError, match=r"^no-such-program cannot be run: No such file or directory$"):
        servers.run(["no-such-program"], os.environ, tmp_path, lambda _: None)


@pytest.mark.parametrize(("features", "added"), [({"avx2"}, ""), ({"avx2", "amx_tile"}, f" {servers.NO_AMX}")])
def test_amx_is_left_out_where_there_is_some(monkeypatch: pytest.MonkeyPatch, features: set[str], added: str) -> None:
    monkeypatch.setattr(servers, "processor_features", lambda: frozenset(features))
    environment = servers.with_flags({"CFLAGS": "-g", "HOME": "/"})
    assert environment == {"CFLAGS": f"-g{added}", "CXXFLAGS": added.strip(), "HOME": "/"}


def likeliest(url: str) -> dict[int, float]:
    """The log-probabilities of the tokens after three others."""
    body = {"prompt": [5, 6, 7], "n_predict": 1, "n_probs": 4, "temperature": 1.0, "samplers": []}
    answer = httpx.post(f"{url}/completion", json=body, timeout=60).json()
    return {top["id"]: top["logprob"] for top in answer["completion_probabilities"][0]["top_logprobs"]}


@pytest.mark.llama_server
def test_a_server_answers_and_ends(tiny: dict[str, Path]) -> None:
    with remote.llama_server(tiny["bpe_a"], "-np", "2") as url:
        assert len(httpx.get(f"{url}/slots").json()) == 2
        assert len(likeliest(url)) == 4
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.llama_server
def test_a_model_that_lies_in_other_processes_says_the_same(tiny: dict[str, Path]) -> None:
    with remote.llama_server(tiny["bpe_a"]) as url:
        alone = likeliest(url)
    with (
        remote.rpc_server() as first,
        remote.rpc_server() as second,
        remote.llama_server(tiny["bpe_a"], "--rpc", f"{first},{second}", "-ngl", "99") as url,
    ):
        assert likeliest(url) == pytest.approx(alone, abs=1e-5)
