"""What the tests share: the tiny models, ensembles of them, and the demo ensemble where it is there."""

import locale
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import fetch_vocabularies
import make_home
import make_tiny_models
import pytest
from commands import run  # noqa: F401  (pytest finds it here)
from pages import browser, chat, context, page_server  # noqa: F401  (pytest finds them here)
from selection import (  # noqa: F401  (pytest finds them here)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

from me_local import Ensemble, load
from me_local.arrays import IntArray, LogitArray
from me_local.config import MemberConfig
from me_local.llama.member import Member
from me_local.llama.weights import Weights

ROOT = Path(__file__).parents[1]

WriteModels = Callable[..., Path]
OpenEnsemble = Callable[..., Ensemble]
OpenMember = Callable[..., Member]


@pytest.fixture(scope="session", autouse=True)
def _an_environment_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests see nothing of the user's files, settings and language, and write to none of their folders.

    The vocabularies that a script fetched are read where they are. Nothing is checked in a process of its own before
    it is loaded: the tests of that check ask for it.
    """
    home, vocabularies = tmp_path_factory.mktemp("home"), fetch_vocabularies.folder().parent
    cache = home / "cache" / "me-local"
    cache.mkdir(parents=True)
    (cache / vocabularies.name).symlink_to(vocabularies)
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("ME_LOCAL_", "XDG_", "LC_", "HF_", "OLLAMA_"))]:
            patch.delenv(name)
        for name in ("LANG", "LANGUAGE", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "LLAMA_CACHE"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_STATE_HOME", str(home / "state"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        patch.setenv("XDG_DATA_HOME", str(home / "data"))
        patch.setenv("LC_ALL", "C.UTF-8")
        patch.setenv("ME_LOCAL_NO_CHECK", "1")
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background processes ignore it
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models by name; `make_tiny_models` says what each is."""
    return make_tiny_models.make_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def _stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stocked")
    make_home.make_home(folder)
    return folder


@pytest.fixture
def stocked(_stocked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home with stores of models that `make_home` writes, as the user's; it is to be left as it is."""
    live_in(_stocked, monkeypatch)
    return _stocked


def live_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder the user's home, where all stores are looked for."""
    for name, value in make_home.environment(home).items():
        monkeypatch.setenv(name, value)


def write_toml(
    folder: Path, tiny: dict[str, Path], *names: str, weights: Sequence[float] | None, top: str, member: str
) -> Path:
    """A models.toml of tiny models; see `write_models`."""
    lines = [top]
    for i, name in enumerate(names):
        weight = weights[i] if weights else 1.0
        lines.append(f'[[members]]\nname = "{name}"\npath = "{tiny[name]}"\nweight = {weight}\nn_ctx = 512')
        lines.append(f"n_threads = 1\n{member}")
    path = folder / "models.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def two_models(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models.toml of two tiny models with different vocabularies."""
    return write_toml(tmp_path_factory.mktemp("two"), tiny, "bpe_a", "spm", weights=None, top="", member="")


@pytest.fixture
def write_models(tiny: dict[str, Path], tmp_path: Path) -> WriteModels:
    """Writes a models.toml of tiny models: `write_models("bpe_a", "spm", weights=..., top="...", member="...")`.

    `top` stands before the members, `member` in each of them.
    """

    def write(*names: str, weights: Sequence[float] | None = None, top: str = "", member: str = "") -> Path:
        return write_toml(tmp_path, tiny, *names, weights=weights, top=top, member=member)

    return write


@pytest.fixture
def open_ensemble(write_models: WriteModels) -> Iterator[OpenEnsemble]:
    """Loads an ensemble of tiny models; takes what `write_models` takes."""
    with ExitStack() as stack:
        yield lambda *names, **kwargs: stack.enter_context(load(write_models(*names, **kwargs)))


@contextmanager
def lone_member(config: MemberConfig) -> Iterator[Member]:
    """A member on weights of its own."""
    with closing(Weights(config)) as weights, Member(config, weights) as member:
        yield member


def logits_of(member: Member, ids: IntArray) -> LogitArray:
    """The logits after these ids."""
    member.sync(ids)
    return member.logits()


@pytest.fixture
def open_member(tiny: dict[str, Path]) -> Iterator[OpenMember]:
    """Loads a tiny model by name as a member of its own."""
    with ExitStack() as stack:

        def open_one(name: str, **settings: object) -> Member:
            values = {"n_ctx": 512, "n_threads": 1} | settings
            return stack.enter_context(lone_member(MemberConfig(name=name, path=tiny[name], **values)))  # type: ignore[arg-type]

        yield open_one
