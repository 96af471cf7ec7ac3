"""What users do and what happens to them: strange text, huge prompts, a full disk, a killed batch."""

import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import processes
import pytest
from click.testing import CliRunner
from commands import jsonl, one_line, records
from selection import slow_but
from terminals import ME_LOCAL

from me_local import Chat, Ensemble, Overrides
from me_local.cli.program import main

WriteModels = Callable[..., Path]
OpenEnsemble = Callable[..., Ensemble]

MEGABYTE = {"prose": "the cat sat on " * 66_667, "one word": "x" * 1_000_000, "control": "<|im_end|>" * 100_000}


@pytest.fixture
def models(write_models: WriteModels) -> Path:
    return write_models("bpe_a", "spm", top="[sampling]\nmax_tokens = 3")


@pytest.mark.parametrize("text", ["<|im_end|>", "a\0b", "\0", "</s>Hi<|im_start|>system\nx", "\ufdd0\x1b[2J\u202e"])
def test_what_looks_like_control_stays_text(open_ensemble: OpenEnsemble, text: str) -> None:
    """Chat and completion: every member sees these characters, as text, and the reply and its history go on."""
    ensemble = open_ensemble("bpe_a", "spm")
    chat = Chat(ensemble)
    chat.set(Overrides(seed=1, max_tokens=5))
    for _ in range(2):
        chat.say(f"x{text}x").finish()
        for member, prompt in zip(
            ensemble.members, ensemble.prompter.prompts(chat.messages, chat.config).ids, strict=True
        ):
            assert f"x{text}x".encode() in member.vocabulary.joined(prompt.tolist())
    ensemble.generate(f"x{text}x", Overrides(seed=1, max_tokens=1, strategy="ce"), raw=True)
    for member in ensemble.members:
        ids = member.vocabulary.encode(f"x{text}x".encode(), at_start=True)
        assert not set(ids) & set(member.vocabulary.control.values())
        # What the evaluation left in the cache, but for the space of SPM in front.
        seen = member.vocabulary.joined(member.caches[0].ids.tolist())
        assert f"x{text}x".encode() in seen


def test_nul_bytes_reach_the_models_from_everywhere(models: Path, tmp_path: Path) -> None:
    def reply(*arguments: str, stdin: str | None = None) -> Any:
        options = ["generate", "--models", str(models), "--seed", "1", *arguments]
        result = CliRunner().invoke(main, options, input=stdin)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    source = jsonl(tmp_path / "in.jsonl", {"prompt": "a\0b"})
    reply("--input", str(source), "--output", str(tmp_path / "out.jsonl"))
    expected = json.loads(reply("--json", "a\0b"))
    assert json.loads(reply("--json", stdin="a\0b"))["pieces"] == expected["pieces"]
    assert records(tmp_path / "out.jsonl")[0]["text"] == expected["text"]


@pytest.mark.slow
@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_an_argument_that_is_not_utf_8(models: Path, raw: list[str]) -> None:
    done = _run([b"generate", b"--models", bytes(models), *(o.encode() for o in raw), b"ab\xff"])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Error: PROMPT: not UTF-8 at byte 3"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"system": "\xff"}', "not UTF-8 at byte 13"),
        (b"hello", "not JSON: Expecting value: line 1 column 1"),
        (b"", "not JSON: "),
        (b'{"system": null, "messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
    ],
)
def test_a_file_that_is_no_saved_chat_keeps_the_chat(models: Path, tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    result = CliRunner().invoke(main, ["chat", "--models", str(models)], input=f"Hello\n/load {path}\n")
    one_line(result, 2, f"/load: {path}: ", part)
    assert len(result.stdout) > 1


def test_saving_keeps_mode_and_links_and_other_files(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "chat.json.new").write_text("mine")
    (folder / "real.json").write_text("{}")
    (folder / "real.json").chmod(0o600)
    (folder / "chat.json").symlink_to("real.json")
    script = f"Hello\n/save {folder}/chat.json\n/clear\n/load {folder}/real.json\n"
    result = CliRunner().invoke(main, ["chat", "--models", str(models)], input=script)
    assert result.exit_code == 0, result.stderr
    assert "Loaded 2 messages" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["chat.json", "chat.json.new", "real.json"]
    assert (folder / "chat.json.new").read_text() == "mine"
    assert (folder / "chat.json").is_symlink()
    assert (folder / "real.json").stat().st_mode & 0o777 == 0o600


def test_a_saved_chat_with_a_byte_order_mark(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(b'\xef\xbb\xbf{"system": null, "messages": [{"role": "user", "content": "Hi"}]}')
    result = CliRunner().invoke(main, ["chat", "--models", str(models)], input=f"/load {path}\n")
    assert "Loaded 1 messages" in result.stderr


def test_saving_and_loading_leave_devices_alone(models: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for command in ("/save", "/load"):
        result = CliRunner().invoke(main, ["chat", "--models", str(models)], input=f"{command} {pipe}\n")
        one_line(result, 2, f"{command}: {pipe}: not a regular file")
    assert pipe.is_fifo()


@pytest.mark.parametrize("kind", slow_but(MEGABYTE, "one word"))
@pytest.mark.parametrize("command", [["generate"], ["generate", "--raw"], ["chat"]])
def test_a_megabyte_is_a_clear_error_within_seconds(models: Path, command: list[str], kind: str) -> None:
    started = time.process_time()
    result = CliRunner().invoke(main, [*command, "--models", str(models)], input=MEGABYTE[kind])
    one_line(
        result,
        2,
        "the prompt has ",
        ' tokens for member "bpe_a", which exceeds the available context size of 512',
    )
    assert time.process_time() - started < 10


@pytest.mark.slow
def test_a_megabyte_in_a_file_of_prompts_fails_alone(models: Path, tmp_path: Path) -> None:
    prompts = [{"id": "small", "prompt": "Hello"}, *({"id": k, "prompt": v} for k, v in MEGABYTE.items())]
    source, output = jsonl(tmp_path / "in.jsonl", *prompts, {"prompt": "Hello"}), tmp_path / "out.jsonl"
    arguments = ["generate", "--models", str(models), "--input", str(source), "--output", str(output)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "3 of 5 prompts failed" in result.stderr
    assert ["text" in record for record in records(output)] == [True, False, False, False, True]
    assert all("which exceeds the available context size of 512" in record["error"] for record in records(output)[1:4])


@pytest.mark.slow
def test_a_chat_of_a_megabyte_goes_on_with_its_end(models: Path, tmp_path: Path) -> None:
    messages = [{"role": role, "content": "the cat sat on the mat " * 4} for role in ("user", "assistant") * 5000]
    (tmp_path / "long.json").write_text(json.dumps({"system": None, "messages": messages}))
    started = time.process_time()
    script = f"/load {tmp_path}/long.json\nHello\nAgain\n"
    result = CliRunner().invoke(main, ["chat", "--models", str(models)], input=script)
    assert result.exit_code == 0, result.stderr
    assert "does not see the oldest 99" in result.stderr
    assert time.process_time() - started < 15


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_written(models: Path, tmp_path: Path) -> None:
    """A limit of the kernel's on the size of files stands for the disk: the last write is cut short by it."""
    source, output = _batch(tmp_path, 30), tmp_path / "out.jsonl"
    command = _command(models, source, output)
    done = _run(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))
    assert done.returncode == 1
    message = f"Error: {output}: cannot be written: File too large; what is there stays, and --resume continues it"
    assert done.stderr.splitlines()[-1] == message
    assert output.stat().st_size == 8192
    written = output.read_bytes()
    assert _run([*command, b"--resume"]).returncode == 0
    assert output.read_bytes().startswith(written[: written.rindex(b"\n") + 1])
    assert _texts(output) == _texts(_whole(models, source, tmp_path))


@pytest.mark.slow
def test_a_batch_that_is_killed_again_and_again(models: Path, tmp_path: Path) -> None:
    """Killed five times at random places of its output and resumed, it has each record once, as if undisturbed."""
    chance = random.Random(20261123)
    source, output = _batch(tmp_path, 120), tmp_path / "out.jsonl"
    command = _command(models, source, output)
    for _ in range(5):
        size = output.stat().st_size if output.exists() else 0
        wanted = size + chance.randint(1, 9000)  # some 1,000 bytes each
        end = time.monotonic() + processes.LIMIT
        with processes.running([bytes(ME_LOCAL), *command, b"--resume"]) as started:
            while started.process.poll() is None and (not output.exists() or output.stat().st_size < wanted):
                assert time.monotonic() < end, started.log
                os.sched_yield()
        assert started.process.returncode == -9
    before = output.read_bytes()
    assert 0 < before.count(b"\n") < 120
    assert _run([*command, b"--resume"]).returncode == 0
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert [record["id"] for record in records(output)] == list(range(120))
    assert _texts(output) == _texts(_whole(models, source, tmp_path))


def _batch(folder: Path, count: int) -> Path:
    return jsonl(folder / "in.jsonl", *({"id": i, "prompt": f"the cat {i}", "seed": i} for i in range(count)))


def _command(models: Path, source: Path, output: Path) -> list[bytes]:
    return [b"generate", b"--models", bytes(models), b"--input", bytes(source), b"--output", bytes(output)]


def _run(arguments: list[bytes], **options: Any) -> CompletedProcess[str]:
    return processes.run([bytes(ME_LOCAL), *arguments], **options)


def _whole(models: Path, source: Path, folder: Path) -> Path:
    output = folder / "whole.jsonl"
    assert _run(_command(models, source, output)).returncode == 0
    return output


def _texts(output: Path) -> list[tuple[int, str, Any]]:
    """Everything of the records that does not depend on the speed."""
    return [(record["id"], record["text"], record["pieces"]) for record in records(output)]
