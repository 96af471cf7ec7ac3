"""Which tests run: the quick ones, and with --all the slow ones, too; in CI none may be skipped.

Those of a real vLLM run by themselves, where they are asked for.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import build_llama_server
import fetch_node_clients
import fetch_vocabularies
import pytest

MODELS = Path(__file__).parents[1] / "models"
DEMO_FILES = [MODELS / name for name in ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf")]
CLIENTS = ("anthropic", "autogen_ext", "langchain_openai", "litellm", "llm", "lm_eval", "pydantic_ai")
SLOW_LIMIT = 600.0  # seconds
_LEFT_OUT = pytest.StashKey[int]()


def slow_but(values: Iterable[object], *quick: object) -> list[Any]:
    """The values of a test that is slow for all of them but some."""
    values = list(values)
    assert set(quick) < set(values)
    return [pytest.param(value, marks=[] if value in quick else pytest.mark.slow) for value in values]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests, too")
    parser.addoption("--vllm", action="store_true", help="run the tests of a real vLLM (scripts/try_vllm.py), alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests, or give them time; skip tests of what is not there."""
    alone = config.getoption("--vllm")
    others = [item for item in items if bool(item.get_closest_marker("vllm")) != alone]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    slow = [item for item in items if item.get_closest_marker("slow")]
    if not config.getoption("--all"):
        config.stash[_LEFT_OUT] = len(slow)
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    for item in slow:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT))
    missing = dict(_missing())
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing() -> Iterator[tuple[str, str]]:
    """What a script fetches, or the system has to have, and is not there: the marker of its tests, and what to do."""
    if not all(path.exists() for path in DEMO_FILES):
        yield "demo", "no demo models: run scripts/fetch_demo_models.py"
    if not fetch_vocabularies.kept(fetch_vocabularies.folder()):
        yield "vocabularies", "no real vocabularies: run scripts/fetch_vocabularies.py"
    if not build_llama_server.built(build_llama_server.folder()):
        yield "llama_server", "no llama-server: run scripts/build_llama_server.py"
    if not all(map(find_spec, CLIENTS)):
        yield "clients", "no packages of clients: pip install 'me-local[clients]'"
    if not fetch_node_clients.fetched(fetch_node_clients.folder()):
        yield "node", "no packages of Node: run scripts/fetch_node_clients.py"
    if not shutil.which("chromium"):
        yield "browser", "no browser: apt-get install chromium"
    if not shutil.which("firefox-esr"):
        yield "firefox", "no Firefox: apt-get install firefox-esr"


def _skipped_in_ci(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return len(reporter.stats.get("skipped", [])) if reporter and os.environ.get("CI") else 0


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a run with a skipped test fails."""
    if session.exitstatus == pytest.ExitCode.OK and _skipped_in_ci(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what did not run."""
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.line(f"{left_out} slow tests left out; --all runs them")
    if skipped := _skipped_in_ci(config):
        terminalreporter.line(f"{skipped} tests were skipped, and in CI none may be", red=True)
