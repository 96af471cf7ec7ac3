"""Ctrl-C at any moment of a chat: it goes on, and replies as if nothing had happened. A run ends."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pexpect
import pytest
from terminals import PROMPT, ask, spawn

from me_local import Chat, Ensemble
from me_local.cli.display import Painter, make_console
from me_local.cli.session import Session

WriteModels = Callable[..., Path]
OpenEnsemble = Callable[..., Ensemble]
Terminal = Callable[..., pexpect.spawn]

ACCEPTED = r"\x1b\[\?2004l"  # what prompt_toolkit writes when the line is complete
SETTINGS = "[ensemble]\nseed = 1\n[sampling]\ntop_k = 3\nmax_tokens = 400"
# Token by token the evaluation of a prompt takes long enough to be hit, and the logits of a context have the same bits
# however it came about: llama.cpp's kernels depend on the size of the batch.
MEMBER = "n_batch = 1"


@pytest.fixture
def terminal(write_models: WriteModels, tmp_path: Path) -> Iterator[Terminal]:
    """Opens a chat in which the evaluation of a prompt takes long."""
    models = write_models("bpe_a", "spm", "hybrid", top=SETTINGS, member=MEMBER)
    models.write_text(models.read_text().replace("n_ctx = 512", "n_ctx = 768"))
    with ExitStack() as stack:

        def open_one(*options: str) -> pexpect.spawn:
            child = spawn(["chat", "--models", str(models), "--no-color", *options], tmp_path)
            child.delaybeforesend = None
            stack.callback(child.close, force=True)
            child.expect("lists the commands")
            return child

        yield open_one


def wait(child: pexpect.spawn, seconds: float) -> None:
    """Let this time pass, in which the chat may write what it likes."""
    child.expect(pexpect.TIMEOUT, timeout=seconds)


def interrupted_turn(child: pexpect.spawn, moment: int, chance: random.Random, prompt_seconds: float) -> str:
    """Press Ctrl-C at a random moment of a turn, and say where it was: in the "prompt", the "reply" or "behind" it."""
    ask(child, f"/system Be {moment}.")  # at the start of every prompt: all of it has to be evaluated again
    child.expect(rf"System message: Be {moment}\.")
    ask(child, f"Message {moment}")
    child.expect(ACCEPTED)
    if moment % 2:
        wait(child, chance.uniform(0, prompt_seconds))
    else:
        child.expect(rf"(?s)(?=.{{{chance.randint(1, 120)}}})")
    child.sendintr()
    child.expect(r"me: (\d+) pieces[^\n]*?(\w+), seed")
    pieces, reason = int(child.match.group(1)), child.match.group(2)
    if reason == "cancelled":
        return "reply" if pieces else "prompt"
    child.expect(["/exit leaves", pexpect.TIMEOUT], timeout=0.5)
    return "behind"


def three_replies(child: pexpect.spawn, history: Path) -> list[str]:
    """What the chat replies to a message after this history, to three seeds."""
    ask(child, f"/load {history}")
    ask(child, "/set max_tokens 40")
    replies = []
    for line in ("Who are you?", "/retry", "/retry"):
        ask(child, line)
        child.expect(r"pieces/s[^\n]*, seed \d+")
        ask(child, f"/save {history}.after")
        child.expect(r"Saved \d+ messages")
        replies.append(json.loads(Path(f"{history}.after").read_text())["messages"][-1]["content"])
    return replies


@pytest.mark.slow
def test_ctrl_c_at_50_moments_of_a_chat(terminal: Terminal, tmp_path: Path) -> None:
    """The replies after them equal those of a fresh process that is given the same history.

    All tokens are evaluated one by one, so there is no rounding in which the two could differ, and every piece has to
    be the same.
    """
    chance = random.Random(20261123)
    base, history = tmp_path / "base.json", tmp_path / "history.json"
    turns = [{"role": role, "content": "The cat sat on the mat. " * 3} for role in ("user", "assistant") * 3]
    base.write_text(json.dumps({"system": None, "messages": turns}))
    child = terminal()
    ask(child, f"/load {base}")
    ask(child, "Hello")
    child.expect(r"prompt (\d+\.\d+) s")
    prompt_seconds = float(child.match.group(1))
    places = [interrupted_turn(child, moment, chance, prompt_seconds) for moment in range(50)]
    assert places.count("prompt") >= 5
    assert places.count("reply") >= 5
    ask(child, "/set seed 1000")
    ask(child, f"/save {history}")
    child.expect(r"Saved \d+ messages")
    replies = three_replies(child, history)
    ask(child, "/stats")
    child.expect(r", seed (\d+)")
    fresh = terminal("--seed", str(int(child.match.group(1)) - 2))
    again = three_replies(fresh, history)
    assert replies == again
    assert len(set(replies)) == 3


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_gives_up_the_line(terminal: Terminal) -> None:
    child = terminal()
    child.expect(PROMPT)
    for _ in range(3):
        child.send("half a lin")
        child.expect("half a lin")
        child.sendintr()
        child.expect("/exit leaves")
        child.expect(PROMPT)
    child.sendline("/set max_tokens 3")
    ask(child, "Hello")
    child.expect("3 pieces")
    ask(child, "/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_while_the_prompt_is_written_counts_for_the_reply(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    session = Session(Chat(ensemble), Painter(make_console(), ensemble.names), make_console(stderr=True))
    turn = session.chat.say("Hello")
    session.interrupted.set()
    session.show(turn)
    assert session.last is not None
    assert session.last.finish_reason == "cancelled"
    assert session.chat.messages == []


@pytest.mark.slow
def test_ctrl_c_while_loading_ends_at_once(write_models: WriteModels, tmp_path: Path) -> None:
    models = write_models("bpe_a")
    child = spawn(["chat", "--models", str(models)], tmp_path)
    child.expect("loading")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert "Traceback" not in child.before


INTERRUPTING = """
import itertools, os, signal, sys
from me_local.cli import main
from me_local.llama.member import Member
decode, calls, after = Member._decode, itertools.count(), int(sys.argv.pop(1))
def interrupting(self, parts):
    code = decode(self, parts)
    if next(calls) >= after:
        os.kill(os.getpid(), signal.SIGINT)
    return code
Member._decode = interrupting
main()
"""


def run_interrupted(folder: Path, after: int, *options: str) -> "subprocess.CompletedProcess[str]":
    """A command in which Ctrl-C is pressed at each evaluation after so many."""
    command = [sys.executable, "-c", INTERRUPTING, str(after), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "after"), [("1", 90), ("3", 40)])
def test_ctrl_c_again_and_again_in_a_run_keeps_what_is_finished(
    write_models: WriteModels, tmp_path: Path, batch: str, after: int
) -> None:
    """The members are evaluated in threads of their own. What is left gets the replies that it would have got."""
    at_once = '[ensemble]\nstrategy = "ce"\nparallel = true\nseed = 1\n[sampling]\nmax_tokens = 9'
    write_models("bpe_a", "spm", top=at_once, member='type_k = "f32"\ntype_v = "f32"')
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"Number {i}"}) + "\n" for i in range(12)))
    run = ("generate", "--input", "in.jsonl", "--batch", batch, "--output")
    interrupted = run_interrupted(tmp_path, after, *run, "out.jsonl")
    assert interrupted.returncode == 130, interrupted.stderr
    assert "Traceback" not in interrupted.stderr
    kept = (tmp_path / "out.jsonl").read_text().splitlines()
    assert 1 <= len(kept) < 12
    assert run_interrupted(tmp_path, 10**9, *run, "out.jsonl", "--resume").returncode == 0
    assert run_interrupted(tmp_path, 10**9, *run, "whole.jsonl").returncode == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert lines[: len(kept)] == kept
    assert texts_by_id(lines) == texts_by_id((tmp_path / "whole.jsonl").read_text().splitlines())


def texts_by_id(lines: Sequence[str]) -> dict[int, str]:
    records = [json.loads(line) for line in lines]
    assert len({record["id"] for record in records}) == len(records) == 12
    return {record["id"]: record["text"] for record in records}


COMMANDS = [
    ("generate", "Hello", "-n", "9", "--batch", "3"),
    ("eval", "--task", "gsm8k", "--data", "data", "--limit", "2"),
    ("bench",),
    ("score", "text.txt"),
    ("fit", "--data", "text.txt"),
    ("verify",),
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_ctrl_c_again_and_again_ends_every_command(
    write_models: WriteModels, tmp_path: Path, command: tuple[str, ...]
) -> None:
    write_models("bpe_a", "spm")
    (tmp_path / "text.txt").write_text("The cat sat on the mat. A dog and a cat.\n\n" * 200)
    (tmp_path / "data").mkdir()
    question = {"id": "g", "question": "What is 1 + 1?", "answer": "It is two.\n#### 2"}
    (tmp_path / "data" / "gsm8k_test.jsonl").write_text(json.dumps(question) + "\n")
    result = run_interrupted(tmp_path, 12, *command)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
