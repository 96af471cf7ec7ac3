"""A coding agent, the real one: it asks the ensemble, runs the tool that is called, and tells what came of it.

The members are made so that they call: each writes one call where a reply begins, and ends behind it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fetch_node_clients
import make_tiny_models
import numpy as np
import pytest
from conftest import write_toml
from gguf import TokenType
from processes import run
from served import Served, served
from tiny_architectures import ATTENTION, COMMON, N_CTX, N_EMBD, Model, llama_model
from tiny_vocabularies import Token, Vocab, bos_vocab, chatml_vocab

pytestmark = [pytest.mark.slow, pytest.mark.node]

AGENT = fetch_node_clients.folder() / "node_modules" / "@qwen-code" / "qwen-code" / "cli.js"
"""Before the tests get a cache of their own."""
OTHERS = ("agent", "ask_user_question", "exit_plan_mode", "send_message", "skill", "task_stop", "tool_search")
"""Tools, each with a long description, that it has beside those that are asked for."""
CALL = '<tool_call>{"name": "run_shell_command", "arguments": {"command": "echo 40 + 2"}}</tool_call>'


def caller(vocab: Vocab) -> tuple[Vocab, Model]:
    """A model whose next token depends on the last one alone: a call behind a line feed, else the end."""
    vocab = replace(vocab, tokens=[*vocab.tokens, Token(CALL.replace(" ", "Ġ"), TokenType.NORMAL, CALL.encode())])
    texts = [token.text for token in vocab.tokens]
    model = llama_model(vocab, 1)
    silent = ("attn_output.weight", "ffn_down.weight")  # of the layer, so that it adds nothing
    one = {name: tensor for name, tensor in model.tensors.items() if not name.startswith("blk.1.")}
    tensors = {name: tensor * 0 if name.endswith(silent) else tensor for name, tensor in one.items()}
    embedding = np.zeros((len(texts), N_EMBD), np.float32)
    output = np.zeros_like(embedding)
    embedding[:, 1] = 1
    embedding[texts.index("Ċ")] = np.eye(N_EMBD)[0]
    output[len(texts) - 1, 0] = output[texts.index(vocab.eos), 1] = 10
    norm = np.ones(N_EMBD, np.float32)
    tensors |= {"token_embd.weight": embedding, "output.weight": output, "output_norm.weight": norm}
    return vocab, Model("llama", COMMON | ATTENTION | {"context_length": 4 * N_CTX, "block_count": 1}, tensors)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("agents")
    files = {name: folder / f"{name}.gguf" for name in ("a", "b")}
    for name, make in (("a", chatml_vocab), ("b", bos_vocab)):
        vocab, model = caller(make())
        make_tiny_models.write_model(files[name], vocab=vocab, model=model, chat_template=make_tiny_models.CHATML)
    models = write_toml(folder, files, "a", "b", weights=None, top="", member="")
    models.write_text(models.read_text().replace("n_ctx = 512", f"n_ctx = {4 * N_CTX}"))
    with served(models) as running:
        yield running


def test_qwen_code(server: Served, tmp_path: Path) -> None:
    """It runs what is called, and asks again with the result."""
    before = server.metric("replies_total")
    told = [json.loads(line) for line in ask(server, tmp_path, "How much is it?").splitlines() if line[:1] == "{"]
    turns = [event["message"]["content"] for event in told if event["type"] in ("assistant", "user")]
    blocks = [block for blocks in turns if isinstance(blocks, list) for block in blocks]
    use = next(block for block in blocks if block["type"] == "tool_use")
    assert (use["name"], use["input"]) == ("run_shell_command", {"command": "echo 40 + 2"})
    result = next(block for block in blocks if block["type"] == "tool_result")
    assert (result["tool_use_id"], result["is_error"]) == (use["id"], False)
    assert "40 + 2" in result["content"]
    assert server.metric("replies_total") == before + 2


def ask(server: Served, folder: Path, question: str) -> str:
    """What it prints of two turns; a third is not allowed, or it would go on for ever.

    Its settings keep it from reporting its use to its makers, and from looking for newer versions of itself.
    """
    (folder / "work").mkdir()
    (folder / ".qwen").mkdir()
    quiet = {"privacy": {"usageStatisticsEnabled": False}, "general": {"enableAutoUpdate": False}}
    quiet["memory"] = {"enableManagedAutoMemory": False}
    (folder / ".qwen" / "settings.json").write_text(json.dumps(quiet))
    own = {"HOME": str(folder), "OPENAI_API_KEY": "none", "OPENAI_BASE_URL": f"{server.url}/v1"}
    command = [
        "node", AGENT, "--auth-type", "openai", "--model", "me-local", "--system-prompt", "You help.",
        "--yolo", "--core-tools", "run_shell_command",
        *(f"--exclude-tools={name}" for name in OTHERS), "--max-session-turns", "2",
        "--output-format", "stream-json", question,
    ]  # fmt: skip
    return run(command, seconds=300, env=os.environ | own, cwd=folder / "work").stdout
