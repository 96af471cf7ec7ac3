"""What a word is, on texts worked out by hand; and writers, calls and errors of replies by words on tiny models."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from test_engine import generation, steps

from me_local import Ensemble, Overrides
from me_local.arrays import FloatArray
from me_local.decoding.engine import Draw, Engine
from me_local.decoding.generation import Generation
from me_local.errors import RunError
from me_local.llama.member import Member
from me_local.mixture.alignment import Distribution, top_k
from me_local.mixture.routing import constant
from me_local.mixture.words import Openings, is_free, may_end
from me_local.sampling import Sampling
from me_local.text.unified import END

OpenMember = Callable[..., Member]
OpenEnsemble = Callable[..., Ensemble]


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("", False),
        ("the cat", False),
        ("the cat ", False),
        ("caf\u00e9", False),
        ("日本", True),
        ("日本語 です", True),
        ("日本 x", False),
        ("\u0e01\u0e32", True),  # Thai
        ("終わり。", True),
        ("한국어", False),  # Korean has spaces
        ("x" * 63, False),
        ("x" * 64, True),
        ("the " + "x" * 63, True),  # the space in front belongs to the word
        ("the " + "x" * 62, False),
        ("я" * 31 + "a", False),
        ("я" * 32, True),
        (" " * 63, False),
        ("\n" * 64, True),
        ("a" + " " * 63, False),
        ("日" + "x" * 61, False),
        ("日" + "x" * 64, True),
        ("x" * 100 + " y", False),
    ],
)
def test_borders_that_the_text_shows(text: str, free: bool) -> None:
    assert is_free(text.encode()) == free


def test_a_space_behind_a_space_begins_no_word() -> None:
    assert [may_end(text) for text in (b"a", b"a.", b"\xe3\x80\x80", b"\xc3", b"a ", b"a\n", b"\t")] == [True] * 4 + [
        False
    ] * 3


def test_pieces_that_begin_a_word(open_member: OpenMember) -> None:
    members = [open_member("bpe_c"), open_member("spm")]
    unified = Engine(members, constant, top_k).unified
    openings = Openings(unified)
    assert openings.begins[END]
    for number, piece in enumerate(unified.pieces):
        assert openings.begins[number] == (number == END or piece[0] in b" \t\n\r\x0b\x0c")
    for member, numbers, kept in zip(members, unified.numbers, openings.numbers, strict=True):
        assert kept.dtype == np.int32
        assert 10 < np.count_nonzero(kept >= 0) < np.count_nonzero(numbers >= 0) / 2
        assert all(kept[i] == END for i in member.vocabulary.end_ids)
        assert all(openings.begins[n] for n in kept if n >= 0)


def test_a_distribution_given_that_a_word_begins(open_member: OpenMember) -> None:
    unified = Engine([open_member("bpe_c"), open_member("spm")], constant, top_k).unified
    openings = Openings(unified)
    space, letter = unified.pieces.index(b" "), unified.pieces.index(b"e")
    order = np.argsort([END, space, letter])
    numbers = np.array([END, space, letter], dtype=np.int32)[order]
    given = openings.condition(Distribution(numbers, np.array([0.1, 0.3, 0.6])[order]))
    assert given is not None
    assert (given.of(END), given.of(space), given.of(letter)) == (pytest.approx(0.25), pytest.approx(0.75), 0.0)
    assert openings.condition(Distribution(np.array([letter], dtype=np.int32), np.array([1.0]))) is None


@pytest.mark.parametrize(("names", "weights"), [(("bpe_a",), (1.0,)), (("bpe_c", "spm"), (0.0, 1.0))])
def test_one_member_writes_by_words_what_it_writes_by_tokens(
    open_member: OpenMember, names: Sequence[str], weights: Sequence[float]
) -> None:
    members = [open_member(name) for name in names]
    engine = Engine(members, constant, top_k)
    for seed in range(10):
        by_tokens, by_words = (
            steps(generation(members, engine, seed=seed, weights=np.array(weights), unit=unit), 40)
            for unit in ("token", "word")
        )
        assert by_words == by_tokens


def written(running: Generation, count: int) -> list[tuple[bytes, Draw]]:
    """The text in front of each draw, and the draw; the last may be END."""
    found: list[tuple[bytes, Draw]] = []
    while len(found) < count and not (found and found[-1][1].number == END):
        text, draw = running.text, running.step()
        assert draw is not None
        found.append((text, draw))
    return found


@pytest.mark.parametrize("names", [("bpe_b", "spm"), ("bpe_a", "bpe_b"), ("bpe_a", "bpe_c", "spm")])
def test_writers_change_at_borders_and_a_dropped_piece_is_a_call(open_member: OpenMember, names: Sequence[str]) -> None:
    members = [open_member(name) for name in names]
    engine = Engine(members, constant, top_k)
    dropped = 0
    for seed in range(30):
        running = generation(members, engine, seed=seed, unit="word", head=b"x", sampling=(Sampling(0.7),) * len(names))
        found = written(running, 30)
        changes = [
            (text, draw)
            for (_, before), (text, draw) in pairwise(found)
            if draw.member != before.member and not is_free(text)
        ]
        for text, draw in changes:
            assert not text[-1:].isspace()
            assert draw.number == END or draw.piece[:1].isspace()
        assert sum(work.calls for work in running.work) == len(found) + len(changes)
        dropped += len(changes)
    assert dropped > 30


def test_a_seed_repeats_its_reply_whatever_the_caches_hold(open_member: OpenMember) -> None:
    members = [open_member("bpe_b"), open_member("spm")]
    engine = Engine(members, constant, top_k)
    first = steps(generation(members, engine, seed=5, unit="word"), 40)
    steps(generation(members, engine, seed=6, head=b"another text", unit="word"), 10)
    assert steps(generation(members, engine, seed=5, unit="word"), 40) == first
    assert {draw.member for draw in first} == {0, 1}


def test_a_writer_keeps_its_word_where_the_router_gives_it_no_weight(open_member: OpenMember) -> None:
    members = [open_member("bpe_b"), open_member("spm")]

    def turns(text: bytes, weights: FloatArray) -> FloatArray:
        return np.array([1.0, 0.0] if text == b"x" else [0.0, 1.0])

    engine = Engine(members, turns, top_k)
    lengths = []
    for seed in range(20):
        found = written(generation(members, engine, seed=seed, unit="word", head=b"x"), 30)
        writers = [draw.member for _, draw in found]
        lengths.append(writers.index(1) if 1 in writers else 30)
        assert writers == [0] * lengths[-1] + [1] * (len(found) - lengths[-1]) or lengths[-1] == 30
    assert max(lengths) > 2


def test_a_writer_that_cannot_go_on_loses_its_word(open_member: OpenMember) -> None:
    members = [open_member("bpe_c"), open_member("spm")]
    del members[1].vocabulary._byte_ids[0x9F]
    for seed in range(10):
        running = generation(members, seed=seed, unit="word", weights=np.array([0.2, 0.8]))
        running._sampler.writer = 1
        running._text.append("👋".encode()[:2])
        draw = running.step()
        assert draw is not None
        assert draw.member == 0
        assert [work.calls for work in running.work] == [1, 0]


def test_a_failure_leaves_text_and_writer_as_they_were(
    open_member: OpenMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [open_member("bpe_b"), open_member("spm")]

    def fail(*_: object, **__: object) -> None:
        raise RunError("no")

    running = generation(members, unit="word", head=b"x")
    while not running.text[-1:].isalpha() or running.text == b"x":
        running.step()
    writer, text = running._sampler.writer, running.text
    assert writer is not None
    running._engine.openings.begins[:] = True  # so that the writer's piece, whatever it is, ends its word
    monkeypatch.setattr(members[1 - writer], "sync", fail)
    monkeypatch.setattr(running._sampler, "_route", lambda weights: 1 - writer)
    with pytest.raises(RunError, match="no"):
        running.step()
    assert (running.text, running._sampler.writer) == (text, writer)
    monkeypatch.undo()
    assert running.step() is not None


def test_a_reply_ends_where_the_context_of_its_writer_does(open_member: OpenMember) -> None:
    members = [open_member("bpe_b"), open_member("spm")]
    members[0].n_ctx = 20

    def first_word(text: bytes, weights: FloatArray) -> FloatArray:
        return np.array([1.0, 0.0] if text == b"x" * 17 else [0.0, 1.0])

    engine = Engine(members, first_word, top_k)
    full = 0
    for seed in range(40):
        running = generation(members, engine, seed=seed, unit="word", head=b"x" * 17)
        while (draw := running.step()) and draw.number != END and draw.member == 0:
            pass
        assert (draw is None) == (running._sampler.writer == 0 and len(running.ids(0)) > 20)
        full += draw is None
    assert full > 5


def test_figures_show_what_words_cost(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_b", "spm")
    reply = ensemble.generate("x", Overrides(seed=3, max_tokens=40, unit="word"), raw=True)
    assert reply.unit == reply.as_dict()["unit"] == "word"
    assert reply.calls_per_piece == sum(u.calls for u in reply.usage) / len(reply.steps) > 1
    assert ensemble.generate("x", Overrides(seed=3, max_tokens=0, unit="word"), raw=True).calls_per_piece == 0
