"""Tasks of one's own: what is asked, which answers are found and right, and what each wrong file comes to."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import one_line
from conftest import ROOT

from me_local import ConfigError, InputError
from me_local.cli.program import main
from me_local.evaluation.tasks import Task, find_tasks, own, read_questions
from me_local.evaluation.tasks.judging import Rule, parse_rule
from me_local.evaluation.tasks.own import read_task
from me_local.text.messages import Message

PLAIN = 'questions = "q.jsonl"\nprompt = "What is {x}?"\n'
ROWS = '{"x": "one", "answer": "1"}\n{"x": "two", "answer": "2"}\n'
WriteTask = Callable[..., Path]


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    def write(text: str = PLAIN, rows: str | bytes = ROWS, name: str = "q.jsonl") -> Path:
        (tmp_path / name).write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return write


def asked(task: Task) -> list[tuple[Message, ...]]:
    return [task.messages(question) for question in read_questions(task, Path())]


def test_a_file_without_more_than_it_needs(write_task: WriteTask) -> None:
    task = read_task(write_task())
    assert task.name == "mine"
    first, second = read_questions(task, Path("anywhere"))
    assert (first.id, first.answer, second.id, second.answer) == ("1", "1", "2", "2")
    assert asked(task) == [(Message("user", "What is one?"),), (Message("user", "What is two?"),)]
    assert task.own is not None
    assert (task.own.max_tokens, task.own.stop) == (None, None)
    assert task.correct(first, " 1 \n")
    assert not task.correct(first, "It is 1")
    assert not task.correct(first, "  ")


def test_a_file_with_everything(write_task: WriteTask) -> None:
    text = (
        'questions = "q.csv"\nsystem = "Be short."\nmax_tokens = 7\nstop = "END"\n'
        'prompt = """{{ {Question} }} {points}\n{Question}"""\n'
        '[answer]\nfield = "right"\nfind = "number"\n'
        '[[examples]]\nQuestion = "Half?"\npoints = 1.5\nreply = "It is 0.5"\n'
        '[[examples]]\nQuestion = "All?"\npoints = true\nright = 1\n'
    )
    task = read_task(
        write_task(text, '\ufeffid,Question,points,right\r\na,"Why,\r\n{x}?",2,"1,000"\r\n\r\nb,Wo?,3,-2\r\n', "q.csv")
    )
    first, second = read_questions(task, Path())
    assert (first.id, first.answer, second.id, second.answer) == ("a", "1000", "b", "-2")
    assert task.messages(first) == (
        Message("system", "Be short."),
        Message("user", "{ Half? } 1.5\nHalf?"),
        Message("assistant", "It is 0.5"),
        Message("user", "{ All? } true\nAll?"),
        Message("assistant", "1"),
        Message("user", "{ Why,\r\n{x}? } 2\nWhy,\r\n{x}?"),
    )
    assert task.own is not None
    assert (task.own.max_tokens, task.own.stop) == (7, ("END",))
    assert task.correct(first, "So it is 1000.00 in all.")


def test_choices_of_a_field_are_listed(write_task: WriteTask) -> None:
    text = 'questions = "q.jsonl"\nprompt = "{q}\\n{of}"\n[answer]\nfind = "letter"\nchoices = "of"\n'
    rows = '{"q": "Ice?", "of": ["hot", "cold"], "answer": "B"}\n{"q": "?", "of": [1, 2, 3], "answer": "C"}\n'
    task = read_task(write_task(text, rows))
    first, second = read_questions(task, Path())
    assert asked(task)[0] == (Message("user", "Ice?\n(A) hot\n(B) cold"),)
    assert task.extract(first, "Not A, but (B)") == "B"
    assert task.extract(first, "(C)") is None
    assert task.extract(second, "(C)") == "C"


@pytest.mark.parametrize(
    ("rule", "reply", "found"),
    [
        ({}, " Paris\n", "Paris"),
        ({"compare": "case-insensitive"}, "STRASSE", "strasse"),
        ({"compare": "case-insensitive"}, "Straße", "strasse"),
        ({"compare": "number"}, "1e3", "1000"),
        ({"find": "number"}, "First 3, then 4.50 apples", "4.5"),
        ({"find": "number"}, "None at all", None),
        ({"find": "letter", "choices": 4}, "I think (C).", "C"),
        ({"find": "letter", "choices": 2}, "I think (C).", None),
        ({"find": "regex", "pattern": r"Answer: *(\w+)"}, "Answer: no. Answer:  yes!", "yes"),
        ({"find": "regex", "pattern": r"Answer: *(\w+)"}, "yes", None),
        ({"find": "regex", "pattern": r"=(\S*)", "compare": "number"}, "x=3.0", "3"),
        ({"find": "regex", "pattern": r"=(\S*)", "compare": "number"}, "x=three", None),
        ({"find": "regex", "pattern": r"a|(b)"}, "b a", "b"),
        ({"find": "json", "key": "it"}, 'So {"it": "x"} or {"it": 2.50, "of": {"it": 1}} {"of": 1} {', "2.5"),
        ({"find": "json", "key": "it"}, '{"it": true}', "true"),
        ({"find": "json", "key": "it"}, '{"it": [1]}', None),
        ({"find": "json", "key": "it"}, '{ {"it": "in"', None),
        ({"find": "json", "key": "it"}, "it", None),
    ],
)
def test_answers_that_are_found(rule: dict[str, object], reply: str, found: str | None) -> None:
    made = parse_rule(rule, "[answer]")
    assert made.extract(reply, made.choices if isinstance(made.choices, int) else 0) == found


def test_numbers_within_a_tolerance_are_the_same(write_task: WriteTask) -> None:
    task = read_task(write_task(PLAIN + '[answer]\nfind = "number"\ntolerance = 0.1\n'))
    first = read_questions(task, Path())[0]
    assert [task.correct(first, reply) for reply in ("1", "1.1", "0.9", "1.11", "-1", "none")] == [True] * 3 + [
        False
    ] * 3
    exact = parse_rule({"find": "number"}, "[answer]")
    assert not exact.same("1", "1.0000001")


def test_what_is_asked_and_how_it_is_judged_makes_the_digest(write_task: WriteTask) -> None:
    def digest(text: str = PLAIN, rows: str = ROWS) -> str:
        own = read_task(write_task(text, rows)).own
        assert own is not None
        return own.digest

    assert digest("# a comment\n" + PLAIN, ROWS.replace("one", "on\\u0065")) == digest()
    changed = [
        digest(PLAIN.replace("What", "Who")),
        digest(PLAIN + "max_tokens = 3\n"),
        digest(PLAIN + 'system = "Hm"\n'),
        digest(PLAIN + '[answer]\nfind = "number"\n'),
        digest(PLAIN + '[[examples]]\nx = "no"\nreply = "0"\n'),
        digest(rows=ROWS.replace("two", "tow")),
        digest(rows=ROWS.replace('"2"', '"3"')),
    ]
    assert len({*changed, digest()}) == 8


ANSWER = PLAIN + "[answer]\n"
LETTER = ANSWER + 'find = "letter"\n'
FIELD = 'questions = "q.jsonl"\nprompt = "{of}"\n[answer]\nfind = "letter"\nchoices = "of"\n'
WRONG_FILES = [
    ("prompt = ", "mine.toml: not valid TOML"),
    (PLAIN + 'promt = "x"', 'mine.toml: promt: unknown key; did you mean "prompt"?'),
    ('prompt = "{x}"', "mine.toml: questions: is missing"),
    ('questions = "q.jsonl"', "mine.toml: prompt: is missing"),
    ('questions = 1\nprompt = "{x}"', "mine.toml: questions: must be a string, got 1"),
    ('questions = "q.jsonl"\nprompt = ""', 'mine.toml: prompt: must not be empty, got ""'),
    ('questions = "q.jsonl"\nprompt = "Hello"', "mine.toml: prompt: names no field of the questions"),
    (
        'questions = "q.jsonl"\nprompt = "a\\n{x"',
        'mine.toml: prompt: "{" in line 2 of it is no part of a {field}: write {{',
    ),
    ('questions = "q.jsonl"\nprompt = "{x}}"', 'prompt: "}" in line 1 of it'),
    ('questions = "q.jsonl"\nprompt = "{y}"', 'q.jsonl, line 1: "y" is missing; there are x, answer'),
    ('questions = "none.csv"\nprompt = "{x}"', "none.csv: cannot be read: No such file"),
    ('questions = "q.txt"\nprompt = "{x}"', "q.txt: questions are a .jsonl or a .csv file"),
    ('questions = "\\u0000.csv"\nprompt = "{x}"', "cannot be read: embedded null"),
    (PLAIN + "max_tokens = 0", "mine.toml: max_tokens: must be at least 1, got 0"),
    (PLAIN + "max_tokens = true", "mine.toml: max_tokens: must be an integer, got true"),
    (PLAIN + 'stop = ["a", ""]', "mine.toml: stop[1]: must not be empty"),
    (PLAIN + "stop = 1", "mine.toml: stop: must be a list, got 1"),
    (PLAIN + 'answer = "x"', 'mine.toml: answer: must be a table, got "x"'),
    (PLAIN + '[examples]\nx = "a"', "mine.toml: examples: must be a list, got"),
    (PLAIN + '[[examples]]\nx = "a"', 'mine.toml: examples[0]: "answer" is missing; there are x'),
    (PLAIN + '[[examples]]\nreply = "a"', 'mine.toml: examples[0]: "x" is missing'),
    (PLAIN + '[[examples]]\nx = "a"\nreply = " "', "mine.toml: examples[0]: its reply is blank"),
    (PLAIN + '[[examples]]\nx = 2026-01-01\nreply = "a"', "examples[0]: x: must be a text, a number, true or false"),
    (
        ANSWER + 'find = "box"',
        'mine.toml: [answer].find: must be "text", "number", "letter", "regex" or "json", got "box"',
    ),
    (ANSWER + 'fnd = "text"', 'mine.toml: [answer].fnd: unknown key; did you mean "find"?'),
    (ANSWER + 'field = "solution"', 'q.jsonl, line 1: "solution" is missing; there are x, answer'),
    (ANSWER + 'find = "regex"', '[answer].pattern: is missing, which find = "regex" needs'),
    (ANSWER + 'pattern = "(a)"', '[answer].pattern: goes with find = "regex"'),
    (ANSWER + 'find = "regex"\npattern = "(a"', "[answer].pattern: not a regular expression: missing )"),
    (ANSWER + 'find = "regex"\npattern = "a"', "[answer].pattern: must have one group, (…), for the answer, and has 0"),
    (ANSWER + 'find = "json"', '[answer].key: is missing, which find = "json" needs'),
    (LETTER, '[answer].choices: is missing, which find = "letter" needs'),
    (LETTER + "choices = 27", "[answer].choices: must be their number, 2 to 26, or the name of the field"),
    (LETTER + "choices = true", "[answer].choices: must be their number"),
    (LETTER + "choices = 4", 'q.jsonl, line 1: answer: must be a letter from A to D, got "1"'),
    (LETTER + 'choices = 4\ncompare = "number"', '[answer].compare: with find = "letter" it can only be "exact"'),
    (FIELD, "q.jsonl, line 1: of: must be a list of 2 to 26 texts"),
    (ANSWER + 'find = "number"\ncompare = "exact"', '[answer].compare: with find = "number" it can only be "number"'),
    (ANSWER + "tolerance = 0.1", '[answer].tolerance: goes with compare = "number"'),
    (ANSWER + 'find = "number"\ntolerance = -1.0', "[answer].tolerance: must be at least 0, got -1.0"),
    (ANSWER + 'find = "number"\nfield = "x"', 'q.jsonl, line 1: x: must be a number, got "one"'),
]


@pytest.mark.parametrize(("text", "part"), WRONG_FILES)
def test_a_wrong_file_is_one_line(write_task: WriteTask, text: str, part: str) -> None:
    """No model is looked for before the task is right."""
    path = write_task(text)
    (path.parent / "models.toml").write_text('[[members]]\nname = "a"\npath = "none.gguf"\n')
    arguments = ["eval", "--models", str(path.parent / "models.toml"), "--task", str(path)]
    one_line(CliRunner().invoke(main, arguments), 2, part)


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ("", "q.jsonl: there are no questions in it"),
        (" \n\n", "q.jsonl: there are no questions in it"),
        (ROWS + "{", "q.jsonl, line 3: not JSON"),
        (ROWS + "[1]", "q.jsonl, line 3: must be an object"),
        (b"\n\xff\n", "q.jsonl, line 2: not UTF-8 at byte 1"),
        ('{"x": "a", "answer": " "}', 'q.jsonl, line 1: answer: is blank, got ""'),
        ('{"x": "a", "answer": null}', "q.jsonl, line 1: answer: must be a text, a number, true or false"),
        ('{"x": ["a"], "answer": 1}', "q.jsonl, line 1: x: must be a text, a number, true or false"),
        ('{"x": "\\ud800", "answer": 1}', "q.jsonl, line 1: x: half a surrogate pair"),
        ('{"id": " ", "x": "a", "answer": 1}', "q.jsonl, line 1: id: is blank"),
        ('{"id": 7, "x": "a", "answer": 1}\n' * 2, 'q.jsonl, line 2: id: "7" stands on an earlier line too'),
        ("{}", 'q.jsonl, line 1: "answer" is missing; there are no fields'),
    ],
)
def test_wrong_questions_name_their_line(write_task: WriteTask, rows: str | bytes, part: str) -> None:
    with pytest.raises(InputError) as caught:
        read_task(write_task(rows=rows))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ("x,answer\n", "q.csv: there are no questions in it"),
        ("x,\na,1\n", "q.csv, line 1: the first line names the fields, each once"),
        ("x,x\na,1\n", "q.csv, line 1: the first line names the fields, each once"),
        ('x,answer\n"a\nb",1\n\nc\n', "q.csv, line 5: 1 fields, but the first line names 2"),
        ('x,answer\na,1\n"b,2\n', "q.csv, line 3: not CSV"),
        (b"x,answer\na,1\n\xe4,2\n", "q.csv, line 3: not UTF-8 (byte 0xe4)"),
    ],
)
def test_wrong_csv_names_its_line(write_task: WriteTask, rows: str | bytes, part: str) -> None:
    with pytest.raises(InputError) as caught:
        read_task(write_task(PLAIN.replace("jsonl", "csv"), rows, "q.csv"))
    assert part in str(caught.value)


def test_a_prompt_that_comes_out_blank(write_task: WriteTask) -> None:
    with pytest.raises(InputError, match="line 1: the prompt is blank"):
        read_task(write_task(PLAIN.replace("What is {x}?", "{x}"), '{"x": "", "answer": 1}'))


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    for name, kind in (("capitals.toml", "toml"), ("capitals.csv", "csv")):
        block = re.search(rf"^```{kind}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        assert block is not None
        (tmp_path / name).write_text(block[1], "utf-8")
    task = read_task(tmp_path / "capitals.toml")
    france, _, argentina = read_questions(task, Path())
    assert [message.content for message in task.messages(france)] == [
        "What is the capital of Portugal? Answer with its name alone.",
        "Lisbon",
        "What is the capital of France? Answer with its name alone.",
    ]
    assert task.correct(france, "It is\nParis.\n")
    assert task.correct(argentina, "buenos aires")
    assert not task.correct(france, "It is Paris")


def test_each_key_has_a_row_in_the_documentation() -> None:
    section = (ROOT / "docs" / "evaluation.md").read_text("utf-8").partition("## Your own questions")[2]
    table = "".join(re.findall(r"^\|.*\|$", section, re.MULTILINE))
    keys = {*own.KEYS, *Rule.__dataclass_fields__}
    assert {key for key in keys if f"`{key}`" not in table and f"[{key}]" not in table} == set()


def test_a_list_of_tasks_with_files(write_task: WriteTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_task()
    assert [task.name for task in find_tasks(f"arc, {path},{path}")] == ["arc_challenge", "arc_easy", "mine"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_tasks("~/mine.toml")[0].name == "mine"
    (tmp_path / "gsm8k.toml").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r'gsm8k.toml: there is a task "gsm8k" already: give the file another name'):
        find_tasks(str(tmp_path / "gsm8k.toml"))
    with pytest.raises(ConfigError, match=r"none.toml: cannot be read"):
        find_tasks(str(tmp_path / "none.toml"))
