"""The short form of scripts/load_server.py: many clients at once, each of which gets what it would get alone."""

from pathlib import Path

import load_server
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 4])
def test_many_clients_are_answered_or_refused(tmp_path: Path, parallel: int) -> None:
    result = load_server.run(load_server.write_models(tmp_path), clients=50, seconds=6, parallel=parallel)
    assert result.unexpected == [], result.outcomes
    assert result.outcomes["right"] >= 50
    assert result.outcomes["429"] >= 1
    assert result.outcomes["left"] >= 1


def test_what_grows() -> None:
    """Of 90 samples 30 are warm-up; the middles of the first and the last quarter then lie 45 samples apart."""
    assert load_server.Result(resident=[10**8] * 90).growth == 0
    rising = load_server.Result(resident=[100 + i for i in range(90)])
    assert rising.growth == (100 + 82) / (100 + 37) - 1
