"""Constraints, followed by hand: what may come next, what is forced, where a reply may end; and what is refused."""

import json
from contextlib import suppress

import numpy as np
import pytest

from me_local.config import Constraint
from me_local.errors import InputError, MeLocalError, RunError
from me_local.jsonl import json_text
from me_local.text.constraints import Matcher, start


def schema(**keys: object) -> Matcher:
    return start(Constraint("json_schema", json_text(keys)))


def choice(*texts: str) -> Matcher:
    return start(Constraint("choice", json_text(list(texts))))


def regex(pattern: str) -> Matcher:
    return start(Constraint("regex", pattern))


def grammar(text: str) -> Matcher:
    return start(Constraint("grammar", text))


def fits(matcher: Matcher, text: str) -> bool:
    """Whether a text is one of the set, taken byte by byte."""
    for byte in text.encode():
        if not matcher.allows(bytes([byte])):
            return False
        matcher.append(bytes([byte]))
    return matcher.may_end()


def following(matcher: Matcher, text: bytes = b"") -> bytes:
    """The bytes that may come next."""
    return bytes(np.flatnonzero(matcher.following(text)).tolist())


def follow(matcher: Matcher, steps: int) -> None:
    """Take what is forced, or else the first byte that may come."""
    for _ in range(steps):
        if matcher.is_over():
            break
        matcher.append(matcher.forced() or following(matcher)[:1])


def test_a_piece_is_allowed_as_a_whole() -> None:
    matcher = choice("the cat", "the car")
    assert matcher.allows(b"the c")
    assert matcher.allows(b"the cat")
    assert not matcher.allows(b"the cat ")
    assert not matcher.allows(b"the dog")
    assert not matcher.allows(b" the")


def test_a_choice_step_by_step() -> None:
    matcher = choice("the cat", "the car")
    assert (matcher.forced(), matcher.may_end(), matcher.is_over()) == (b"the ca", False, False)
    matcher.append(b"the ")
    assert matcher.forced() == b"ca"
    assert following(matcher) == b"c"
    assert following(matcher, b"ca") == b"rt"
    matcher.append(b"cat")
    assert (matcher.forced(), matcher.may_end(), matcher.is_over()) == (b"", True, True)


def test_nothing_is_forced_where_a_reply_may_end() -> None:
    matcher = choice("a", "abc", "")
    assert (matcher.forced(), matcher.may_end(), matcher.is_over()) == (b"", True, False)
    matcher.append(b"a")
    assert (matcher.forced(), matcher.may_end(), matcher.is_over()) == (b"", True, False)
    matcher.append(b"b")
    assert (matcher.forced(), matcher.may_end(), matcher.is_over()) == (b"c", False, False)


def test_characters_are_forced_as_a_whole() -> None:
    matcher = choice("né", "nè")
    assert matcher.forced() == b"n"
    matcher.append(b"n")
    assert matcher.forced() == b""
    assert following(matcher) == b"\xc3"
    assert matcher.allows("é".encode())
    assert matcher.allows(b"\xc3")
    assert not matcher.allows(b"\xc3\xaa")
    matcher.append(b"\xc3")
    assert following(matcher) == b"\xa8\xa9"


@pytest.mark.parametrize("text", ["é", "😀", "a\0b", "\x7f", "\u2028", '"\\/', "\n", "%regex /a/", "", " ", "\ufeff"])
def test_any_text_can_be_a_choice(text: str) -> None:
    assert fits(choice(text, "other"), text)
    assert not fits(choice(text, "other"), text + "x")


def test_many_choices() -> None:
    matcher = choice(*(f"number {i}" for i in range(10_000)))
    assert matcher.forced() == b"number "
    assert fits(matcher, "number 9999")


def test_one_way_to_write_json() -> None:
    matcher = schema(
        type="object",
        properties={"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        required=["a", "b"],
        additionalProperties=False,
    )
    assert matcher.forced() == b'{"a": '
    matcher.append(b'{"a": 12')
    assert matcher.forced() == b""
    matcher.append(b",")
    assert matcher.forced() == b' "b": "'
    matcher.append(b' "b": "x')
    assert matcher.forced() == b'"}'


@pytest.mark.parametrize(
    ("keys", "good", "bad"),
    [
        ({"type": "integer", "minimum": 8, "maximum": 12}, ["8", "12"], ["7", "13", "8.0", "08"]),
        ({"type": "string", "maxLength": 2}, ['"é😀"', '""', '"\\n"'], ['"abc"', "'a'"]),
        ({"type": "string", "pattern": "^[A-Z]{2}$"}, ['"AB"'], ['"A"', '"ABC"', '"ab"']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-2-29"', '"24-02-29"']),
        ({"const": {"ключ": [1, None]}}, ['{"ключ": [1, null]}'], ['{"ключ":[1,null]}', "{}"]),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}, ["[true]"], ["[]", "[1]"]),
        ({"anyOf": [{"type": "null"}, {"type": "number"}]}, ["null", "-1.5e3"], ["true", "nul"]),
        (
            {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}},
            ["[[], [[]]]"],
            ["["],
        ),
        ({}, ['{"a": [1, "b", null]}', "3"], ["{a: 1}"]),
    ],
)
def test_schemas(keys: dict[str, object], good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not fits(schema(**keys), text)] == []
    assert [text for text in bad if fits(schema(**keys), text)] == []


def test_any_object() -> None:
    assert fits(start(Constraint("json_object")), '{"a": {"b": [1, 2]}}')
    assert not fits(start(Constraint("json_object")), "[1]")


def test_true_is_any_json() -> None:
    assert fits(start(Constraint("json_schema", "true")), "[1, {}]")


def test_patterns() -> None:
    assert fits(regex("[a-c]+é?"), "abcé")
    assert not fits(regex("[a-c]+"), "abd")
    assert fits(regex("^abc$"), "abc")
    assert fits(regex(" "), " ")


def test_grammars_of_both_kinds() -> None:
    gbnf = 'root ::= item ("," item)*\nitem ::= [a-c]+ | "é"'
    lark = 'start: item ("," item)*\nitem: /[a-c]+/ | "é"'
    for text in (gbnf, lark):
        assert fits(grammar(text), "ab,é,c")
        assert not fits(grammar(text), "ab,")
    assert fits(grammar('start: "x" %json {"type": "integer"}'), "x12")


@pytest.mark.slow
def test_replies_have_matchers_of_their_own() -> None:
    """One that meets a limit leaves others as they are. These texts have more states than a matcher may."""
    pattern = "(x{1000}){1000}"
    first, second = regex(pattern), regex(pattern)
    with pytest.raises(RunError, match=r"cannot be followed any further: .*too many"):
        follow(first, 3)
    assert len(second.forced()) > 100_000
    assert len(regex(pattern).forced()) > 100_000


@pytest.mark.parametrize("closing", [b"", b"</think>"])
def test_a_copy_goes_its_own_way(closing: bytes) -> None:
    matcher = start(Constraint("choice", '["yes", "yea", "no"]'), closing)
    matcher.append(closing[:3])
    other = matcher.copy()
    other.append(closing[3:] + b"ye")
    assert following(other) == b"as"
    matcher.append(closing[3:])
    assert following(matcher).strip() == b"ny"


def test_a_dead_end_is_an_error() -> None:
    matcher = grammar('start: "a" x | "b"\nx: "c" x')
    matcher.append(b"a")
    with pytest.raises(RunError, match="cannot be followed any further"):
        follow(matcher, 10_000)


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


REFUSED = {
    "a word": ("json_schema", "x", "not JSON: Expecting value: line 1 column 1"),
    "nothing": ("json_schema", "", "not JSON"),
    "half": ("json_schema", '{"type":', "not JSON"),
    "a list": ("json_schema", "[]", "must be a JSON object"),
    "a number": ("json_schema", "1" * 5000, "digits"),
    "NaN": ("json_schema", "NaN", "must be a JSON object"),
    "false": ("json_schema", "false", "must be a JSON object"),
    "a wrong type": ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
    "depth": ("json_schema", nested(2000), "is nested too deeply"),
    "some depth": ("json_schema", nested(200), "recursion limit exceeded"),
    "brackets": ("json_schema", "[" * 100_000, "is nested too deeply"),
    "1 MB": ("json_schema", json.dumps({"enum": ["x" * 1_000_000]}), "has 1000014 bytes, and there may be 262144"),
    "a surrogate": ("json_schema", '{"const": "\ud800"}', "half of a character"),
    "an escaped one": ("json_schema", '{"const": "\\ud800"}', "unexpected end of hex escape"),
    "NUL": ("json_schema", '{"type": "\0"}', "Invalid control character"),
    "itself": ("json_schema", '{"$ref": "#"}', "no text fulfils it"),
    "all of itself": ("json_schema", '{"allOf": [{"$ref": "#"}]}', "no text fulfils it"),
    "a file": ("json_schema", '{"$ref": "file:///etc/passwd"}', "does not fetch"),
    "a page": ("json_schema", '{"$ref": "http://127.0.0.1:1/x"}', "does not fetch"),
    "nowhere": ("json_schema", '{"$ref": "#/$defs/a"}', "does not exist"),
    "bounds": ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', r"minimum \(5\) is greater"),
    "an empty enum": ("json_schema", '{"enum": []}', "Unsatisfiable"),
    "not": ("json_schema", '{"not": {"type": "string"}}', r'Unimplemented keys: \["not"\]'),
    "huge bounds": ("json_schema", json.dumps({"type": "integer", "minimum": -(10**300)}), "range"),
    "many states": ("json_schema", '{"type": "integer", "multipleOf": 999983}', "more than 100000 states"),
    "more together": (
        "json_schema",
        '{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}',
        "more than 100000 states",
    ),
    "such in a grammar": ("grammar", 'start: %json {"multipleOf": 999983}', "more than 100000 states"),
    "properties": (
        "json_schema",
        json.dumps({"properties": {f"k{i}": {} for i in range(5000)}}),
        "has 5000 properties, and there may be 2000",
    ),
    "a look-ahead": ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-ahead"),
    "no pattern": ("regex", "", "is empty"),
    "an open group": ("regex", "(", "unclosed group"),
    "brackets in a pattern": ("regex", "(" * 50_000 + ")" * 50_000, "invalid regex"),
    "no character": ("regex", "[^\\x00-\\U0010FFFF]", "no text fulfils it"),
    "single bytes": ("regex", "(?s-u:.)", "invalid UTF-8"),
    "no choice": ("choice", "[]", "must be a list of texts, one at least"),
    "a table": ("choice", '{"a": 1}', "must be a list of texts"),
    "a text": ("choice", '"abc"', "must be a list of texts"),
    "numbers": ("choice", "[1]", "must be a list of texts"),
    "nothing among them": ("choice", '["a", null]', "must be a list of texts"),
    "commas": ("choice", "a,b", "not JSON"),
    "half a character": ("choice", '["\\ud800"]', "half of a character"),
    "no grammar": ("grammar", "", "is empty"),
    "no rule": ("grammar", "foo", "Expected ::="),
    "an open bracket": ("grammar", 'root ::= "a" | (', r"Expected '\)' at line 1"),
    "an open set": ("grammar", "root ::= [^", "Unexpected end"),
    "open brackets": ("grammar", "root ::= " + "(" * 100_000, "is nested too deeply"),
    "a rule that is itself": ("grammar", "root ::= root", "no text fulfils it"),
    "a circle": ("grammar", "start: a\na: b\nb: a", "no text fulfils it"),
    "2^50": (
        "grammar",
        "root ::= x0\n" + "\n".join(f"x{i} ::= x{i + 1} x{i + 1}" for i in range(50)) + '\nx50 ::= "a"',
        "too big",
    ),
    "a zero byte": ("grammar", "\0", "Expected name"),
    "no kind": ("foo", "x", "json_schema, json_object, regex, choice, grammar"),
    "no text": ("regex", None, "json_schema, json_object, regex, choice, grammar"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_constraints_are_refused_in_a_line(name: str) -> None:
    kind, text, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason) as caught:
        start(Constraint(kind, text))  # type: ignore[arg-type]
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 260
    assert line.startswith((f"{kind}: ", "a constraint"))


HARD = {
    "many rows": ("grammar", 'start: "a"{1000000}'),
    "a pattern in a pattern": ("regex", "(a+)+b"),
    "stars": ("regex", "((a*)*)*b"),
    "any of thousands": ("regex", "(a?){5000}a{5000}"),
    "far back": ("regex", ".*a.{200}"),
    "both": ("grammar", "start: X\nX: /.*a.{14}/ & ~/.*b.{13}/"),
    "repeats": ("regex", "((a{1,100}){1,100}){1,100}"),
    "a huge length": ("json_schema", '{"type": "string", "minLength": 1000000}'),
    "a huge list": ("json_schema", '{"type": "array", "minItems": 100000, "items": {"type": "integer"}}'),
    "lists of lists": ("json_schema", '{"type":"array","minItems":9,"items":' * 9 + "{}" + "}" * 9),
    "doubling": (
        "json_schema",
        json.dumps(
            {"$defs": {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)} | {"a40": {}}}
        )[:-1]
        + ', "$ref": "#/$defs/a0"}',
    ),
    "many properties": ("json_schema", json.dumps({"properties": {f"k{i}": {} for i in range(2000)}})),
    "a long text": ("choice", json.dumps(["x" * 200_000, "x" * 50_000])),
    "many words": ("regex", "|".join(f"word{i}" for i in range(20_000))),
    "many rules": ("grammar", "root ::= " + " | ".join(f'"v{i}"' for i in range(15_000))),
    "a number of states": ("json_schema", '{"type": "integer", "multipleOf": 9973}'),
}


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HARD)
def test_hard_ones_take_seconds_at_most(name: str) -> None:
    """They are refused, or followed for a while, or end by an error that says why."""
    kind, text = HARD[name]
    with suppress(MeLocalError):
        follow(start(Constraint(kind, text)), 300)  # type: ignore[arg-type]


@pytest.mark.parametrize("cuts", [1, 2, 3, 7, 100])
def test_behind_a_thought(cuts: int) -> None:
    matcher = start(Constraint("choice", '["yes", "yea"]'), b"</think>")
    thought = b"yes, </thin and <think> no </think>"
    for i in range(0, len(thought), cuts):
        assert not matcher.may_end()
        assert not matcher.is_over()
        assert matcher.forced() == b""
        assert matcher.following().all()
        piece = thought[i : i + cuts]
        assert matcher.allows(piece)
        matcher.append(piece)
    assert matcher.forced() == b"ye"
    assert matcher.allows(b" \n")
    assert matcher.allows(b" \nye")
    assert not matcher.allows(b" \nno")
    assert set(np.flatnonzero(matcher.following())) == set(b"y \t\n\v\f\r")
    assert set(np.flatnonzero(matcher.following(b" "))) == set(b"y \t\n\v\f\r")
    assert set(np.flatnonzero(matcher.following(b" y"))) == set(b"e")
    matcher.append(b"\n\n")
    matcher.append(b"yes")
    assert matcher.may_end()
    assert matcher.is_over()
    assert not matcher.allows(b" ")


def test_a_piece_that_ends_a_thought_and_goes_on() -> None:
    matcher = start(Constraint("choice", '["yes", "yea"]'), b"</think>")
    matcher.append(b"hm</thi")
    assert matcher.allows(b"nk>")
    assert matcher.allows(b"nk>\n")
    assert matcher.allows(b"nk> y")
    assert matcher.allows(b"s")
    assert not matcher.allows(b"nk> n")
    assert not matcher.allows(b"nk></think>")
    matcher.append(b"nk> y")
    assert matcher.forced() == b"e"
