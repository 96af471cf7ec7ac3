"""Thoughts in the commands: what is printed of them, what is kept, and what switches them on and off."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import Run, jsonl, one_line, records
from rich.console import Console
from terminals import ask, spawn
from thinkers import CLOSES, OPENS, write_thinkers

from me_local import Overrides, load
from me_local.cli.thoughts import ThoughtView
from me_local.decoding.reply import Reply

SEED = 16  # by which a thought ends, and an answer follows
LENGTH = 20


@pytest.fixture(scope="module")
def thinker(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_thinkers(tmp_path_factory.mktemp("thinker"), tiny)


@pytest.fixture(scope="module")
def made(thinker: Path) -> Reply:
    with load(thinker) as ensemble:
        reply = ensemble.generate("Hi", Overrides(seed=SEED, max_tokens=LENGTH))
    assert reply.thought
    assert reply.answer
    return reply


def test_generate_prints_the_answer(run: Run, thinker: Path, made: Reply) -> None:
    result = run("generate", "Hi", "--seed", SEED, "--max-tokens", LENGTH, models=thinker)
    assert result.stdout.removesuffix("\n") == made.answer.removesuffix("\n")
    assert "thought" not in result.stderr
    told = json.loads(run("generate", "Hi", "--seed", SEED, "--max-tokens", LENGTH, "--json", models=thinker).stdout)
    assert (told["text"], told["thought"], told["answer"]) == (made.text, made.thought, made.answer)


@pytest.mark.parametrize("options", [(), ("-n", 2, "--batch", 2)])
def test_a_reply_without_an_answer_says_why(run: Run, thinker: Path, options: tuple[object, ...]) -> None:
    result = run("generate", "Hi", "--seed", SEED, "--max-tokens", 1, *options, models=thinker)
    assert result.stdout.strip() == ""
    assert "the reply ended inside its thought: raise --max-tokens" in result.stderr


def test_records_have_both(run: Run, thinker: Path, made: Reply, tmp_path: Path) -> None:
    hm = {"role": "assistant", "content": "It", "reasoning_content": "hm"}
    user = {"role": "user", "content": "Hi"}
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "Hi", "seed": SEED}, {"messages": [user, hm, user], "seed": 1})
    output = tmp_path / "out.jsonl"
    result = run("generate", "--input", source, "--output", output, "--max-tokens", LENGTH, models=thinker)
    assert result.exit_code == 0, result.output
    first, second = records(output)
    assert (first["thought"], first["answer"]) == (made.thought, made.answer)
    assert second["usage"]["members"][0]["prompt_length"] > first["usage"]["members"][0]["prompt_length"] + 10


def test_arguments_of_templates(run: Run, thinker: Path) -> None:
    def lengths(*options: object, **kwargs: Any) -> tuple[int, str]:
        result = run("generate", "Hi", "--seed", 1, "--max-tokens", 5, "--json", *options, models=thinker, **kwargs)
        told = json.loads(result.stdout)
        return told["usage"]["members"][0]["prompt_length"], told["thought"]

    plain, thought = lengths()
    assert thought
    assert lengths("--template-arg", "enable_thinking=false") == lengths(
        env={"ME_LOCAL_TEMPLATE_ARG": "enable_thinking=false"}
    )
    assert lengths("--template-arg", "enable_thinking=false")[1] == ""
    both = lengths("--template-arg", "enable_thinking=false", "--template-arg", "reasoning_effort=high")
    assert both[0] > plain
    assert lengths("--template-arg", 'reasoning_effort="high"') == lengths("--template-arg", "reasoning_effort=high")
    assert lengths("--template-arg", "enable_thinking=False") == (plain, thought)  # a text, which is true


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("enable_thinking", "--template-arg: must look like NAME=VALUE"),
        ("=1", "--template-arg: must look like NAME=VALUE"),
        ("messages=[]", "--template-arg: must leave out messages"),
    ],
)
def test_arguments_that_are_none(run: Run, given: str, words: str) -> None:
    one_line(run("generate", "Hi", "--template-arg", given), 2, words)


def test_a_chat_without_a_terminal(run: Run, thinker: Path, made: Reply, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    script = f"Hi\n/thought\n/save {saved}\n/clear\n/thought\n/load {saved}\n/thought\n"
    script += "/set template_args enable_thinking=false\nHi\n/set template_args enable_thinking\n"
    result = run("chat", "--seed", SEED, "--max-tokens", LENGTH, models=thinker, stdin=script)
    one_line(result, 2, "/set template_args: must look like NAME=VALUE")
    assert result.stdout.startswith(f"[thought]\n{made.thought}\n[answer]\n{made.answer}\n")
    assert result.stdout.count("[thought]") == 1
    assert result.stderr.count(made.thought) == 2
    assert result.stderr.count("The last reply has no thought.") == 1
    message = json.loads(saved.read_text())["messages"][1]
    assert message == {"role": "assistant", "content": made.answer, "reasoning_content": made.thought}


def test_a_chat_that_was_cut_in_its_thought(run: Run, thinker: Path) -> None:
    result = run("chat", "--seed", SEED, "--max-tokens", 2, models=thinker, stdin="Hi\n")
    assert re.fullmatch(r"\[thought\]\n.+\n\[answer\]\n\n", result.stdout, re.DOTALL)
    assert "Note: the reply ended inside its thought: /set max_tokens lets it be longer" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_a_thought_is_folded_on_a_terminal(thinker: Path, made: Reply, tmp_path: Path, env: dict[str, str]) -> None:
    options = ["--models", str(thinker), "--seed", str(SEED), "--max-tokens", str(LENGTH)]
    child = spawn(["chat", *options], tmp_path, **env)
    try:
        child.expect("lists the commands")
        ask(child, "Hi")
        if env:
            child.expect_exact("[thought]")
            child.expect_exact("[answer]")
        else:
            child.expect(r"\x1b\[2m.*\r\x1b\[J\x1b\[2mthought, (\d+) pieces; /thought shows it")
            assert int(child.match[1]) == made.thought_pieces
        child.expect(f"{LENGTH} pieces")
        ask(child, "/thought")
        child.expect_exact(made.thought.split()[0])
    finally:
        child.close(force=True)


def view(**fields: Any) -> tuple[ThoughtView, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=10, height=5, **fields)
    return ThoughtView(console), file


@pytest.mark.parametrize(
    ("texts", "rows"),
    [
        (["short"], 0),
        (["0123456789"], 0),  # the cursor waits at the end of the line
        (["0123456789", "0"], 1),
        (["0123456789\n"], 1),
        (["a\nb\n", "c"], 2),
        (["日本語日本語"], 1),
        (["012345678日"], 1),  # which does not fit behind nine columns
        (["a\tb\t"], 0),
        (["a\n" * 100], 4),  # what was scrolled away cannot be taken back
    ],
)
def test_what_was_shown_is_erased(texts: list[str], rows: int) -> None:
    thought, file = view(force_terminal=True, color_system="standard")
    for text in texts:
        thought.write(text)
    shown = file.getvalue()
    thought.fold(3)
    up = f"\x1b[{rows}A" if rows else ""
    assert file.getvalue() == f"{shown}\r{up}\x1b[J\x1b[2mthought, 3 pieces; /thought shows it\x1b[0m\n"
    thought.fold(3)
    assert file.getvalue().count("pieces") == 1


def test_a_thought_moves_no_cursor() -> None:
    thought, file = view(force_terminal=True, color_system="standard")
    thought.write("a\x1b[2Jb\r")
    assert file.getvalue() == "\x1b[2ma�[2Jb�\x1b[0m"


def test_without_a_terminal_nothing_is_erased() -> None:
    thought, file = view()
    thought.fold(0)
    assert file.getvalue() == ""
    thought.write("a\x1b")
    thought.write("b")
    thought.fold(3)
    assert file.getvalue() == "[thought]\na\x1bb\n[answer]\n"


def test_inspect_says_who_thinks(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    models = write_thinkers(tmp_path, tiny, "bpe_a")
    result = run("inspect", models=models)
    rows = [line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith(("  thinks", "  writes"))]
    assert [name for name, _ in rows] == ["thinks", "writes"] * 2
    assert [value.rstrip() for _, value in rows] == [f"{OPENS} … {CLOSES}", f"{OPENS}  {CLOSES}", "-", "-"]
    told = json.loads(run("inspect", "--json", models=models).stdout)["members"]
    assert [member["thinks"] for member in told] == [[[OPENS, CLOSES]], []]
    assert [member["writes"] for member in told] == [[OPENS, CLOSES], []]
