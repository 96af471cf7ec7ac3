"""The house: who may import whom, and where llama.cpp is spoken to."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "me_local"
ROOMS = (
    "errors",
    "arrays",
    "plugins",
    "jsonl",
    "gguf",
    "system",
    "checks",
    "toml",
    "sampling",
    "config",
    "settings",
    "text",
    "stores",
    "_reference",
    "model",
    "llama",
    "engines",
    "mixture",
    "decoding",
    "records",
    "asking",
    "ensemble",
    "echoes",
    "chat",
    "batch",
    "evaluation",
    "measuring",
    "__init__",
    "server",
    "cli",
    "__main__",
)
"""Packages and modules, the lowest first. Each may import those before it."""

SPEAK_TO_LLAMA_CPP = ("llama", "text", "engines", "_reference")
"""The last of them is to be read, and what runs does not use it."""
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The package, or the module beside the packages, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """The modules that a file imports, wherever in it, and the lines where it does."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name"
            module = str(node.module)
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def modules() -> dict[str, Path]:
    """All modules of the package by their names."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def own_imports(path: Path) -> set[Path]:
    """The files of the package that a file imports."""
    known = modules()
    return {known[name] for _, name in imported(path) if name in known} - {path}


def test_every_file_has_a_room() -> None:
    assert {room(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down(path: Path) -> None:
    """`import me_local.x` imports `me_local` first; only names that are taken from there count for that."""
    floor = ROOMS.index(room(path))
    package = PACKAGE / "__init__.py"
    for other in own_imports(path) - {package}:
        assert ROOMS.index(room(other)) <= floor, f"{room(path)} stands below {room(other)} and imports it"
    names = [name for _, name in imported(path) if name.startswith("me_local.") and name.count(".") == 1]
    taken = [name for name in names if name not in modules()]
    assert not taken or floor > ROOMS.index("__init__"), f"{taken} stand above {room(path)}"


def test_no_circles_within_a_room() -> None:
    graph = {path: {other for other in own_imports(path) if room(other) == room(path)} for path in FILES}
    while leaves := {path for path, others in graph.items() if not others}:
        graph = {path: others - leaves for path, others in graph.items() if path not in leaves}
    assert not graph


def test_llama_cpp_is_spoken_to_in_few_places() -> None:
    speakers = {room(path) for path in FILES for _, name in imported(path) if name.split(".")[0] == "llama_cpp"}
    assert speakers == set(SPEAK_TO_LLAMA_CPP)


def test_the_mathematics_is_numpy() -> None:
    outside = {
        name.split(".")[0]
        for path in (PACKAGE / "mixture").glob("*.py")
        for _, name in imported(path)
        if not name.startswith("me_local")
    }
    assert outside - sys.stdlib_module_names <= {"numpy", "pydantic"}


@pytest.mark.parametrize("folder", sorted(path.parent for path in PACKAGE.glob("*/__init__.py")), ids=lambda p: p.name)
def test_a_package_says_what_it_is_and_what_it_does_not_know(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    assert text
    assert len(text.splitlines()) <= 10
    assert "nows nothing of" in text or "nothing else" in text or "Changes nothing" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_of_a_length_that_can_be_read(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


def test_tests_stand_where_the_packages_do() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    tests = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= tests
    assert tests - folders <= {"scripts", "docs"}


def test_every_script_has_its_kind() -> None:
    listed = (ROOT / "scripts" / "README.md").read_text("utf-8")
    scripts = {path.name for path in (ROOT / "scripts").iterdir() if path.suffix in (".py", ".sh")}
    assert scripts == set(re.findall(r"`(\w+\.(?:py|sh))`", listed))
