"""What the tests share: the tiny models, ensembles of them, and the demo ensemble where it is there."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import fetch_vocabularies
import make_tiny_models
import pytest

from me_local import Ensemble, load
from me_local.config import MemberConfig
from me_local.member import LogitArray, Member
from me_local.vocabulary import IntArray
from me_local.weights import Weights

ROOT = Path(__file__).parents[1]
DEMO_FILES = [ROOT / "models" / name for name in ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf")]

WriteModels = Callable[..., Path]
OpenEnsemble = Callable[..., Ensemble]
OpenMember = Callable[..., Member]


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Tests of what a script fetches, or the system has to have, are skipped where it is missing, but never in CI."""
    if os.environ.get("CI"):
        return
    missing = {}
    if not all(path.exists() for path in DEMO_FILES):
        missing["demo"] = "no demo models: run scripts/fetch_demo_models.py"
    if not fetch_vocabularies.kept(fetch_vocabularies.folder()):
        missing["vocabularies"] = "no real vocabularies: run scripts/fetch_vocabularies.py"
    if not shutil.which("chromium"):
        missing["browser"] = "no browser: apt-get install chromium"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models by name; `make_tiny_models` says what each is."""
    return make_tiny_models.make_all(tmp_path_factory.mktemp("tiny"))


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
