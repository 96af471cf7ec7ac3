"""The short form of scripts/soak.py: a chat leaves nothing behind in memory. And what the script calls flat."""

from pathlib import Path

import pytest
import soak


@pytest.mark.slow
def test_the_memory_of_a_chat_is_flat(tmp_path: Path) -> None:
    with soak.open_ensemble(tmp_path) as ensemble:
        soak.fill(ensemble)
        verdict = soak.judge(list(soak.chat_samples(ensemble, 30)))
    assert verdict.memory_is_flat, verdict


@pytest.mark.parametrize(
    ("growth", "slowing", "memory_is_flat", "speed_is_flat"),
    [(0.0, 0.0, True, True), (0.002, 0.0, False, True), (0.0, 0.003, True, False), (0.0005, -0.0005, True, True)],
)
def test_what_is_flat(growth: float, slowing: float, memory_is_flat: bool, speed_is_flat: bool) -> None:
    """Of 100 samples ten are warm-up; the medians of the thirds then lie 60 samples apart, first and last."""
    samples = [
        soak.Sample(pieces=100, seconds=1 + slowing * i, resident=int(1e8 * (1 + growth * i)), yardstick=200.0)
        for i in range(100)
    ]
    verdict = soak.judge(samples)
    assert (verdict.memory_is_flat, verdict.speed_is_flat) == (memory_is_flat, speed_is_flat)
