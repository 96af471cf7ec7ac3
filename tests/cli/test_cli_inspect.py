"""`me-local inspect`: templates, prompts as members see them, and advice."""

import json
import re
from pathlib import Path

import make_tiny_models
from commands import Run, WriteModels, one_line, run

__all__ = ["run"]


def test_templates(run: Run, write_models: WriteModels, tmp_path: Path) -> None:
    models = write_models("bpe_a", "spm")
    result = run("inspect", "--template", models=models)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"bpe_a: in the GGUF\n{make_tiny_models.CHATML}\n\nspm: none in the GGUF, so it sees a plain transcript\n\n"
    )
    told = json.loads(run("inspect", "--template", "--json", models=models).stdout)
    assert [(one["name"], one["template"]) for one in told] == [("bpe_a", make_tiny_models.CHATML), ("spm", None)]
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}\n")
    others = write_models("bpe_a", "spm", member=f'chat_template = "{file}"')
    assert f"bpe_a: {file}\n{{{{ messages[0].content }}}}\n" in run("inspect", "--template", models=others).stdout
    file.unlink()
    one_line(run("inspect", "--template", models=others), 2, "own.jinja: No such file")
    for name, says in (("chatml", "llama.cpp's chatml"), ("plain", "a plain transcript, as models.toml has it")):
        models = write_models("bpe_a", member=f'chat_template = "{name}"')
        assert run("inspect", "--template", models=models).stdout == f"bpe_a: {says}\n\n"


def test_what_members_see(run: Run, write_models: WriteModels) -> None:
    models = write_models("bpe_a", "spm", top='[ensemble]\nsystem = "Be kind."')
    # What looks like a control token in a message is text.
    result = run("inspect", "--prompt", "Hi <|im_end|>", models=models)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.split("spm: ")
    assert first.split(" tokens\n")[1] == (
        "⟦<|im_start|>⟧system\nBe kind.⟦<|im_end|>⟧\n⟦<|im_start|>⟧user\nHi <|im_end|>⟦<|im_end|>⟧\n"
        "⟦<|im_start|>⟧assistant\n\n\n"
    )
    assert "⟦<s>⟧ Be kind.\n\nUser:\nHi <|im_end|>\n\nAssistant:\n" in second
    told = json.loads(run("inspect", "--prompt", "Hi", "--json", models=models).stdout)
    assert [one["name"] for one in told] == ["bpe_a", "spm"]
    assert told[0]["parts"][0] == {"text": "<|im_start|>", "control": True, "tokens": 1}
    assert sum(part["tokens"] for part in told[1]["parts"] if part["control"]) == 1


def test_wrong_uses_are_one_line(run: Run) -> None:
    one_line(run("inspect", "--template", "--prompt", "x"), 2, "--template and --prompt: one of the two")
    one_line(run("inspect", "--prompt", " "), 2, "the prompt is empty")


def test_memory_and_advice(run: Run, write_models: WriteModels) -> None:
    models = write_models("bpe_a", "spm")
    result = run("inspect", models=models)
    assert "together: " in result.stdout
    assert "room for      2,048 tokens, all that it was trained with" in result.stdout
    assert "parted as gpt-2 does" in result.stdout
    assert (
        len(
            re.findall(
                r"  a step        [\d.]+ ms, 8 tokens at once [\d.]+; 1\.\d bytes of text, [\d,]+ a second",
                result.stdout,
            )
        )
        == 2
    )
    assert "plain (a base model?)" in result.stdout
    assert "Advice: spm: it seems to be a base model" in result.stderr
    assert "512 tokens of context are soon full: n_ctx = 2048, gives it more" in result.stderr
    told = json.loads(run("inspect", "--json", models=models).stdout)
    assert [member["base"] for member in told["members"]] == [False, True]
    assert len(told["advice"]) >= 3
    assert told["memory"]["free"] is None or told["memory"]["free"] > 0
