"""Processes that write much, hang or die: nobody who waits for them waits for ever."""

import subprocess
import sys

import processes
import pytest

LINES = 20_000  # 200 KB: three times what a pipe holds


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_full_pipe_stops_nobody() -> None:
    with processes.running(program(f"import sys; print('ready'); sys.stderr.write({LINES} * '123456789\\n')")) as made:
        assert made.expect("rea(..)")[1] == "dy"
        assert made.finish() == 0
    assert made.log.count("123456789\n") == LINES


def test_what_is_not_written_is_missed_in_time() -> None:
    with (
        processes.running(program("print('one'); input()")) as made,
        pytest.raises(AssertionError, match="no line with two in:\none\n"),
    ):
        made.expect("two")  # its standard input is empty, so that it has ended
    hung = program("import threading; threading.Event().wait()")
    with processes.running(hung) as made:
        with pytest.raises(AssertionError, match="no line with two"):
            made.expect("two", seconds=0.1)
        with pytest.raises(subprocess.TimeoutExpired):
            made.finish(seconds=0.1)
    assert made.process.returncode == -9
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(hung, seconds=0.1)


def test_what_a_process_writes_to_its_end() -> None:
    done = processes.run(program("import sys; print('out'); sys.exit('err')"))
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")
