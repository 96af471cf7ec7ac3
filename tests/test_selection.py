"""Which tests of a small folder run, by pytest in a process of its own; and that a hang ends the run."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import processes
import pytest
from conftest import ROOT

Pytest = Callable[..., CompletedProcess[str]]

HOOKS = ("pytest_addoption", "pytest_collection_modifyitems", "pytest_sessionfinish", "pytest_terminal_summary")
LIMIT = "request.node.get_closest_marker('timeout').args"
SLOW = f"@pytest.mark.slow\ndef test_slow(request):\n    print('limit', {LIMIT})\n"
QUICK = "def test_quick():\n    pass\n"
SKIPPED = "def test_skipped():\n    pytest.skip('nothing there')\n"
HANGS = "import re\ndef test_hangs():\n    "


@pytest.fixture
def run_pytest(tmp_path: Path) -> Pytest:
    """Runs tests of this text with the options of this repository."""

    def run(text: str, *options: str, **env: str) -> CompletedProcess[str]:
        (tmp_path / "conftest.py").write_text(f"from selection import {', '.join(HOOKS)}\n")
        (tmp_path / "test_some.py").write_text(f"import pytest\n{text}")
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
        command += ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", str(tmp_path), *options]
        clean = {name: value for name, value in os.environ.items() if name != "CI" and "PYTEST" not in name}
        paths = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "scripts", "."))
        return processes.run(command, env=clean | {"PYTHONPATH": paths} | env)

    return run


def test_slow_tests_are_left_out_and_named(run_pytest: Pytest) -> None:
    done = run_pytest(SLOW + QUICK)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 deselected" in done.stdout
    assert "1 slow tests left out; --all runs them" in done.stdout


@pytest.mark.slow
def test_all_runs_them_with_more_time(run_pytest: Pytest) -> None:
    done = run_pytest(SLOW + QUICK, "--all", "-s")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    assert "left out" not in done.stdout
    assert "limit (600.0,)" in done.stdout


@pytest.mark.slow
def test_those_of_a_real_vllm_run_alone(run_pytest: Pytest) -> None:
    text = "@pytest.mark.vllm\n@pytest.mark.slow\ndef test_there():\n    pass\n"
    assert "1 passed, 1 deselected" in run_pytest(text + QUICK).stdout
    assert "1 passed, 1 deselected" in run_pytest(text + QUICK, "--all").stdout
    done = run_pytest(text.replace("@pytest.mark.slow\n", "") + QUICK, "--vllm", "-v")
    assert "test_there PASSED" in done.stdout
    assert "1 passed, 1 deselected" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("text", [SKIPPED, "pytest.skip('nothing there', allow_module_level=True)\n"])
def test_nothing_is_skipped_in_ci(run_pytest: Pytest, text: str) -> None:
    assert run_pytest(QUICK + SKIPPED).returncode == 0
    done = run_pytest(QUICK + text, CI="true")
    assert done.returncode != 0
    assert "1 tests were skipped, and in CI none may be" in done.stdout
    assert "nothing there" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hang", "option", "shown"),
    [
        ("__import__('threading').Event().wait()", "timeout=0.5", "Stack of MainThread"),
        # It does not let go of the lock of Python's threads.
        ("re.match('(a+)+b', 40 * 'a')", "faulthandler_timeout=0.5", "most recent call first"),
    ],
)
def test_a_hang_ends_the_run_and_shows_where(run_pytest: Pytest, hang: str, option: str, shown: str) -> None:
    done = run_pytest(HANGS + hang + "\n", "-o", option)
    assert done.returncode == 1
    assert "test_hangs" in done.stdout + done.stderr
    assert shown in done.stdout + done.stderr
