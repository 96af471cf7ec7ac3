"""Stop strings and the stream of steps, on hand-written draws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_local.decoding.engine import Draw
from me_local.decoding.reply import StopFilter


def draws(*pieces: bytes) -> list[Draw]:
    return [Draw(i + 1, piece, 0, 1.0, (1.0,)) for i, piece in enumerate(pieces)]


def shown(stops: tuple[str, ...], *pieces: bytes) -> tuple[list[bytes], bool]:
    """What a filter lets through, and whether it stopped."""
    stop_filter = StopFilter(stops)
    out: list[bytes] = []
    for draw in draws(*pieces):
        out += [d.piece for d in stop_filter.push(draw)]
        if stop_filter.stopped:
            return out, True
    return out + [d.piece for d in stop_filter.flush()], False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "stopped"),
    [
        ((), [b"a", b"b"], [b"a", b"b"], False),
        (("END",), [b"a", b"END", b"b"], [b"a"], True),
        (("END",), [b"a", b"E", b"N", b"D", b"b"], [b"a"], True),
        (("END",), [b"aEN", b"Db"], [b"a"], True),
        (("END",), [b"E", b"N", b"x"], [b"E", b"N", b"x"], False),
        (("END",), [b"EEN", b"D"], [b"E"], True),
        (("END",), [b"a", b"EN"], [b"a", b"EN"], False),
        (("ab", "b"), [b"xa", b"b"], [b"x"], True),
        (("\nUser:",), [b"Hi\n", b"\n", b"User", b":", b" x"], [b"Hi\n"], True),
        # Inside a character: the stop string is complete with its second half.
        (("ä",), [b"x\xc3", b"\xa4y"], [b"x"], True),
        (("ä",), [b"x\xc3", b"\xb6y"], [b"x\xc3", b"\xb6y"], False),
    ],
)
def test_stop_strings(stops: tuple[str, ...], pieces: list[bytes], expected: list[bytes], stopped: bool) -> None:
    assert shown(stops, *pieces) == (expected, stopped)


texts = st.text("abE", max_size=3)


@given(
    st.lists(texts.filter(bool), min_size=1, max_size=3).map(tuple),
    st.lists(texts.map(str.encode), max_size=15),
)
def test_the_text_ends_where_the_first_stop_string_begins(stops: tuple[str, ...], pieces: list[bytes]) -> None:
    out, stopped = shown(stops, *pieces)
    # The independent method: after each piece, look for a stop string in all there is.
    text = b""
    for piece in pieces:
        text += piece
        found = [text.find(s.encode()) for s in stops if s.encode() in text]
        if found:
            assert (b"".join(out), stopped) == (text[: min(found)], True)
            return
    assert (b"".join(out), stopped) == (text, False)


def test_pieces_are_held_back_no_longer_than_needed() -> None:
    stop_filter = StopFilter(("END",))
    first, second, third = draws(b"aE", b"N", b"xE")
    assert stop_filter.push(first) == []
    assert stop_filter.push(second) == []
    assert stop_filter.push(third) == [first, second]
    assert stop_filter.flush() == [third]


@pytest.mark.parametrize(
    ("stops", "pieces", "found"),
    [
        (("END",), (b"xEN", b"Dy"), "END"),
        (("END", "ST\u00d6P"), (b"x", "ST\u00d6P END".encode()), "ST\u00d6P"),  # the one that comes first
        (("ENDE", "END"), (b"ENDE",), "END"),  # the shorter of two at one place: it was complete before
        (("END",), (b"EN",), None),
    ],
)
def test_the_stop_string_that_ended_a_reply_is_known(
    stops: tuple[str, ...], pieces: tuple[bytes, ...], found: str | None
) -> None:
    stop_filter = StopFilter(stops)
    for draw in draws(*pieces):
        stop_filter.push(draw)
    assert stop_filter.found == found
