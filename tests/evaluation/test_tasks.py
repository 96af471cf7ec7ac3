"""Tasks of an evaluation: reading their data, their prompts, and the answers that replies give."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_local.errors import InputError
from me_local.evaluation.tasks import TASKS, Question, Scoring, find_tasks, read_questions
from me_local.evaluation.tasks.answers import boxed, letter, number, plain, word

GSM8K = {"id": "g1", "question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
MMLU = {"id": "m1", "subject": "high_school_physics", "question": "Up? ", "choices": ["a", "b", "c", "d"], "answer": 2}
BBH = {"id": "b1", "task": "navigate", "input": "Do you return?\nOptions:\n- Yes\n- No", "target": "No"}
ARC = {"id": "a1", "question": "Ice is", "choices": ["hot", "so cold"], "labels": ["A", "B"], "answer": "B"}
ROWS = {"gsm8k": GSM8K, "mmlu": MMLU, "bbh": BBH, "arc_challenge": ARC, "arc_easy": ARC}
STEPS = "Reason step by step, then put the final answer"
LETTER = "(the letter of your choice, such as (A), (B) or (C))"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the data, of rows or of bytes, and returns the folder."""

    def write_file(name: str, *rows: dict[str, Any], content: bytes | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(lines.encode() if content is None else content)
        return tmp_path

    return write_file


def bbh(target: str, text: str = "Q") -> Question:
    return Question("b", text, target, "some_task")


def contents(task: str, question: Question) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in TASKS[task].messages(question)]


# Boxes


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("so \\boxed{18}.", "18"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} it is", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\text{(C)}}", "\\text{(C)}"),
        ("$$\\boxed{ x \\} y }$$", "x \\} y"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed {7}", "7"),
        ("boxed{7}", "7"),
        ("\\boxed{7} which I put into \\boxed{}.", "7"),
        ("\\boxed{7} or rather \\boxed{8", "7"),
        ("\\boxed{a\\\\}", "a\\\\"),
        ("\\boxed{}", None),
        ("7", None),
    ],
)
def test_the_last_box_that_is_closed_and_not_blank(reply: str, expected: str | None) -> None:
    assert boxed(reply) == expected


# Letters


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("\\boxed{C}", "C"),
        ("\\boxed{(C)}", "C"),
        ("\\boxed{\\text{C}}", "C"),
        ("\\boxed{\\textbf{(C)}}", "C"),
        ("\\boxed{\\left(C\\right)}", "C"),
        ("\\boxed{C. A dog}", "C"),
        ("\\boxed{\\text{C) A dog}}", "C"),
        ("\\boxed{dog A or C}", "C"),
        ("\\boxed{(C) A dog}", "C"),
        ("\\boxed{C}. Not (A).", "C"),
        ("The answer is (C).", "C"),
        ("(A) is wrong, so it must be (C)", "C"),
        ("(C), because A and B are wrong", "C"),
        ("The answer is C.", "C"),
        ("**C**", "C"),
        ("_C_", "C"),
        ("C) dogs", "C"),
        ("I think E, that is (F), but B", "B"),
        ("CAB", None),
        ("C3", None),
        ("c", None),
        ("", None),
        ("\\boxed{dogs} (A)", "dogs"),
        ("\\boxed{} (A)", "A"),
    ],
)
def test_letters(reply: str, expected: str | None) -> None:
    assert letter(reply, 4) == expected


def test_a_letter_is_one_of_the_choices_that_there_are() -> None:
    assert [letter("(A) (B) (C) (D) (E)", count) for count in (2, 3, 5, 26)] == ["B", "C", "E", "E"]


# Numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", "18"),
        ("It is 18.", "18"),
        ("16 - 3 - 4 = 9 eggs", "9"),
        ("\\boxed{\\$18}", "18"),
        ("$18.00", "18"),
        ("12.0", "12"),
        ("12.50 dollars", "12.5"),
        ("007", "7"),
        ("0.0", "0"),
        ("-0", "0"),
        (".5", "0.5"),
        ("1,234", "1234"),
        ("1,234,567.", "1234567"),
        ("1{,}234", "1234"),
        ("1,\\!234", "1234"),
        ("12\\,000", "12000"),
        ("1\u202f234\u00a0567", "1234567"),
        ("2, 3", "3"),
        ("25%", "25"),
        ("$25\\%$", "25"),
        ("= -33", "-33"),
        ("\\boxed{-33}", "-33"),
        ("\u221233", "-33"),
        ("\u201333", "-33"),
        ("-$5", "-5"),
        ("$-5$", "-5"),
        ("-\u20ac5.10", "-5.1"),
        ("10-12", "12"),
        ("5-3", "3"),
        ("(5)-3", "3"),
        ("x-3", "3"),
        ("- 5 apples", "5"),
        ("\u0663", None),
        ("none", None),
        ("", None),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_numbers(text: str, expected: str | None) -> None:
    assert number(text) == expected


# Words and texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "Yes"),
        ("Yes. No", "No"),
        ("The answer is Yes, there is no other.", "Yes"),
        ("so it is no.", "No"),
        ("\\text{NO}", "No"),
        ("**Yes**", "Yes"),
        ("Yesterday, nothing", None),
    ],
)
def test_words(text: str, expected: str | None) -> None:
    assert word(text, ("Yes", "No")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\text{oven pan}", "oven pan"),
        ("\\textbf{\\mathrm{oven}}", "oven"),
        ("\\text{oven} \\text{pan}", "oven pan"),
        (" oven \n  pan. ", "oven pan"),
        ("$] \\} >$", "] } >"),
        ("]\\ )", "] )"),
        ("it\\&t", "it&t"),
        ("", ""),
    ],
)
def test_plain_texts(text: str, expected: str) -> None:
    assert plain(text) == expected


@pytest.mark.parametrize(
    ("target", "reply", "expected"),
    [
        ("True", "\\boxed{true}", "True"),
        ("True", "not ( True ) is False, so True", "True"),
        ("yes", "Yes.", "yes"),
        ("invalid", "The argument is \\boxed{\\text{Invalid}}.", "invalid"),
        ("invalid", "invalid, and not valid", "valid"),
        ("valid", "invalid", "invalid"),
        ("valid", "\\boxed{sound}", "sound"),
        ("valid", "sound", None),
        ("-33", "(1 - 34) = -33", "-33"),
        ("-33", "Step 1: \\boxed{-33} in 2 steps", "-33"),
        ("-33", "\\boxed{minus one}", "minus one"),
        ("24", "24.0", "24"),
        ("oven pan", "First pan 1, so \\boxed{\\text{oven pan}}.", "oven pan"),
        ("oven pan", "oven pan", "oven pan"),
        ("oven pan", "the answer is oven pan", "the answer is oven pan"),
        ("oven pan", " ", None),
        ("] }", "\\boxed{] }}", "] }"),
        ("}", "\\boxed{}}", "}"),
        ("} ]", "so $\\boxed{\\} ]}$.", "} ]"),
        ("] )", "\\boxed{\\text{] )}}", "] )"),
    ],
)
def test_answers_by_the_form_of_the_target(target: str, reply: str, expected: str | None) -> None:
    task, question = TASKS["bbh"], bbh(target)
    assert task.extract(question, reply) == expected
    assert task.correct(question, reply) == (target == expected)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("2,125 eggs", True),
        ("\\boxed{2125.00}", True),
        ("$2{,}125$", True),
        ("### 2\nso 2125", True),
        ("2125.4", False),
        ("-2125", False),
        ("2125, for 3 people", False),
        ("many", False),
    ],
)
def test_gsm8k_counts_the_last_number(write: Write, reply: str, right: bool) -> None:
    (question,) = read_questions(TASKS["gsm8k"], write("gsm8k_test.jsonl", {**GSM8K, "answer": "x\n#### 2,125"}))
    assert question.answer == "2125"
    assert TASKS["gsm8k"].correct(question, reply) == right


@given(st.text(alphabet="\\boxed{}()[]ABC text.,-\u2212$#019 \n\u00a0", max_size=60))
def test_any_reply_can_be_judged(reply: str) -> None:
    for target in ("Yes", "-33", "oven pan", "} ]"):
        assert TASKS["bbh"].extract(bbh(target), reply) != ""
    assert letter(reply, 4) != ""
    found = number(reply)
    assert found is None or number(found) == found


# Reading and prompts


def test_gsm8k(write: Write) -> None:
    folder = write(
        "gsm8k_test.jsonl", GSM8K, {**GSM8K, "id": "g2", "question": "Ten less twelve?", "answer": "#### -2"}
    )
    write("gsm8k_fewshot.jsonl", {"id": "e", "question": "One and one?", "answer": "1 + 1 = 2. The answer is 2."})
    first, second = read_questions(TASKS["gsm8k"], folder)
    assert (first.id, first.answer, second.id, second.answer) == ("g1", "4", "g2", "-2")
    asked = f"{STEPS} into \\boxed{{}}.\n\n"
    assert contents("gsm8k", first) == [("user", f"{asked}Two and two?")]
    shown, _ = read_questions(TASKS["gsm8k"], folder, few_shot=True)
    assert contents("gsm8k", shown) == [
        ("user", f"{asked}One and one?"),
        ("assistant", "1 + 1 = 2. The answer is \\boxed{2}."),
        ("user", f"{asked}Two and two?"),
    ]
    assert TASKS["gsm8k"].scoring is None


def test_mmlu(write: Write) -> None:
    folder = write("mmlu_test.jsonl", MMLU)
    others = [{**MMLU, "id": f"d{i}", "question": f"Example {i}", "answer": i % 4} for i in range(7)]
    write("mmlu_dev.jsonl", {**MMLU, "id": "o", "subject": "anatomy", "question": "Other"}, *others)
    task = TASKS["mmlu"]
    (question,) = read_questions(task, folder)
    assert (question.answer, question.group, question.choices) == ("C", "high_school_physics", ("a", "b", "c", "d"))
    listed = "Options:\n(A) a\n(B) b\n(C) c\n(D) d"
    assert contents("mmlu", question) == [("user", f"{STEPS} {LETTER} into \\boxed{{}}.\n\nUp? \n{listed}")]
    assert task.correct(question, "(B), no, \\boxed{\\text{(C)}}")
    assert not task.correct(question, "(B)")

    (shown,) = read_questions(task, folder, few_shot=True)
    turns = contents("mmlu", shown)
    assert [content for role, content in turns if role == "assistant"] == [f"\\boxed{{({x})}}" for x in "ABCDA"]
    direct = f"Put the final answer {LETTER} into \\boxed{{}}.\n\n"
    assert turns[0] == ("user", f"{direct}Example 0\n{listed}")
    assert turns[-1] == ("user", f"{direct}Up? \n{listed}")


def test_mmlu_by_likelihood(write: Write) -> None:
    folder = write("mmlu_test.jsonl", MMLU)
    write("mmlu_dev.jsonl", {**MMLU, "question": "Down?", "answer": 1})
    scoring = TASKS["mmlu"].scoring
    assert scoring is not None
    (question,) = read_questions(TASKS["mmlu"], folder)
    header = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    lines = "A. a\nB. b\nC. c\nD. d\nAnswer:"
    assert scoring(question) == Scoring(f"{header}Up?\n{lines}", (" A", " B", " C", " D"))
    (shown,) = read_questions(TASKS["mmlu"], folder, few_shot=True)
    assert scoring(shown).prompt == f"{header}Down?\n{lines} B\n\nUp?\n{lines}"


@pytest.mark.parametrize("name", ["arc_challenge", "arc_easy"])
def test_arc(write: Write, name: str) -> None:
    numbered = {**ARC, "id": "a2", "choices": ["x", "y", "z"], "labels": ["1", "2", "3"], "answer": "3"}
    folder = write(f"{name}_test.jsonl", ARC, numbered)
    write(f"{name}_train.jsonl", *({**ARC, "id": f"e{i}", "question": f"Example {i}"} for i in range(6)))
    task = TASKS[name]
    first, second = read_questions(task, folder)
    assert (first.answer, second.answer) == ("B", "C")
    listed = "Options:\n(A) x\n(B) y\n(C) z"
    assert contents(name, second) == [("user", f"{STEPS} {LETTER} into \\boxed{{}}.\n\nIce is\n{listed}")]
    assert task.correct(second, "It is (C).")
    assert task.extract(first, "It is (C), not B.") == "B"  # it has two choices

    assert task.scoring is not None
    scored = Scoring("Question: Ice is\nAnswer:", (" hot", " so cold"))
    assert task.scoring(first) == scored
    shown, _ = read_questions(task, folder, few_shot=True)
    assert [e.id for e in shown.examples] == ["e0", "e1", "e2", "e3", "e4"]
    assert contents(name, shown)[1] == ("assistant", "\\boxed{(B)}")
    expected = "".join(f"Question: Example {i}\nAnswer: so cold\n\n" for i in range(5)) + scored.prompt
    assert task.scoring(shown) == replace(scored, prompt=expected)


def test_the_likeliest_choice_and_that_per_character() -> None:
    scoring = Scoring("Ice is", (" hot", " so cold", " red"))
    # Per character: -6/3 = -2, -7/7 = -1, -6/3 = -2.
    assert scoring.best([-6.0, -7.0, -6.0]) == "A"
    assert scoring.best([-6.0, -7.0, -6.0], normalised=True) == "B"
    assert scoring.best([float("-inf"), -7.0, -6.5]) == "C"


COT = """A notice.
-----
Sort things.

It matters how.

Q: Which?
Options:
(A) x
(B) y
A: Let's see.
It is y. So the answer is (B).

Q: Close: { [
A: So the answer is ] }."""


def test_bbh(write: Write) -> None:
    text = "Pick:\nOptions:\n(A) x\n(B) y\n(C) z"
    folder = write("bbh.jsonl", BBH, {"id": "b2", "task": "sorting", "input": text, "target": "(C)"})
    first, second = read_questions(TASKS["bbh"], folder)
    assert (first.answer, first.choices, first.group) == ("No", (), "navigate")
    assert (second.answer, second.choices, second.group) == ("C", ("x", "y", "z"), "sorting")
    assert contents("bbh", first) == [("user", f"{BBH['input']}\n{STEPS} (Yes or No) into \\boxed{{}}.")]
    assert contents("bbh", second) == [("user", f"{text}\n{STEPS} {LETTER} into \\boxed{{}}.")]
    assert contents("bbh", bbh("oven")) == [("user", f"Q\n{STEPS} into \\boxed{{}}.")]
    assert TASKS["bbh"].correct(second, "(A) or rather (C)")
    assert not TASKS["bbh"].correct(second, "Z")
    assert TASKS["bbh"].scoring is None


def test_bbh_with_examples(write: Write) -> None:
    folder = write("bbh.jsonl", {**BBH, "task": "sorting"})
    write("bbh_cot/sorting.txt", content=COT.encode())
    (question,) = read_questions(TASKS["bbh"], folder, few_shot=True)
    assert contents("bbh", question) == [
        (
            "user",
            f"Sort things.\n\nIt matters how.\n\nWhich?\nOptions:\n(A) x\n(B) y\n{STEPS} {LETTER} into \\boxed{{}}.",
        ),
        ("assistant", "Let's see.\nIt is y. So the answer is \\boxed{(B)}."),
        ("user", f"Close: {{ [\n{STEPS} into \\boxed{{}}."),
        ("assistant", "So the answer is \\boxed{] \\}}."),
        ("user", f"{BBH['input']}\n{STEPS} (Yes or No) into \\boxed{{}}."),
    ]
    assert all(TASKS["bbh"].correct(example, example.solution) for example in question.examples)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "sorting.txt: there are no examples"),
        (b"x\n-----\nSort.\n\nQ: a?\nB: b", 'sorting.txt, example 1: a line that begins with "A: " is missing'),
        (b"x\n-----\nSort.\n\nQ: a?\nA: b", 'sorting.txt, example 1: the solution must end with "The answer is'),
        (b"x\n-----\nSort.\n\nQ: a?\nA: The answer is (A).", 'sorting.txt, example 1: target: "(A)" must be one of'),
        (b"x\n-----\n\xff", "sorting.txt: cannot be read: it is not UTF-8"),
        (COT.encode(), 'bbh_cot: no examples for "navigate", which b1 belongs to'),
    ],
)
def test_bad_examples_of_bbh(write: Write, content: bytes, part: str) -> None:
    folder = write("bbh.jsonl", BBH)
    write("bbh_cot/sorting.txt", content=content)
    with pytest.raises(InputError) as raised:
        read_questions(TASKS["bbh"], folder, few_shot=True)
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("task", "row", "part"),
    [
        ("gsm8k", {"id": "x", "question": "q"}, '"answer" is missing'),
        ("gsm8k", {**GSM8K, "question": " "}, "question: must be a text that is not blank"),
        ("gsm8k", {**GSM8K, "answer": "4"}, "answer: must end with #### and a number"),
        ("gsm8k", {**GSM8K, "answer": "#### four"}, "answer: must end with #### and a number"),
        ("gsm8k", {**GSM8K, "id": 3}, "id: must be a text that is not blank, got 3"),
        ("mmlu", {**MMLU, "answer": 4}, "answer: must be an integer from 0 to 3, got 4"),
        ("mmlu", {**MMLU, "answer": "C"}, 'answer: must be an integer from 0 to 3, got "C"'),
        ("mmlu", {**MMLU, "answer": True}, "answer: must be an integer from 0 to 3, got true"),
        ("mmlu", {**MMLU, "choices": ["a", "b", "c"]}, "choices: must be 4, got 3"),
        ("mmlu", {**MMLU, "choices": ["a", "b", "c", 4]}, "choices[3]: must be a text that is not blank, got 4"),
        ("mmlu", {k: v for k, v in MMLU.items() if k != "choices"}, "choices: must be a list of 2 to 26 texts"),
        ("mmlu", {k: v for k, v in MMLU.items() if k != "subject"}, '"subject" is missing'),
        ("bbh", {**BBH, "target": "(A)"}, 'target: "(A)" must be one of the options'),
        ("bbh", {**BBH, "input": "(A) x\n(C) z", "target": "(C)"}, 'target: "(C)" must be one of the options'),
        ("bbh", {k: v for k, v in BBH.items() if k != "task"}, '"task" is missing'),
        ("arc_easy", {**ARC, "answer": "C"}, 'answer: "C" must be one of the labels, once: ["A", "B"]'),
        ("arc_easy", {**ARC, "labels": ["B", "B"]}, 'answer: "B" must be one of the labels, once: ["B", "B"]'),
        ("arc_easy", {**ARC, "labels": ["A"]}, "labels: must be a list of 2 texts, one per choice"),
        ("arc_easy", {**ARC, "labels": [1, 2]}, "labels: must be a list of 2 texts, one per choice"),
        ("arc_easy", {**ARC, "choices": ["hot"]}, "choices: must be a list of 2 to 26 texts"),
    ],
)
def test_bad_rows_name_file_and_line(write: Write, task: str, row: dict[str, Any], part: str) -> None:
    good = {**ROWS[task], "id": "good"}
    folder = write(TASKS[task].questions_file, good, row)
    with pytest.raises(InputError) as raised:
        read_questions(TASKS[task], folder)
    assert str(raised.value).startswith(f"{folder / TASKS[task].questions_file}, line 2: ")
    assert part in str(raised.value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\n{not json\n", ", line 2: not JSON"),
        (b"[1]\n", ", line 1: must be an object"),
        (b'{"id": "\xff"}\n', ", line 1: not UTF-8 at byte 9"),
        (b'{"id": "\\ud800"}\n', ", line 1: id: half a surrogate pair at character 1"),
        (b"{}\n", ', line 1: "id" is missing'),
        (b" \n\n", ": it is empty"),
        (b"", ": it is empty"),
    ],
)
def test_bad_files_of_questions(write: Write, task: str, content: bytes, part: str) -> None:
    name = TASKS[task].questions_file
    with pytest.raises(InputError) as raised:
        read_questions(TASKS[task], write(name, content=content))
    assert f"{name}{part}" in str(raised.value)


@pytest.mark.parametrize("task", TASKS)
def test_missing_files_and_ids_that_stand_twice(write: Write, tmp_path: Path, task: str) -> None:
    name = TASKS[task].questions_file
    with pytest.raises(InputError, match=f"{name}: cannot be read: No such file or directory"):
        read_questions(TASKS[task], tmp_path)
    write(name, ROWS[task])
    assert len(read_questions(TASKS[task], tmp_path)) == 1
    with pytest.raises(InputError, match=TASKS[task].examples_file):
        read_questions(TASKS[task], tmp_path, few_shot=True)
    write(name, ROWS[task], ROWS[task])
    with pytest.raises(InputError, match=f'{name}, line 2: the id ".1" stands on an earlier line too'):
        read_questions(TASKS[task], tmp_path)


@pytest.mark.parametrize("answer", ["It is 2.", "The answer is two."])
def test_bad_examples_of_gsm8k(write: Write, answer: str) -> None:
    folder = write("gsm8k_test.jsonl", GSM8K)
    write("gsm8k_fewshot.jsonl", {**GSM8K, "answer": answer})
    with pytest.raises(InputError, match=r"gsm8k_fewshot\.jsonl, line 1: .* must end with "):
        read_questions(TASKS["gsm8k"], folder, few_shot=True)


def test_tasks_by_name() -> None:
    assert [task.name for task in find_tasks("mmlu, arc,arc_easy")] == ["mmlu", "arc_challenge", "arc_easy"]
    for names in ("gsm", "", "mmlu,"):
        with pytest.raises(InputError, match="there are gsm8k, mmlu, bbh, arc_challenge, arc_easy, arc"):
            find_tasks(names)
