"""Where a text may be cut for tokenising, and what a growing text then costs."""

from collections.abc import Callable, Sequence

import pytest

from me_local.llama.member import Member
from me_local.text.growing import TokenizedText
from me_local.text.seams import Seams

OpenMember = Callable[..., Member]


def seams(*pieces: str | bytes, normalises: bool = False) -> Seams:
    return Seams(
        b"\n".join([b"", *(p.encode() if isinstance(p, str) else p for p in pieces), b""]), normalises=normalises
    )


def cut(text: str, kinds: Seams) -> list[str]:
    whole = text.encode()
    ends = [*kinds.find(whole, 0), len(whole)]
    return [whole[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One two, three  four", ["One", " two, three", "  four"]),
        (" a b", [" a", " b"]),
        ("Он дома. Да", ["Он", " дома. Да"]),
        ("हिन्दी में é 5 ² ok", ["हिन्दी", " में", " é", " 5", " ²", " ok"]),
        ("» a — b\u00a0 c\u3000 d", ["» a", " — b\u00a0 c\u3000 d"]),
        ("今日は、東京。「はい」！", ["今日は", "、東京", "。「はい」！"]),
        ("カー、・、䷀，！，字：", ["カー", "、・、䷀，！，字", "："]),
        ("a，1。", ["a，1。"]),
    ],
)
def test_places(text: str, parts: list[str]) -> None:
    assert cut(text, seams("a", "字")) == parts


@pytest.mark.parametrize(
    ("pieces", "kinds"),
    [
        (["a", " a", "a", " ", "é", "— ", "\u00a0 ", "，字", "字字", "！，"], (True, True, True)),
        (["e t"], (False, False, True)),
        (["é "], (True, False, True)),
        ([b"\xa9 "], (True, False, True)),
        (["字，"], (True, True, False)),
        ([b"\x97\xef\xbc\x8c"], (True, True, False)),
        (["字".encode() + b"\xef"], (True, True, False)),
        ([b"\xad\x97\xe3\x80"], (True, True, False)),
    ],
)
def test_a_kind_counts_where_no_token_has_one_inside(pieces: Sequence[str | bytes], kinds: tuple[bool, ...]) -> None:
    found = seams(*pieces)
    assert (found.ascii, found.other, found.wide) == kinds


def test_wide_stops_may_become_others_where_characters_are_changed() -> None:
    assert not seams("a", normalises=True).wide


def test_only_what_stays_a_letter_counts_where_characters_are_changed() -> None:
    assert cut("дом é 字 ² ⑴ 7 ok", seams("a", normalises=True)) == ["дом", " é 字", " ² ⑴ 7", " ok"]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_they_are_found_once_while_a_text_grows(size: int) -> None:
    kinds, text, found = seams("a"), "Он, naïve один 今日は、東京。 x y".encode(), []
    for end in range(0, len(text) + size, size):
        found += kinds.find(text[: end + size], min(end, len(text)))
    assert found == kinds.find(text, 0)


@pytest.mark.parametrize(
    "sentence", ["Мама мыла раму. ", "मैं घर जा रहा हूँ ", "今日は東京に行きます。それは、", "The cat sat. "]
)
def test_a_piece_costs_the_same_in_a_long_text(open_member: OpenMember, sentence: str) -> None:
    vocabulary, tokenised = open_member("bpe_a").vocabulary, 0
    encode = vocabulary.encode

    def spy(text: bytes, *, at_start: bool = False) -> list[int]:
        nonlocal tokenised
        tokenised += len(text)
        return encode(text, at_start=at_start)

    vocabulary.encode = spy  # type: ignore[method-assign]
    growing, text, costs = TokenizedText(vocabulary, at_start=False), sentence.encode() * 40, []
    for end in range(3, len(text), 3):
        tokenised = 0
        growing.ids(text[:end])
        costs.append(tokenised)
    assert max(costs) <= 2 * len(sentence.encode())
