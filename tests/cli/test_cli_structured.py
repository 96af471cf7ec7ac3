"""`me-local generate` with what the reply has to be: from options, from lines of --input, and what is wrong there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Run, jsonl, one_line, records

from me_local.cli.display import Painter, make_console

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yé"]}},
    "required": ["a"],
    "additionalProperties": False,
}
REPLIES = ['{"a": "x"}', '{"a": "yé"}']
GRAMMAR = 'root ::= "yes" | "no"'


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "file"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_schema(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + json.dumps(SCHEMA))
    for strategy in ("me", "ce"):
        result = run("generate", "--raw", "hello", "--seed", 1, "--json-schema", path, "--strategy", strategy)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.removesuffix("\n") in REPLIES


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (["--regex", "[ab]{2}"], ["aa", "ab", "ba", "bb"]),
        (["--choice", "one, two,thrée"], ["one", "two", "thrée"]),
        (["--choice", "one"], ["one"]),
    ],
)
def test_patterns_and_choices(run: Run, options: list[str], allowed: list[str]) -> None:
    replies = run("generate", "--raw", "hello", "--seed", 1, "-n", 3, "--batch", 2, *options)
    assert replies.exit_code == 0, replies.stderr
    assert set(replies.stdout.splitlines()) <= set(allowed)


def test_a_grammar_and_an_object(run: Run, tmp_path: Path) -> None:
    result = run("generate", "--raw", "hello", "--seed", 1, "--grammar", write(tmp_path, GRAMMAR))
    assert result.stdout in ("yes\n", "no\n")
    result = run("generate", "--raw", "hello", "--seed", 1, "--json-object", "--max-tokens", 3)
    assert result.stdout.startswith("{")


def test_what_was_forced_is_told_apart(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(SCHEMA))
    reply = json.loads(run("generate", "--raw", "hello", "--seed", 1, "--json", "--json-schema", path).stdout)
    first, last = reply["pieces"][0], reply["pieces"][-1]
    assert first == {
        "text": '{"a": "',
        "bytes": list(b'{"a": "'),
        "member": "",
        "probability": 1.0,
        "shares": [0.0, 0.0],
        "forced": True,
    }
    written = [piece for piece in reply["pieces"] if not piece["forced"]]
    assert written
    assert all(sum(piece["shares"]) == 1 and piece["member"] for piece in written)
    assert last["forced"]
    assert sum(member["pieces"] for member in reply["usage"]["members"]) == len(written)


def test_what_was_forced_has_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console()
    console._color_system = 1  # type: ignore[assignment]
    painter = Painter(console, ["a"])
    painter.write("x", "a")
    painter.write("{", "")
    assert capsys.readouterr().out == "\x1b[36mx\x1b[0m{\x1b[0m"


@pytest.mark.parametrize(
    ("options", "text", "parts"),
    [
        (["--json-schema", "--regex", "a"], "{}", ["--json-schema and --regex do not go together"]),
        (["--json-schema", "--json-object", "--choice", "a"], "{}", ["do not go together"]),
        (["--json-schema"], '{"a', ["--json-schema: ", "file: not JSON"]),
        (["--json-schema"], '{"type": "foo"}', ["file: Invalid type: foo"]),
        (["--json-schema"], b"\xff", ["file: not UTF-8 at byte 1"]),
        (["--json-schema"], "", ["file: not JSON"]),
        (["--json-schema"], " " * (1 << 18) + "{}", ["file: has more than 262144 bytes"]),
        (["--grammar"], "root ::= (", ["--grammar: ", "file: "]),
        (["--regex", "("], None, ["--regex: ", "unclosed group"]),
        (["--regex", ""], None, ["--regex: is empty"]),
        (["--regex", b"\xff".decode(errors="surrogateescape")], None, ["--regex: not UTF-8 at byte 1"]),
    ],
)
def test_bad_constraints(
    run: Run, tmp_path: Path, options: list[str], text: str | bytes | None, parts: list[str]
) -> None:
    if text is not None:
        options = [options[0], str(write(tmp_path, text)), *options[1:]]
    one_line(run("generate", "--raw", "hello", *options), 2, *parts)


def test_files_that_are_not_there(run: Run, tmp_path: Path) -> None:
    one_line(run("generate", "hello", "--json-schema", tmp_path / "none"), 2, "none: cannot be read: No such file")
    one_line(run("generate", "hello", "--grammar", tmp_path), 2, "is a directory")


def test_lines_with_what_their_replies_have_to_be(run: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    prompt = {"prompt": "hello", "max_tokens": 20}
    jsonl(
        source,
        prompt | {"json_schema": SCHEMA},
        prompt | {"json_schema": json.dumps(SCHEMA)},
        prompt | {"regex": "[ab]{2}"},
        prompt | {"choice": ["one, two", "three"]},
        prompt | {"grammar": GRAMMAR},
        prompt | {"json_object": True, "max_tokens": 1},
        prompt | {"regex": None, "json_object": False},
        prompt | {"regex": "a", "choice": ["b"]},
        prompt | {"regex": 1},
        prompt | {"choice": "abc"},
        prompt | {"json_object": 1},
        prompt | {"json_schema": {"type": "foo"}},
        prompt | {"json_schema": 5},
    )
    arguments = ("generate", "--raw", "--seed", 1, "--input", source, "--output", output)
    assert run(*arguments).exit_code == 1
    found = {record["id"]: record for record in records(output)}
    texts = {id_: record["text"] for id_, record in found.items() if "text" in record}
    assert sorted(texts) == [*range(1, 8)]
    assert {texts[1], texts[2]} <= set(REPLIES)
    assert set(texts[3]) <= set("ab")
    assert texts[4] in ("one, two", "three")
    assert texts[5] in ("yes", "no")
    assert texts[6] == "{"
    errors = {id_: record["error"].removeprefix(f"{source}, line {id_}: ") for id_, record in found.items() if id_ > 7}
    assert errors == {
        8: "regex and choice do not go together",
        9: "regex: must be a text",
        10: "choice: must be a list of texts, one at least",
        11: "json_object: must be true",
        12: "json_schema: Invalid type: foo",
        13: "json_schema: must be a JSON object",
    }


def test_a_run_with_a_schema_goes_on(run: Run, tmp_path: Path) -> None:
    source, output, schema = tmp_path / "in", tmp_path / "out", write(tmp_path, json.dumps(SCHEMA))
    jsonl(source, *({"prompt": f"hello {i}"} for i in range(5)))
    arguments = ("generate", "--raw", "--seed", 1, "--batch", 2, "--json-schema", schema, "--input", source)
    assert run(*arguments, "--output", output).exit_code == 0
    whole = {record["id"]: record["text"] for record in records(output)}
    assert set(whole.values()) <= set(REPLIES)
    jsonl(output, *records(output)[:2])
    assert run(*arguments, "--output", output, "--resume").exit_code == 0
    assert {record["id"]: record["text"] for record in records(output)} == whole


def test_the_line_of_figures_counts_what_was_forced(run: Run, open_ensemble: Callable[..., object]) -> None:
    from me_local import Constraint, Ensemble, Overrides
    from me_local.cli.display import stats_line

    ensemble = open_ensemble("bpe_a", "spm")
    assert isinstance(ensemble, Ensemble)
    reply = ensemble.generate("hello", Overrides(seed=1, constraint=Constraint("choice", '["one"]')), raw=True)
    assert "| bpe_a 0%, spm 0%, forced 100% |" in stats_line(reply)
