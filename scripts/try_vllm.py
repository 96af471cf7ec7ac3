"""Try members behind a real vLLM on the processor of this machine, with a tiny model that is there in both formats.

Contract: installs vLLM where it is missing (6 GB, kept in the cache) and runs `tests/engines/test_vllm.py` against it:
its numbers, exactness, commands and faults. Prints a line for each check, with what was seen; takes some minutes. Exits
with 1 where one fails. With --keep it serves the model until Ctrl-C instead.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import vllm_environment
import vllm_models
from pip_downloads import FetchError, exit_status
from vllm_serving import Vllm

CHECKS = Path(__file__).parents[1] / "tests" / "engines" / "test_vllm.py"


class Lines:
    """Has pytest print a line for each check, and the failures behind them all."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        """Count a check, or what went wrong around it, once; with no dot."""
        return report.outcome if report.when == "call" or not report.passed else "", "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print the line."""
        if report.when == "call" or not report.passed:
            print(line(report), flush=True)


def line(report: pytest.TestReport) -> str:
    """What came out of a check, its name, its seconds, and what it tells."""
    name = report.nodeid.rpartition("::")[2].removeprefix("test_")
    what, _, case = name.partition("[")
    title = what.replace("_", " ") + (f" ({case[:-1]})" if case else "")
    seen = [str(value) for key, value in report.user_properties if key == "seen"]
    return f"{'ok' if report.passed else 'FAILED':6}  {title}, {report.duration:.0f} s" + "".join(
        f"\n          {text}" for value in seen for text in value.strip().splitlines()
    )


def check(only: str) -> None:
    """Run the checks; raise ``FetchError`` where one fails."""
    options = ["--vllm", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-k", only]
    if pytest.main([str(CHECKS), *options], plugins=[Lines()]):
        raise FetchError("a check of vLLM fails")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the model; what there is to know of it."""
    gguf, hf = vllm_models.write_models(folder, "tiny")
    vllm = Vllm("tiny")
    try:
        vllm.run(hf)
        yield f"{vllm.url} serves {gguf}, up after {vllm.seconds:.0f} s; Ctrl-C ends"
    finally:
        vllm.stop()


def keep() -> None:
    """Serve the model until Ctrl-C."""
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as text:
        print(text, flush=True)
        signal.pause()


def main(arguments: list[str] | None = None) -> int:
    """Try vLLM; give the exit status."""
    parser = argparse.ArgumentParser(description="Try members behind a real vLLM on the processor, with a tiny model.")
    parser.add_argument("--python", help=f"a Python {vllm_environment.PYTHON} to install it for")
    parser.add_argument("--keep", action="store_true", help="serve the model until Ctrl-C, and check nothing")
    parser.add_argument("-k", default="", metavar="WORDS", help="only checks with these words, as for pytest")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has its background processes ignore the first
        signal.signal(number, signal.default_int_handler)

    def try_it() -> None:
        vllm_environment.install(options.python)
        keep() if options.keep else check(options.k)

    return exit_status(try_it)


if __name__ == "__main__":
    sys.exit(main())
