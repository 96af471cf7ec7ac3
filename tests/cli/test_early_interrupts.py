"""Ctrl-C while the program is still being imported: it ends at once, and writes nothing.

The first milliseconds, in which Python starts and finds the program, are Python's own.
"""

import random
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version as version_of

import processes
import pytest
from selection import slow_but

# Ctrl-C at the import after so many, as long as these are the program's; then it says how many there were.
DRIVER = """
import os, signal, sys
import me_local.cli
calls, after = 0, int(sys.argv.pop(1))

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        global calls
        if calls == after:
            os.kill(os.getpid(), signal.SIGINT)
        calls += 1

{before}
sys.meta_path.insert(0, Finder)
try:
    {run}
finally:
    print(calls)
"""
VERSION = f"me-local, version {version_of('me-local')}"
RUN = "me_local.cli.main()"
IMPORT = "import me_local.cli.program"
MOMENTS = [0, *random.Random(1).sample(range(1, 500), 5)]


def version(after: int, *, run: str = RUN, before: str = "") -> "subprocess.CompletedProcess[str]":
    """`me-local --version`, with Ctrl-C at that import."""
    return processes.run([sys.executable, "-c", DRIVER.format(run=run, before=before), str(after), "--version"])


@pytest.mark.parametrize("after", slow_but(MOMENTS, MOMENTS[1]))
def test_ctrl_c_while_the_program_is_imported_ends_it_and_writes_nothing(after: int) -> None:
    result = version(after)
    assert result.returncode == -signal.SIGINT
    assert result.stdout == result.stderr == ""


@pytest.mark.slow
def test_all_these_are_moments_of_an_import() -> None:
    result = version(-1)
    assert result.returncode == 0
    first, count = result.stdout.splitlines()
    assert first == VERSION
    assert int(count) > max(MOMENTS)


@pytest.mark.slow
def test_without_care_it_is_a_traceback() -> None:
    result = version(MOMENTS[1], run=IMPORT)
    assert result.returncode != 0
    assert "KeyboardInterrupt" in result.stderr


@pytest.mark.slow
def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    """As in the background of a script."""
    result = version(MOMENTS[1], before="signal.signal(signal.SIGINT, signal.SIG_IGN)")
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.slow
def test_ctrl_c_at_any_time_of_a_start() -> None:
    """From when the program has begun, which it says on a line of its own, until it ends by itself."""
    program = (
        "import me_local.cli, signal\n"
        "prepare = signal.signal\n"
        "signal.signal = lambda *arguments: (prepare(*arguments), print('begun', flush=True))\n"
        "me_local.cli.main()"
    )
    chance, cut_short = random.Random(2), 0
    for _ in range(12):
        with processes.running([sys.executable, "-c", program, "--version"]) as running:
            running.expect("begun")
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(chance.uniform(0, 0.8))
            running.process.send_signal(signal.SIGINT)
            assert running.finish() in (0, -signal.SIGINT)
            cut_short += running.process.returncode != 0
            said = running.log.splitlines()[1:]  # all of it, or nothing where it was cut short before
            assert said == [VERSION] or (running.process.returncode and not said)
    assert cut_short
