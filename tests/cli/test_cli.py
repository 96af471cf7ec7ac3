"""The commands through click's runner: what goes in, what comes out, and how bad input ends."""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from commands import Run, jsonl, one_line, records

from me_local.cli.program import main
from me_local.llama.member import Member

WriteModels = Callable[..., Path]


def test_generate_prints_the_reply_and_nothing_else(run: Run) -> None:
    first = run("generate", "Hello", "--seed", 1, "--max-tokens", 15)
    again = run("generate", "-", "--seed", 1, "--max-tokens", 15, stdin="Hello\n")
    piped = run("generate", "--seed", 1, "--max-tokens", 15, stdin="Hello")
    assert first.exit_code == 0
    assert first.stdout == again.stdout == piped.stdout
    assert first.stdout.endswith("\n")
    assert "plain transcript" in first.stderr


def test_generate_as_json(run: Run) -> None:
    result = run("generate", "the cat", "--raw", "--seed", 2, "--max-tokens", 30, "--json", "-n", 2)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    text = run("generate", "the cat", "--raw", "--seed", 2, "--max-tokens", 30).stdout
    assert [record["seed"] for record in records] == [2, 3]
    assert records[0]["text"] == text.removesuffix("\n") or records[0]["text"] == text
    for record in records:
        assert record["strategy"] == "me"
        assert record["finish_reason"] in ("stop", "length")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        assert decoder.decode(bytes(b for piece in record["pieces"] for b in piece["bytes"])) == record["text"]
        assert {piece["member"] for piece in record["pieces"]} <= {"bpe_a", "spm"}
        assert all(0 < piece["probability"] <= 1 for piece in record["pieces"])
        assert [member["member"] for member in record["usage"]["members"]] == ["bpe_a", "spm"]
        assert record["timings"]["seconds"] > 0
    alone = json.loads(run("generate", "the cat", "--raw", "--seed", 3, "--max-tokens", 30, "--json").stdout)
    assert alone["text"] == records[1]["text"]


def test_options_go_before_the_environment_and_that_before_the_file(run: Run, write_models: WriteModels) -> None:
    models = write_models("bpe_a", "spm", top="[ensemble]\nseed = 1\n[sampling]\nmax_tokens = 1")
    lengths = []
    for options, env in (
        ([], {}),
        ([], {"ME_LOCAL_MAX_TOKENS": "2"}),
        (["--max-tokens", 3], {"ME_LOCAL_MAX_TOKENS": "2"}),
    ):
        result = run("generate", "--raw", "the cat", "--json", *options, models=models, env=env)
        record = json.loads(result.stdout)
        lengths.append(len(record["pieces"]))
        assert record["seed"] == 1
    assert lengths == [1, 2, 3]


def test_weights_choose_the_members(run: Run) -> None:
    for weights, expected in (("1,0", {"bpe_a"}), ("bpe_a=0,spm=1", {"spm"})):
        result = run("generate", "--raw", "the cat", "--json", "--seed", 1, "--max-tokens", 20, "--weights", weights)
        assert {piece["member"] for piece in json.loads(result.stdout)["pieces"]} == expected


@pytest.mark.parametrize(
    ("arguments", "stdin", "part"),
    [
        (["generate", ""], None, "the prompt is empty"),
        (["generate"], "", "the prompt is empty"),
        (["generate", "-"], " \n", "the prompt is empty"),
        (["generate"], b"ab\xff", "standard input: not UTF-8 at byte 3"),
        (["generate", "x", "--temperature", "-1"], None, "--temperature: must be at least 0, got -1"),
        (["generate", "x", "--top-p", "0"], None, "--top-p"),
        (["generate", "x", "--weights", "0,0"], None, "--weights"),
        (["generate", "x", "--weights", "bpe=1"], None, "bpe_a"),
        (["generate", "x", "--decode", "argmax"], None, '"argmax" needs strategy "ce"'),
        (["generate", "x", "--strategy", "mee"], None, "mee"),
        (["generate", "x", "--strategy", "ce", "--unit", "word"], None, '--unit: unit "word" needs strategy "me"'),
        (["chat"], "/unit word\n/strategy ce\n", '--strategy: unit "word" needs strategy "me"'),
        (["generate", "word " * 700], None, "tokens for member"),
        (["generate", "x", "--resume"], None, "--input"),
        (["generate", "--input", "missing.jsonl", "--output", "o"], None, "missing.jsonl"),
        (["chat"], b"hello\n\xff\n", "standard input, line 2: not UTF-8 at byte 1"),
        (["chat"], "/load nowhere.json\n", "/load: nowhere.json: No such file or directory"),
        (["chat"], "/temperature 1\n", 'there is no command "/temperature"'),
    ],
)
def test_wrong_input_is_one_line_and_status_2(run: Run, arguments: list[str], stdin: Any, part: str) -> None:
    one_line(run(*arguments, "--max-tokens", 3, stdin=stdin), 2, part)


def test_wrong_models_are_one_line_and_status_2(run: Run, tmp_path: Path, tiny: dict[str, Path]) -> None:
    good = f'[[members]]\nname = "a"\npath = "{tiny["bpe_a"]}"\n'
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny["bpe_a"].read_bytes()[:9000])
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    cases = [
        ("[[members]\n", ["models.toml", "not valid TOML", "line 1"]),
        (good + "weigth = 1\n", ["models.toml", 'members[0] "a".weigth', 'did you mean "weight"?']),
        (good + "weight = -1\n", ['members[0] "a".weight', "at least 0"]),
        (good + "weight = 0\n", ["weight", "0"]),
        (good + good, ['members[1] "a"', "name"]),
        ("", ["members"]),
        ('[[members]]\nname = "a"\npath = "nowhere.gguf"\n', ['member "a"', "nowhere.gguf: there is no such file"]),
        (f'[[members]]\nname = "a"\npath = "{text}"\n', ['member "a"', "text.gguf: not a GGUF file"]),
        (f'[[members]]\nname = "a"\npath = "{cut}"\n', ['member "a"', "cut.gguf cannot be loaded: "]),
        (good + 'lora = "text.gguf"\n', ['member "a"', "text.gguf cannot be loaded: "]),
        (good + 'lora = "none.gguf"\n', ['member "a"', "none.gguf cannot be loaded: "]),
        (good + 'tokenizer = "text.gguf"\n', ['member "a"', "not a tokenizer.json"]),
        (good + 'chat_template = "chatmll"\n', ['member "a"', '"chatmll"']),
        (good + 'chat_template = "./none.jinja"\n', ['member "a"', "none.jinja", "No such file"]),
    ]
    models = tmp_path / "models.toml"
    for content, parts in cases:
        models.write_text(content)
        one_line(run("generate", "x", "--max-tokens", 1, models=models), 2, *parts)
    one_line(run("generate", "x", models=tmp_path / "no.toml"), 2, "no.toml: cannot be read")
    one_line(run("generate", "x", models=tmp_path), 2, "cannot be read")


def test_a_run_that_fails_has_status_1_and_keeps_its_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("generate", "--raw", "the cat", "--seed", 1, "--max-tokens", 30, "--ignore-eos")
    whole = run(*options).stdout
    decode, calls = Member._decode, []

    def failing(*args: Any) -> int:
        calls.append(args)
        return 1 if len(calls) == 9 else decode(*args)

    monkeypatch.setattr(Member, "_decode", failing)
    result = run(*options)
    one_line(result, 1, 'member "', "no room is left in its KV cache")
    assert whole.startswith(result.stdout.removesuffix("\n"))
    assert len(result.stdout) > 3


def test_a_file_of_prompts(run: Run, tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "in.jsonl",
        {"prompt": "Hello", "seed": 1},
        {"id": "b", "messages": [{"role": "user", "content": "Hi"}], "seed": 2, "max_tokens": 3},
        "",
        {"id": 7, "prompt": "the cat"},
    )
    output = tmp_path / "out.jsonl"
    result = run("generate", "--input", source, "--output", output, "--max-tokens", 6)
    assert (result.exit_code, result.stdout) == (0, "")
    written = records(output)
    assert [record["id"] for record in written] == [1, "b", 7]
    assert len(written[1]["pieces"]) <= 3
    single = json.loads(run("generate", "Hello", "--seed", 1, "--max-tokens", 6, "--json").stdout)
    assert written[0]["text"] == single["text"]


def test_bad_lines_become_error_records_and_the_run_goes_on(run: Run, tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "in.jsonl",
        {"prompt": "Hello"},
        "{not json",
        {"prompt": "x", "messages": []},
        {"id": "empty", "prompt": ""},
        {"id": "long", "prompt": "word " * 700},
        {"id": [1], "prompt": "x"},
        {"prompt": "x", "seed": -1},
        {"prompt": "x", "temprature": 1},
        {"id": "empty", "prompt": "twice"},
        {"id": "half", "prompt": "\ud800"},
        {"id": "last", "prompt": "Hello"},
    )
    source.write_bytes(source.read_bytes() + b'{"prompt": "\xff"}\n')
    output = tmp_path / "out.jsonl"
    result = run("generate", "--input", source, "--output", output, "--max-tokens", 2)
    assert result.exit_code == 1
    assert "10 of 12 prompts failed" in result.stderr
    written = records(output)
    # Lines that are no prompts come last.
    assert [record["id"] for record in written] == [1, "empty", "long", "half", "last", 2, 3, 6, 7, 8, "empty", 12]
    assert [record["id"] for record in written if "error" not in record] == [1, "last"]
    errors = {record["id"]: record["error"] for record in written if "error" in record}
    for number, part in ((2, "not JSON"), (3, 'either "prompt" or "messages"'), (6, "id: must be"), (12, "not UTF-8")):
        assert f"line {number}: " in errors[number]
        assert part in errors[number]


def test_an_id_that_comes_twice_is_replied_to_once(run: Run, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", *({"id": name, "prompt": "Hello", "seed": 1} for name in "aba"))
    output = tmp_path / "out.jsonl"
    options = ["generate", "--input", source, "--output", output, "--max-tokens", 3, "--batch", 2]
    assert run(*options).exit_code == 1
    assert [(record["id"], "error" in record) for record in records(output)][2] == ("a", True)
    whole = output.read_bytes()
    for end in range(3):
        output.write_bytes(b"".join(whole.splitlines(keepends=True)[:end]))
        run(*options, "--resume")
        assert {r["id"] for r in records(output) if "error" not in r} == {"a", "b"}


def test_resuming_writes_what_is_missing_and_nothing_twice(run: Run, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", *({"id": f"p{i}", "prompt": f"the {i}", "seed": i} for i in range(6)))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run("generate", "--input", source, "--output", whole, "--max-tokens", 4)
    lines = whole.read_bytes().splitlines(keepends=True)
    # Killed in the middle of the third record.
    output.write_bytes(lines[0] + lines[1] + lines[2][:40])
    one_line(run("generate", "--input", source, "--output", output), 2, "out.jsonl: it exists already", "--resume")
    assert output.read_bytes() == lines[0] + lines[1] + lines[2][:40]
    result = run("generate", "--input", source, "--output", output, "--max-tokens", 4, "--resume")
    assert result.exit_code == 0
    assert [(r["id"], r["text"]) for r in records(output)] == [(r["id"], r["text"]) for r in records(whole)]
    output.write_text("something else\n")
    one_line(run("generate", "--input", source, "--output", output, "--resume"), 2, "out.jsonl, line 1: not a record")
    assert output.read_text() == "something else\n"


def test_an_output_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "x"})
    one_line(run("generate", "--input", source, "--output", tmp_path / "no" / "out.jsonl"), 2, "out.jsonl")
    one_line(run("generate", "--input", source, "--output", "/dev/full", "--resume"), 1, "/dev/full")


def test_a_scripted_chat(run: Run, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    script = f"Hello\n\nAgain\n/stats\n/save {saved}\n/set max_tokens 2\n/retry\n/weights 1,0\n/strategy ce\n"
    script += f"/system Be brief.\nThird\n/clear\n/load {saved}\n/members\n/help\n/exit\nnot said\n"
    result = run("chat", "--seed", 1, "--max-tokens", 6, stdin=script)
    assert result.exit_code == 0
    content = json.loads(saved.read_text())
    assert [m["role"] for m in content["messages"]] == ["user", "assistant"] * 2
    assert [m["content"] for m in content["messages"][::2]] == ["Hello", "Again"]
    assert result.stdout.startswith(content["messages"][1]["content"] + "\n" + content["messages"][3]["content"] + "\n")
    assert "\x1b" not in result.stdout + result.stderr
    for part in ("■ bpe_a 1.00  ■ spm 0.00", "ce: ", "Loaded 4 messages", "strategy = ce", "/retry", "prompt new"):
        assert part in result.stderr
    assert "seed 4" in result.stderr  # the fourth reply


def test_a_chat_by_words(run: Run) -> None:
    script = "Hello\n/unit token\nAgain\n/set unit word\n/unit\n"
    result = run("chat", "--unit", "word", "--seed", 1, "--max-tokens", 20, stdin=script)
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert "ME draws one member for each word. /help lists the commands." in lines
    figures = [line for line in lines if line.startswith("me")]
    assert figures[0].startswith("me by words: ")
    assert "calls/piece" in figures[0]
    assert figures[1].startswith("me: ")
    assert "calls/piece" not in figures[1]
    assert lines[-1] == "unit = word"


def test_a_bad_command_in_a_scripted_chat_keeps_what_was_written(run: Run) -> None:
    result = run("chat", "--seed", 1, "--max-tokens", 6, stdin="Hello\n/set temperature hot\nAgain\n")
    one_line(result, 2, "/set temperature: must be a number")
    assert result.stdout.count("\n") >= 1


@pytest.mark.parametrize("command", [[], ["chat"], ["generate"], ["inspect"]])
def test_help(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_the_log_of_llama_cpp_comes_with_v(run: Run, write_models: WriteModels) -> None:
    arguments = ["generate", "--models", str(write_models("bpe_a")), "x", "--max-tokens", "1"]
    assert "llama_model_loader" not in CliRunner().invoke(main, arguments).stderr
    assert "INFO llama_model_loader" in CliRunner().invoke(main, ["-v", *arguments]).stderr


@pytest.mark.parametrize(
    "content", [b"precious notes, one line", b"notes\n", b'{"id": 1}\nnotes', b'{"prompt": "x"}\n']
)
def test_resuming_leaves_a_file_alone_that_is_not_its_own(run: Run, tmp_path: Path, content: bytes) -> None:
    source, output = jsonl(tmp_path / "in.jsonl", {"prompt": "x"}), tmp_path / "notes.txt"
    output.write_bytes(content)
    one_line(run("generate", "--input", source, "--output", output, "--resume"), 2, "not a record of an earlier run")
    assert output.read_bytes() == content


def test_the_prompts_are_never_overwritten(run: Run, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "x"})
    before = source.read_bytes()
    one_line(run("generate", "--input", source, "--output", source, "--resume"), 2, "the same file as --input")
    assert source.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ range(9999999) }}",
        "{{ strftime_now(3) }}",
        '{% include "x" %}',
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ namespace()|tojson }}",
        "",
    ],
)
def test_a_template_that_fails_is_one_line(run: Run, write_models: WriteModels, tmp_path: Path, template: str) -> None:
    (tmp_path / "own.jinja").write_text(template)
    models = write_models("bpe_a", member='chat_template = "./own.jinja"')
    one_line(run("generate", "x", "--max-tokens", 1, models=models), 2)


def test_a_saved_chat_that_cannot_be(run: Run, tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    for command in (f"/load {deep}", "/save ~nobody-here/x", f"/save {tmp_path}/no/x", "/save", "/load"):
        one_line(run("chat", stdin=command + "\n"), 2, command.split()[0])


def test_an_empty_conversation_takes_the_place_of_no_file(run: Run, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    one_line(run("chat", "--max-tokens", 2, stdin=f"Hi\n/save {saved}\n/clear\n/save {saved}\n"), 2, "/save: the conv")
    assert [message["role"] for message in json.loads(saved.read_text())["messages"]] == ["user", "assistant"]


def test_replies_reach_a_pipe_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from me_local.cli.display import Painter, make_console
    from me_local.cli.streams import printable

    Painter(make_console(), ["a"]).write("a\tb\r\nc\x07", "a")
    assert capsys.readouterr().out == "a\tb\r\nc\x07"
    assert printable("a\tb\r\nc\x1b[31m") == "a\tb\nc\ufffd[31m"
