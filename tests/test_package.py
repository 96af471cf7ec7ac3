"""What `import me_local` gives: all names, and none of the libraries behind them before a name is used."""

import ast
import importlib
import sys

import processes
import pytest
from conftest import ROOT
from selection import slow_but

import me_local

SOURCE = ast.parse((ROOT / "me_local" / "__init__.py").read_text())


def test_the_names_that_type_checkers_see_are_those_that_there_are() -> None:
    imports = [node for node in ast.walk(SOURCE) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted(seen) == sorted(me_local.__all__)
    for name, module in seen.items():
        assert getattr(me_local, name) is getattr(importlib.import_module(str(module)), name)


def test_names_can_be_listed_and_others_are_not_there() -> None:
    assert set(me_local.__all__) <= set(dir(me_local))
    with pytest.raises(AttributeError, match="module 'me_local' has no attribute 'Ensembel'"):
        me_local.Ensembel  # type: ignore[attr-defined]  # noqa: B018


def test_importing_it_imports_no_library() -> None:
    program = "import sys; before = {*sys.modules}; import me_local; print(*sorted({*sys.modules} - before))"
    result = processes.run([sys.executable, "-c", program])
    new = {name.split(".")[0] for name in result.stdout.split()} - sys.stdlib_module_names
    assert result.returncode == 0
    assert new == {"me_local"}


@pytest.mark.parametrize("name", slow_but(me_local.__all__, "Score", "load"))
def test_each_name_can_be_the_first(name: str) -> None:
    result = processes.run([sys.executable, "-c", f"from me_local import {name}"])
    assert result.returncode == 0, result.stderr
