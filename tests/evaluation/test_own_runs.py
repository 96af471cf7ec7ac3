"""`me-local eval` with tasks of one's own and with votes, on tiny models: from the files to the table."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from commands import jsonl, one_line, records

from me_local import ConfigError, Ensemble, Overrides
from me_local.cli.program import main
from me_local.evaluation.questions import Sampling
from me_local.evaluation.tasks import find_tasks, read_questions

OpenEnsemble = Callable[..., Ensemble]
WriteModels = Callable[..., Path]
Run = Callable[..., Result]

TASK = """
questions = "q.jsonl"
prompt = "Say {x}"
system = "Speak."
max_tokens = 3
[answer]
find = "regex"
pattern = "([a-zA-Z])"
compare = "case-insensitive"
"""
NAMES = ("bpe_a", "bpe_b", "spm")
THIRD = 1 / 3


@pytest.fixture
def task(tmp_path: Path) -> Path:
    jsonl(tmp_path / "q.jsonl", *({"x": x, "answer": x[0]} for x in ("a", "tea", "one", "E")))
    path = tmp_path / "letters.toml"
    path.write_text(TASK)
    return path


@pytest.fixture
def run(write_models: WriteModels, task: Path) -> Run:
    models = write_models(*NAMES, top="[sampling]\ntemperature = 0.9\ntop_k = 7\n")

    def invoke(*arguments: object) -> Result:
        command = ["eval", "--models", str(models), "--task", str(task), *map(str, arguments)]
        return CliRunner().invoke(main, command)

    return invoke


def untimed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record | {"cost": record["cost"] | {"seconds": 0}} for record in found]


def untimed_table(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line for line in result.stdout.splitlines() if "| seconds |" not in line]


def test_votes_are_the_majority_of_what_the_members_answered_alone(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    result = run("--strategies", "me,ce,vote", "--runs", 3, "--output", output)
    lines = untimed_table(result)
    assert lines[0] == "| task | measure | questions | bpe_a | bpe_b | spm | ME | CE | VOTE |"
    assert lines[2].startswith("| letters | accuracy | 4 x 3 | ")
    assert lines[7] == "| task | paired differences | ME - CE | ME - VOTE | CE - VOTE |"
    found = records(output)
    assert [record["arm"] for record in found] == [arm for arm in (*NAMES, "ME", "CE", "VOTE") for _ in range(12)]
    given: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in found[:36]:
        given[record["question"], record["run"]].append(record)
    votes = {(record["question"], record["run"]): record for record in found[60:]}
    assert list(votes) == [(question, run_) for question in "1234" for run_ in range(3)]
    for place, vote in votes.items():
        answers = [ballot["found"] for ballot in given[place]]
        counts = {answer: answers.count(answer) for answer in answers if answer is not None}
        assert vote["votes"] == pytest.approx({answer: count * THIRD for answer, count in counts.items()})
        winners = [answer for answer, count in counts.items() if count == max(counts.values())]
        assert vote["found"] in (winners or [None])
        assert vote["drawn"] == (len(winners) > 1)
        assert vote["correct"] == {"accuracy": {"VOTE": vote["found"] == vote["answer"]}}
        for key, value in vote["cost"].items():
            assert value == pytest.approx(sum(ballot["cost"][key] for ballot in given[place]))


def test_a_vote_alone_shows_its_voters(run: Run, tmp_path: Path) -> None:
    """A member without weight neither votes nor answers; with the rest decided by one, the vote is that one's."""
    result = run("--strategies", "vote", "--weights", "0.6,0,0.4", "--json", "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [list(row["cells"]) for row in report["rows"]] == [["bpe_a", "spm", "VOTE"]] * 5
    found = {(record["question"], record["arm"]): record["found"] for record in records(tmp_path / "out.jsonl")}
    for question in "1234":
        heavy, light, vote = (found[question, arm] for arm in ("bpe_a", "spm", "VOTE"))
        assert vote == (light if heavy is None else heavy)


def test_replies_are_made_as_the_task_and_models_toml_say(
    run: Run, task: Path, tmp_path: Path, open_ensemble: OpenEnsemble
) -> None:
    task.write_text(TASK.replace("max_tokens = 3", "max_tokens = 6").replace("prompt", 'stop = "e"\nprompt'))
    options = ["--strategies", "ce", "--batch", 1]  # at once, a member may evaluate more: the tokens would differ
    assert run(*options, "--output", tmp_path / "out.jsonl").exit_code == 0
    assert run(*options, "--top-k", 2, "--output", tmp_path / "two.jsonl").exit_code == 0
    (made,) = find_tasks(str(task))
    questions = read_questions(made, Path())
    ensemble = open_ensemble(*NAMES)
    for name, top_k in (("out", 7), ("two", 2)):
        for record, question in zip(records(tmp_path / f"{name}.jsonl"), questions, strict=True):
            shaped = Overrides(
                strategy="ce", seed=record["seed"], max_tokens=6, stop=("e",), temperature=0.9, top_k=top_k
            )
            reply = ensemble.generate(made.messages(question), shaped)
            assert record["reply"] == reply.text
            assert record["cost"]["pieces"] == len(reply.steps)
            assert record["cost"]["evaluations"] == sum(usage.calls for usage in reply.usage)
            tokens = sum(usage.prompt_length + usage.text_evaluated for usage in reply.usage)
            assert record["cost"]["tokens"] == tokens


def test_an_interrupted_run_goes_on(run: Run, tmp_path: Path) -> None:
    """Wherever it was cut, among replies or among votes, the records and the table come out the same."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = ["--strategies", "me,vote", "--limit", 2, "--batch", 1]
    complete = run(*options, "--output", whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 10
    for count in (1, 5, 7, 8, 9, 10):
        cut.write_bytes(b"".join(lines[:count]) + lines[-1][: 40 if count < 10 else 0])
        assert untimed_table(run(*options, "--output", cut, "--resume")) == untimed_table(complete)
        assert untimed(records(cut)) == untimed(records(whole))


def test_replies_that_share_a_route_are_told_of(run: Run, tmp_path: Path) -> None:
    """Where ME has one, and in a run that goes on from records too."""
    note = "ME's replies drew the same members"
    output = tmp_path / "out.jsonl"
    options = ["--strategies", "me,ce", "--limit", 2, "--output"]
    assert note in run(*options, output, "--batch", 2).stdout
    assert note in run(*options, output, "--resume").stdout
    assert note not in run(*options, tmp_path / "one.jsonl", "--batch", 1).stdout
    assert note not in run("--strategies", "ce,vote", "--limit", 2, "--batch", 2).stdout
    models = tmp_path / "models.toml"
    models.write_text('[ensemble]\nroute = "own"\n' + models.read_text())
    assert note not in run(*options, tmp_path / "own.jsonl", "--batch", 2).stdout


def test_votes_are_added_to_the_records_of_members(run: Run, tmp_path: Path) -> None:
    """No model is needed for them."""
    output = tmp_path / "out.jsonl"
    assert run("--output", output, "--strategies", "members").exit_code == 0
    before = output.read_bytes()
    for name in NAMES:
        models = (tmp_path / "models.toml").read_text()
        (tmp_path / "models.toml").write_text(models.replace(str(Path(name + ".gguf")), f"gone/{name}.gguf"))
    result = run("--output", output, "--strategies", "members,vote", "--resume")
    assert result.exit_code == 0, result.output
    assert output.read_bytes().startswith(before)
    assert [record["arm"] for record in records(output)[12:]] == ["VOTE"] * 4


def test_records_of_another_task_or_other_sampling_are_not_continued(run: Run, task: Path, tmp_path: Path) -> None:
    output, models = tmp_path / "out.jsonl", tmp_path / "models.toml"
    options = ["--strategies", "members", "--limit", 1, "--output", output, "--resume"]
    assert run(*options).exit_code == 0
    for path, old, new in ((task, "Say", "Tell"), (models, "temperature = 0.9", "repeat_penalty = 1.2")):
        before = path.read_text()
        path.write_text(before.replace(old, new))
        one_line(run(*options), 2, "out.jsonl, line 1: made with other settings")
        path.write_text("# A comment.\n" + before)
        assert run(*options).exit_code == 0


def test_tasks_of_both_kinds_in_one_table(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("me_local.evaluation.questions.MAX_TOKENS", 2)
    jsonl(tmp_path / "gsm8k_test.jsonl", {"id": "g", "question": "Two?", "answer": "#### 2"})
    both = f"gsm8k,{tmp_path / 'letters.toml'}"
    result = run("--task", both, "--data", tmp_path, "--strategies", "ce,vote", "--output", tmp_path / "out.jsonl")
    lines = untimed_table(result)
    assert [line.split(" | ")[:3] for line in lines[2:10:4]] == [
        ["| gsm8k", "accuracy", "1"],
        ["| letters", "accuracy", "4"],
    ]
    pieces = {record["task"]: record["cost"]["pieces"] for record in records(tmp_path / "out.jsonl")[:5]}
    assert pieces["gsm8k"] <= 2
    assert pieces["letters"] <= 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--method", "likelihood"], ['task "letters" has no choices to score']),
        (["--few-shot"], ["--few-shot does not go with", "letters.toml: write its [[examples]] there"]),
        (["--task", "gsm8k"], ["--data is missing: the folder of the questions of gsm8k"]),
        (["--strategies", "votes"], ['--strategies: there is no "votes"; there are members, me, ce, vote, union']),
    ],
)
def test_what_does_not_go_together(run: Run, arguments: list[str], parts: list[str]) -> None:
    one_line(run(*arguments), 2, *parts)


def test_a_question_that_is_too_long_is_named(run: Run, tmp_path: Path) -> None:
    jsonl(tmp_path / "q.jsonl", {"id": "long", "x": "what " * 3000, "answer": 1})
    one_line(run("--strategies", "vote"), 2, "letters, question long: the prompt has")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", [(name, "plain") for name in ("gsm8k", "mmlu", "bbh", "arc_challenge", "arc_easy", "arc")]),
        ("gsm8k,arc_", [("gsm8k,arc_challenge", "plain"), ("gsm8k,arc_easy", "plain")]),
        ("./my", [("./my", "file")]),
    ],
)
def test_a_shell_completes_tasks_and_files(typed: str, offered: list[tuple[str, str]]) -> None:
    shell = ShellComplete(main, {}, "me-local", "_ME_LOCAL_COMPLETE")
    assert [(item.value, item.type) for item in shell.get_completions(["eval", "--task"], typed)] == offered


def test_a_member_that_is_called_vote() -> None:
    with pytest.raises(ConfigError, match='member "VOTE": the tables use this name for the ensemble'):
        Sampling({"a": 0.5, "VOTE": 0.5}, ["vote"], 1, None, {})
