"""Evaluations of tiny models: records, how often each arm is right, tables, and runs that are continued."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
from click.testing import CliRunner, Result
from commands import one_line

from me_local import ConfigError, Ensemble, Overrides, load
from me_local.cli.program import main
from me_local.decoding.reply import Reply
from me_local.evaluation.questions import Job, Likelihood, Sampling, spread
from me_local.evaluation.tasks import TASKS, Question, read_questions

OpenEnsemble = Callable[..., Ensemble]
WriteModels = Callable[..., Path]
Run = Callable[..., Result]

MMLU = [
    {"id": f"m{i}", "subject": "anatomy", "question": f"What is {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4}
    for i in range(3)
]
ARC = [
    {"id": "a0", "question": "Ice is", "choices": ["hot", "so cold"], "labels": ["A", "B"], "answer": "B"},
    {"id": "a1", "question": "Fire is", "choices": ["hot", "red", "a cat"], "labels": ["1", "2", "3"], "answer": "1"},
]
GSM8K = [{"id": f"g{i}", "question": f"Two and {i}?", "answer": f"#### {i + 2}"} for i in range(3)]
EQUAL = {"bpe_a": 0.5, "spm": 0.5}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("mmlu_test", MMLU), ("arc_easy_test", ARC), ("gsm8k_test", GSM8K)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(write_models: WriteModels, data: Path) -> Run:
    models = write_models("bpe_a", "spm", weights=(0.5, 0.5))

    def invoke(*arguments: object) -> Result:
        command = ["eval", "--models", str(models), "--data", str(data), *map(str, arguments)]
        return CliRunner().invoke(main, command)

    return invoke


def without_seconds(table: str) -> list[str]:
    return [line for line in table.splitlines() if "| seconds |" not in line]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_likelihoods_decide(run: Run, data: Path, tmp_path: Path, open_ensemble: OpenEnsemble) -> None:
    output = tmp_path / "out.jsonl"
    result = run("--task", "arc_easy,mmlu", "--method", "likelihood", "--output", output)
    assert result.exit_code == 0, result.output
    found = records(output)
    assert [record["id"] for record in found] == ["arc_easy/a0", "arc_easy/a1", "mmlu/m0", "mmlu/m1", "mmlu/m2"]
    ensemble = open_ensemble("bpe_a", "spm", weights=(0.5, 0.5))
    scores = [ensemble.score("Question: Fire is\nAnswer:", f" {c}", raw=True) for c in ("hot", "red", "a cat")]
    record = found[1]
    assert record["log_likelihoods"]["ensemble"] == pytest.approx([s.log_likelihood for s in scores], abs=1e-6)
    assert record["log_likelihoods"]["spm"] == pytest.approx([s.members[1] for s in scores], abs=1e-6)
    best = max(range(3), key=lambda i: scores[i].log_likelihood)
    per_character = max(range(3), key=lambda i: scores[i].members[0] / (3, 3, 5)[i])
    assert record["correct"]["accuracy"]["ensemble"] == (best == 0)
    assert record["correct"]["per character"]["bpe_a"] == (per_character == 0)
    assert record["answer"] == "A"
    table = result.stdout.splitlines()
    assert table[0] == "| task | measure | questions | bpe_a | spm | ensemble |"
    assert [line.split(" | ")[:3] for line in table[2:]] in (
        [["| arc_easy", "accuracy", "2"], ["| arc_easy", "per character", "2"], ["| mmlu", "accuracy", "3"]],
        [["| arc_easy", "accuracy", "2"], ["| mmlu", "accuracy", "3"]],
    )


@pytest.mark.slow
def test_replies_are_those_of_generate(
    data: Path, open_ensemble: OpenEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("me_local.evaluation.questions.MAX_TOKENS", 8)
    ensemble = open_ensemble("bpe_a", "spm", weights=(0.5, 0.5))
    task = TASKS["gsm8k"]
    method = Sampling(EQUAL, ["members", "me", "ce"], 2, 5, {})
    assert method.arms == ("bpe_a", "spm", "ME", "CE")
    questions = read_questions(task, data)
    jobs = list(method.jobs(task, questions[:1]))
    assert [job.id for job in jobs[:3]] == ["gsm8k/g0/bpe_a/0", "gsm8k/g0/bpe_a/1", "gsm8k/g0/spm/0"]
    assert len({job.id for job in jobs}) == len(jobs) == 8
    made = list(method.records(ensemble, jobs, {}))
    assert len({record["seed"] for record in made}) == 8
    for record in made:
        shaped = Overrides(seed=record["seed"], max_tokens=8, temperature=1.0, top_k=5, top_p=1.0, min_p=0.0)
        for strategy, weights in (
            ("me", {"bpe_a": float(record["arm"] == "bpe_a"), "spm": float(record["arm"] == "spm")}),
            (record["arm"].lower(), None),
        ):
            if (weights is None) == (record["arm"] in ("ME", "CE")):
                values = {"strategy": strategy, "weights": weights}
                given = Overrides(**{name: getattr(shaped, name) for name in shaped.__slots__} | values)
                reply = ensemble.generate(task.messages(questions[0]), given)
                assert record["reply"] == reply.text
                assert record["correct"] == {"accuracy": {record["arm"]: task.correct(questions[0], reply.text)}}


@pytest.mark.slow
def test_replies_at_once_are_those_of_one_at_a_time(
    data: Path, write_models: WriteModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members alone and CE do not depend on a route, and ME has its own here."""
    monkeypatch.setattr("me_local.evaluation.questions.MAX_TOKENS", 8)
    models = write_models("bpe_a", "spm", weights=(0.5, 0.5))
    questions = read_questions(TASKS["gsm8k"], data)
    found = []
    for batch in (1, 4):
        with load(models, Overrides(route="own"), batch=batch) as ensemble:
            method = Sampling(EQUAL, ["members", "me", "ce"], 2, 5, {})
            made = method.records(ensemble, list(method.jobs(TASKS["gsm8k"], questions)), {})
            found.append({r["id"]: (r["reply"], r["found"], r["correct"], r["seed"]) for r in made})
    assert len(found[0]) == 3 * 2 * 4
    assert found[0] == found[1]


def test_a_table_of_replies(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("me_local.evaluation.questions.MAX_TOKENS", 4)
    output = tmp_path / "out.jsonl"
    options = ["--task", "gsm8k,arc_easy", "--strategies", "me,members,union", "--runs", 2, "--limit", 2, "--batch", 1]
    result = run(*options, "--output", output)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "| task | measure | questions | bpe_a | spm | ME | UNION |"
    measures = ["accuracy", "pieces", "evaluations", "tokens", "seconds"]
    assert [line.split(" | ")[:3] for line in lines[2:12]] == [
        [f"| {task}", measure, "2 x 2"] for task in ("gsm8k", "arc_easy") for measure in measures
    ]
    assert lines[13] == "| task | paired differences | ME - UNION |"
    assert "UNION is CE over the union of the members' candidates" in lines[-1]
    found = records(output)
    assert len(found) == len({record["id"] for record in found}) == 2 * 2 * 2 * 4
    assert all(record["cost"]["pieces"] <= 4 for record in found)
    lost = found.pop(5)
    output.write_text("".join(json.dumps(record) + "\n" for record in found))
    resumed = run(*options, "--output", output, "--resume")
    assert without_seconds(resumed.stdout) == without_seconds(result.stdout)
    again = records(output)[-1]
    assert {key: again[key] for key in ("id", "reply", "correct")} == {k: lost[k] for k in ("id", "reply", "correct")}


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(run: Run, data: Path, tmp_path: Path) -> None:
    """The process is killed while its third record is half written; nothing is lost and nothing comes twice."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = ["--task", "mmlu,arc_easy", "--method", "likelihood"]
    complete = run(*options, "--output", whole)
    script = (
        "import os, signal, sys, me_local.records as r, me_local.cli.eval as e\n"
        "done = []\n"
        "def dying(file, record):\n"
        "    done.append(record)\n"
        "    if len(done) == 3:\n"
        '        file.write(b\'{"id": "mm\')\n'
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    r.write_record(file, record)\n"
        "e.write_record = dying\n"
        "e.evaluate(sys.argv[1:])\n"
    )
    arguments = ["--models", str(tmp_path / "models.toml"), "--data", str(data), *options, "--output", str(cut)]
    killed = processes.run([sys.executable, "-c", script, *arguments])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cut.read_bytes().endswith(b'\n{"id": "mm')
    one_line(run(*options, "--output", cut), 2, "cut.jsonl: it exists already; continue it with --resume")
    resumed = run(*options, "--output", cut, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert cut.read_bytes() == whole.read_bytes()
    assert resumed.stdout == complete.stdout
    again = run(*options, "--output", cut, "--resume")
    assert again.stdout == complete.stdout
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--task", "gsm8k", "--method", "likelihood"], ['task "gsm8k" has no choices to score']),
        (["--task", "gsm9k"], ['there is no task "gsm9k"', "arc_easy"]),
        (["--task", "bbh"], ["bbh.jsonl: cannot be read"]),
        (["--task", "mmlu", "--few-shot"], ["mmlu_dev.jsonl: cannot be read"]),
        (
            ["--task", "mmlu", "--strategies", "me,best"],
            ['--strategies: there is no "best"', "members, me, ce, vote, union"],
        ),
        (["--task", "mmlu", "--weights", "1"], ["--weights"]),
        (["--task", "mmlu", "--resume"], ["--resume goes with --output"]),
    ],
)
def test_what_cannot_be_evaluated(run: Run, arguments: list[str], parts: list[str]) -> None:
    one_line(run(*arguments), 2, *parts)


def test_wrong_rows_name_file_and_line(run: Run, data: Path) -> None:
    path = data / "mmlu_test.jsonl"
    for change, part in (
        ({"answer": 4}, "answer: must be an integer from 0 to 3, got 4"),
        ({"question": None}, "question"),
    ):
        path.write_text(json.dumps(MMLU[0]) + "\n" + json.dumps(MMLU[1] | change) + "\n")
        one_line(run("--task", "mmlu", "--method", "likelihood"), 2, "mmlu_test.jsonl, line 2", part)
    path.write_text("")
    one_line(run("--task", "mmlu", "--method", "likelihood"), 2, "mmlu_test.jsonl: it is empty")


def test_records_of_another_run_are_not_continued(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    options = ["--task", "mmlu", "--method", "likelihood", "--limit", 1, "--output", output]
    assert run(*options).exit_code == 0
    before = output.read_bytes()
    one_line(run(*options, "--resume", "--weights", "0.9,0.1"), 2, "out.jsonl, line 1: made with other settings")
    output.write_text("hello\n")
    one_line(run(*options, "--resume"), 2, "out.jsonl, line 1: not a record of an earlier run")
    output.write_bytes(before)
    assert run(*options, "--resume").exit_code == 0


def test_a_question_that_is_too_long_is_named(run: Run, data: Path) -> None:
    (data / "mmlu_test.jsonl").write_text(json.dumps(MMLU[0] | {"question": "what " * 900}) + "\n")
    result = run("--task", "mmlu", "--method", "likelihood")
    one_line(result, 2, "mmlu, question m0: the prompt has", "raise n_ctx")


def test_json_has_the_figures(run: Run) -> None:
    result = run("--task", "mmlu", "--method", "likelihood", "--json", "--limit", 2)
    report = json.loads(result.stdout)
    members = {name: {"model": f"{name}.gguf", "weight": 0.5} for name in ("bpe_a", "spm")}
    assert report["settings"] == {"method": "likelihood", "members": members, "few_shot": False}
    assert [row["questions"] for row in report["rows"]] == [2]
    cells = report["rows"][0]["cells"]
    assert list(cells) == ["bpe_a", "spm", "ensemble"]
    best = max(cells["bpe_a"]["mean"], cells["spm"]["mean"])
    assert cells["ensemble"]["gain"]["mean"] == pytest.approx(cells["ensemble"]["mean"] - best)


def test_answers_are_looked_for_behind_thoughts(data: Path) -> None:
    task = TASKS["gsm8k"]
    reply = Reply("Is it 2?</think>It is.", "stop", "me", "token", 1, (), (), 1.0, None, "Is it 2?", "It is.")
    job = Job(task, read_questions(task, data)[0], "ME")
    record = Sampling({"a": 1.0}, ["me"], 1, 5, {})._record(job, reply, 1.0)
    assert (job.question.answer, record["found"], record["correct"]) == ("2", None, {"accuracy": {"ME": False}})
    assert (record["thought"], record["reply"]) == ("Is it 2?", "It is.")


def test_records_say_what_templates_were_given(run: Run) -> None:
    told = json.loads(run("--task", "mmlu", "--method", "likelihood", "--json", "--template-arg", "x=1").stdout)
    assert told["settings"]["members"]["spm"]["template_args"] == {"x": 1}


def test_a_limit_is_spread_over_the_file() -> None:
    questions = [Question(str(i), "?", "A") for i in range(10)]
    assert [q.id for q in spread(questions, 4)] == ["0", "2", "5", "7"]
    assert spread(questions, None) == spread(questions, 99) == questions


def test_a_member_with_the_name_of_a_column() -> None:
    with pytest.raises(ConfigError, match='member "CE": the tables use this name'):
        Sampling({"a": 0.5, "CE": 0.5}, ["members", "ce"], 1, 10, {})
    with pytest.raises(ConfigError, match='member "ensemble"'):
        Likelihood(["ensemble"], {})
    assert Job(TASKS["mmlu"], Question("x", "?", "A"), "a", 2).id == "mmlu/x/a/2"
