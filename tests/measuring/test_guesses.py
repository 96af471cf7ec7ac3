"""What guesses gain: how replies are written in turn, how it is counted, and what `bench` says of it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner

from me_local import Overrides, Reply, load
from me_local.cli.bench import repeated
from me_local.cli.program import main
from me_local.config import load_config, override
from me_local.decoding.reply import MemberUsage
from me_local.measuring.guesses import TextKind, gains
from me_local.measuring.turns import generation_seconds, write_in_turn

WriteModels = Callable[..., Path]
NGRAM = '[ensemble]\ndraft = "ngram"\n'
NONE = NGRAM.replace("ngram", "none")
CAT = TextKind("a cat", "the cat sat on the mat")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("me_local.measuring.bench.ROUNDS", 1)
    monkeypatch.setattr("me_local.measuring.bench.STEPS", 6)
    monkeypatch.setattr("me_local.measuring.guesses.PIECES", 40)


@dataclass
class Stream(Iterator[int]):
    """Notes in `order` whose turn it is; its reply is what it is called."""

    reply: str
    left: int
    order: list[str] = field(repr=False)

    def __next__(self) -> int:
        if not self.left:
            raise StopIteration
        self.left -= 1
        self.order.append(self.reply)
        return self.left


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((20, 9), "aaaaaaaa" "bbbbbbbb" "aaaaaaaa" "b" "aaaa"),
        ((8, 16), "aaaaaaaa" "bbbbbbbb" "bbbbbbbb"),
        ((0, 1), "b"),
    ],
)  # fmt: skip
def test_replies_take_turns_of_eight_pieces(lengths: tuple[int, int], expected: str) -> None:
    order: list[str] = []
    streams = [Stream(name, length, order) for name, length in zip("ab", lengths, strict=True)]
    assert write_in_turn(streams) == ["a", "b"]  # type: ignore[arg-type, comparison-overlap]
    assert "".join(order) == expected


def test_the_time_of_prompts_is_left_out() -> None:
    def reply(seconds: float, *prompts: float) -> Reply:
        usage = tuple(MemberUsage("a", 1.0, 1, 9, 9, 1, prompt, 0.1) for prompt in prompts)
        return Reply("x", "length", "me", "token", 1, (), usage, seconds)

    assert generation_seconds([reply(2.0, 0.5, 0.25), reply(3.0, 1.0)]) == pytest.approx(1.25 + 2.0)


def test_what_guesses_gain_is_counted_as_in_single_replies(write_models: WriteModels) -> None:
    """Greedily, tiny models run into loops, which guesses find."""
    precise = 'type_k = "f32"\ntype_v = "f32"'
    models = write_models("bpe_c", top=f"{NGRAM}[sampling]\ntemperature = 0.0", member=precise)
    (gain,) = gains(load_config(models), [CAT], seeds=2, pieces=120)
    with load(models) as ensemble:
        replies = [ensemble.generate(CAT.prompt, Overrides(seed=i, max_tokens=120), raw=True) for i in range(2)]
    calls, pieces = (sum(counts) for counts in zip(*((r.usage[0].calls, len(r.steps)) for r in replies), strict=True))
    assert gain.kind == "a cat"
    assert gain.calls_per_piece == calls / pieces < 1 == gain.calls_per_piece_plain
    assert gain.guessed == pytest.approx(1 - calls / pieces)
    assert gain.speed_up == pytest.approx(gain.pieces / gain.pieces_plain)


def test_texts_that_a_context_has_no_room_for_are_left_out(write_models: WriteModels) -> None:
    config = load_config(write_models("spm", top=NGRAM))
    long = TextKind("long", "the cat " * 400)
    assert [gain.kind for gain in gains(config, [long, CAT], seeds=1, pieces=20)] == ["a cat"]
    assert list(gains(config, [CAT], seeds=1, pieces=300)) == []


def test_bench_shows_what_guesses_gain(write_models: WriteModels) -> None:
    command = ["bench", "--models", str(write_models("spm", "bpe_a", top=NGRAM))]
    report = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert report["draft"] == "ngram"
    assert [gain["kind"] for gain in report["guesses"]] == ["edit of code", "free text"]
    for gain in report["guesses"]:
        assert gain["speed_up"] == pytest.approx(gain["pieces"] / gain["pieces_plain"])
        assert gain["calls_per_piece_plain"] == 1
        assert 0 < gain["calls_per_piece"] <= 1
    shown = CliRunner().invoke(main, command)
    assert "guesses: ngram" in shown.stdout
    assert "Guesses (ngram), of which that limit knows nothing, make it so many times as fast: edit" in shown.stdout
    assert "A context is too short to measure guesses on: repeated passage." in shown.stdout


@pytest.mark.parametrize(
    ("name", "top", "said"),
    [
        ("spm", '[ensemble]\ndraft = "none"\n', ""),
        ("recurrent", "", ""),
        ("recurrent", NGRAM, "guesses (ngram) are left out: no member can evaluate any"),
    ],
)
def test_bench_without_guesses(write_models: WriteModels, name: str, top: str, said: str) -> None:
    command = ["bench", "--models", str(write_models(name, top=top))]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert result.stderr.strip() == said
    assert "uesses" not in result.stdout
    report = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert (report["draft"], report["guesses"]) == ("none", [])


def test_a_member_that_is_there_several_times_writes_ahead_of_nobody(write_models: WriteModels) -> None:
    config = load_config(write_models("spm", "bpe_a", top='[ensemble]\ndraft = "spm"\n'))
    assert repeated(config, 2).draft is None
    assert repeated(override(config, Overrides(draft="ngram")), 2).draft == "ngram"
