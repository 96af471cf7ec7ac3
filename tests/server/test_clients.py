"""Packages that speak to such servers, the real ones: each has a conversation, calls a tool, and gets a typed answer.

The tiny models write nonsense, so tools are called and types are kept where the grammar makes them.
"""

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import fetch_node_clients
import numpy as np
import pytest
import tokenizers
from conftest import OpenMember, logits_of, write_toml
from processes import run
from pydantic import BaseModel, ConfigDict
from served import Served, served
from thinkers import write_thinkers
from tiny_vocabularies import chatml_vocab

from me_local import Ensemble
from me_local.server.app import Access

pytestmark = pytest.mark.slow
clients = pytest.mark.clients

MESSAGES: list[Any] = [{"role": "user", "content": "How late is it in Paris?"}]
TOWNS = ("Paris", "Köln")
SCHEMA = {
    "type": "object",
    "properties": {"town": {"enum": list(TOWNS)}},
    "required": ["town"],
    "additionalProperties": False,
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": SCHEMA}}
ONE_CALL: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}


NODE = fetch_node_clients.folder()
"""Before the tests get a cache of their own."""


class Place(BaseModel):
    """A town."""

    model_config = ConfigDict(extra="forbid")

    town: Literal["Paris", "Köln"]


def clock(town: Literal["Paris", "Köln"]) -> str:
    """Tells the time in a town."""
    return f"noon in {town}"


@pytest.fixture(scope="module")
def server(two_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = tmp_path_factory.mktemp("clients") / "models.toml"
    models.write_text(two_models.read_text().replace("n_ctx = 512", "n_ctx = 2048"))
    with served(models, Access(aliases=["claude-tiny"])) as running:
        yield running


@pytest.fixture(scope="module")
def thinking(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model that thinks."""
    with served(write_thinkers(tmp_path_factory.mktemp("thinking"), tiny)) as running:
        yield running


@pytest.fixture(scope="module")
def seed(thinking: Served) -> int:
    """By which there is a thought and an answer to MESSAGES."""
    chat = thinking.openai.chat.completions
    for seed in range(500):
        [choice] = chat.create(model="me-local", messages=MESSAGES, max_tokens=40, seed=seed).choices
        message = choice.message.to_dict()
        if message["content"] and message.get("reasoning_content") and choice.finish_reason == "stop":
            return seed
    pytest.fail("no seed of a reply with a thought and an answer")


def package(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of a package, kept from asking the network for what it likes to know."""
    for variable in ("LITELLM_LOCAL_MODEL_COST_MAP", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "True")
    return importlib.import_module(name)


def test_openai(server: Served) -> None:
    """Streamed calls, and what its helpers make of schemas."""
    chat = server.openai.chat.completions
    with chat.stream(model="me-local", messages=MESSAGES, tools=[CLOCK], **ONE_CALL) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments)["town"] in TOWNS
    asked = {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude={"index"})]}
    results: list[Any] = [*MESSAGES, asked, {"role": "tool", "tool_call_id": call.id, "content": "noon"}]
    answer = chat.create(model="me-local", messages=results, tools=[CLOCK], tool_choice="none", max_tokens=5, seed=1)
    assert answer.choices[0].finish_reason in ("stop", "length")
    parsed = chat.parse(model="me-local", messages=MESSAGES, response_format=Place).choices[0].message.parsed
    assert parsed is not None
    assert parsed.town in TOWNS
    response = server.openai.responses.parse(model="me-local", input="the cat", text_format=Place)
    assert isinstance(response.output_parsed, Place)


def test_openai_gets_thoughts(thinking: Served, seed: int) -> None:
    """Whole, in chunks and events, and handed back."""
    chat = thinking.openai.chat.completions
    fields: dict[str, Any] = {"model": "me-local", "messages": MESSAGES, "seed": seed, "max_tokens": 40}
    whole = chat.create(**fields).choices[0].message
    deltas = [choice.delta.to_dict() for chunk in chat.create(stream=True, **fields) for choice in chunk.choices]
    for field in ("content", "reasoning_content"):
        assert "".join(str(delta.get(field) or "") for delta in deltas) == whole.to_dict()[field]
        assert whole.to_dict()[field]
    turns: list[Any] = [*MESSAGES, whole.to_dict(), *MESSAGES]
    assert chat.create(model="me-local", messages=turns, max_tokens=5).usage
    asked: dict[str, Any] = {"model": "me-local", "max_output_tokens": 40, "extra_body": {"seed": seed}}
    responses = thinking.openai.responses
    with responses.stream(input=MESSAGES[0]["content"], **asked) as events:
        told = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        final = events.get_final_response()
    thought, message = final.output
    assert thought.type == "reasoning"
    assert "".join(told) == thought.content[0].text == whole.to_dict()["reasoning_content"]  # type: ignore[index]
    assert final.output_text == whole.content
    again: list[Any] = [*MESSAGES, thought.to_dict(), message.to_dict(), *MESSAGES]
    assert responses.create(model="me-local", input=again, max_output_tokens=5, reasoning={"effort": "low"}).usage


@clients
def test_anthropic_gets_thoughts(thinking: Served, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    anthropic = package("anthropic", monkeypatch)
    with anthropic.Anthropic(base_url=thinking.url, api_key="none", max_retries=0, timeout=60) as client:
        asked: dict[str, Any] = {"model": "me-local", "messages": MESSAGES, "max_tokens": 40}
        on = {"type": "enabled", "budget_tokens": 1024}
        seeded = {"extra_body": {"seed": seed}}
        whole = client.messages.create(**asked, thinking=on, **seeded).content
        with client.messages.stream(**asked, thinking=on, **seeded) as stream:
            told = [event.thinking for event in stream if event.type == "thinking"]
            final = stream.get_final_message().content
        assert [block.type for block in whole] == ["thinking", "text"]
        assert [block.to_dict() for block in final] == [block.to_dict() for block in whole]
        assert "".join(told) == whole[0].thinking
        turns = [*MESSAGES, {"role": "assistant", "content": whole}, *MESSAGES]
        assert client.messages.create(**asked | {"messages": turns}).usage
        off = client.messages.create(**asked, thinking={"type": "disabled"}).content
        assert [block.type for block in off] == ["text"]


@clients
def test_anthropic(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    anthropic = package("anthropic", monkeypatch)
    tool = {"name": "clock", "description": "The time.", "input_schema": SCHEMA}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        asked = {"model": "claude-tiny", "messages": MESSAGES}
        assert client.messages.create(**asked, max_tokens=5).usage.output_tokens >= 1
        choice = {"type": "any", "disable_parallel_tool_use": True}
        with client.messages.stream(**asked, max_tokens=60, tools=[tool], tool_choice=choice) as stream:
            told = stream.get_final_message()
        assert told.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": told.content[0].id, "content": "noon"}
        turns = [*MESSAGES, {"role": "assistant", "content": told.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(model="claude-tiny", messages=turns, tools=[tool], max_tokens=5).usage
        assert client.messages.parse(**asked, max_tokens=60, output_format=Place).parsed_output.town in TOWNS
        assert client.messages.count_tokens(**asked).input_tokens > 1
        assert "claude-tiny" in [model.id for model in client.models.list()]
        with pytest.raises(anthropic.NotFoundError, match="claude-huge"):
            client.messages.create(model="claude-huge", messages=MESSAGES, max_tokens=5)


@clients
def test_the_loop_of_anthropic_runs_tools(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for a stored conversation first, and has to go on without one."""
    anthropic = package("anthropic", monkeypatch)
    called: list[str] = []

    @anthropic.beta_tool(input_schema=SCHEMA)  # type: ignore[untyped-decorator]
    def look(town: str) -> str:
        """Tells the time."""
        called.append(town)
        return "noon"

    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        choice = {"type": "any", "disable_parallel_tool_use": True}
        runner = client.beta.messages.tool_runner(
            model="me-local", max_tokens=60, messages=MESSAGES, tools=[look], tool_choice=choice, max_iterations=2
        )
        assert [message.stop_reason for message in runner] == ["tool_use", "tool_use"]
    assert called
    assert set(called) <= set(TOWNS)


@clients
def test_litellm(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    litellm = package("litellm", monkeypatch)
    openai = {"model": "openai/me-local", "api_base": f"{server.url}/v1"}
    for where in (openai, {"model": "anthropic/claude-tiny", "api_base": server.url}):
        fields = where | {"api_key": "none", "messages": MESSAGES, "num_retries": 0, "timeout": 60}
        assert litellm.completion(**fields, max_tokens=5).usage.completion_tokens >= 1
        chunks = list(litellm.completion(**fields, max_tokens=5, stream=True))
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        answer = litellm.completion(**fields, max_tokens=100, tools=[CLOCK], **ONE_CALL)
        [call] = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["town"] in TOWNS
    typed = litellm.completion(**openai, api_key="none", messages=MESSAGES, response_format=Place, timeout=60)
    assert Place.model_validate_json(typed.choices[0].message.content)
    long = [{"role": "user", "content": "x " * 3000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**openai, api_key="none", messages=long, num_retries=0, timeout=60)


@clients
@pytest.mark.parametrize("responses", [False, True])
def test_langchain(server: Served, monkeypatch: pytest.MonkeyPatch, responses: bool) -> None:
    chat_openai = package("langchain_openai", monkeypatch).ChatOpenAI
    messages = package("langchain_core.messages", monkeypatch)
    model = chat_openai(
        model="me-local", base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, max_tokens=100,
        use_responses_api=responses, stream_usage=True,
    )  # fmt: skip
    bound = model.bind_tools([clock], strict=True, **ONE_CALL)
    said = bound.invoke("the cat")
    [call] = said.tool_calls
    assert clock(**call["args"]) in [f"noon in {town}" for town in TOWNS]
    result = messages.ToolMessage("noon", tool_call_id=call["id"])
    assert bound.invoke([messages.HumanMessage("the cat"), said, result]).tool_calls
    assert sum((chunk for chunk in model.stream("the cat")), start=messages.AIMessageChunk("")).usage_metadata
    for method in ("json_schema", "function_calling"):
        assert model.with_structured_output(Place, method=method, strict=True).invoke("the cat").town in TOWNS


@clients
@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(server: Served, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pydantic_ai = package("pydantic_ai", monkeypatch)
    models, providers = (package(f"pydantic_ai.{name}.openai", monkeypatch) for name in ("models", "providers"))
    provider = providers.OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    model = getattr(models, kind)("me-local", provider=provider)
    called: list[str] = []

    def look(town: Literal["Paris", "Köln"]) -> str:
        called.append(town)
        return "noon"

    for output in (Place, pydantic_ai.NativeOutput(Place)):
        assert pydantic_ai.Agent(model, output_type=output).run_sync("the cat").output.town in TOWNS
    for _ in range(30):  # each reply is one of two tools: that none of these is `look` has odds of one in 10^9 or so
        agent = pydantic_ai.Agent(model, output_type=Place, tools=[look], retries=0)
        limits = pydantic_ai.UsageLimits(request_limit=5)
        try:
            answer = agent.run_sync("the cat", usage_limits=limits).output
        except pydantic_ai.UsageLimitExceeded:
            continue
        if called:
            break
    assert set(called) <= set(TOWNS)
    assert called
    assert answer.town in TOWNS


@clients
def test_autogen(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    client_of = package("autogen_ext.models.openai", monkeypatch).OpenAIChatCompletionClient
    tools, models = (package(f"autogen_core.{name}", monkeypatch) for name in ("tools", "models"))
    abilities = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True}

    async def talk() -> tuple[Any, Any, Any, Any]:
        client = client_of(
            model="me-local", base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60,
            model_info=abilities | {"family": "unknown"},
        )  # fmt: skip
        said = [models.UserMessage(content="the cat", source="user")]
        try:
            look = tools.FunctionTool(clock, description="The time.", strict=True)
            one = {"parallel_tool_calls": False}
            return (
                await client.create(said, extra_create_args={"max_tokens": 5}),
                await client.create(said, tools=[look], tool_choice="required", extra_create_args=one),
                await client.create(said, json_output=Place),
                [event async for event in client.create_stream(said, extra_create_args={"max_tokens": 5})][-1],
            )
        finally:
            await client.close()

    plain, call, typed, streamed = asyncio.run(talk())
    assert plain.finish_reason in ("stop", "length")
    assert json.loads(call.content[0].arguments)["town"] in TOWNS
    assert Place.model_validate_json(typed.content)
    assert streamed.finish_reason in ("stop", "length")


def program(name: str, *arguments: str, **variables: str) -> str:
    """What a program of a package prints."""
    path = os.pathsep.join(path for path in sys.path if path)
    command = f"import sys; from {name} import *; sys.argv[0] = 'x'; sys.exit({_MAIN[name]}())"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": path}
    done = run([sys.executable, "-c", command, *arguments], seconds=300, env=os.environ | offline | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


_MAIN = {"llm.cli": "cli", "lm_eval.__main__": "cli_evaluate"}


@clients
def test_llm(server: Served, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ensemble\n  model_name: me-local\n  api_base: {server.url}/v1\n"
        "  supports_tools: true\n  supports_schema: true\n"
    )
    (tmp_path / "tools.py").write_text("def clock() -> str:\n    return 'noon'\n")

    def llm(*arguments: str) -> str:
        return program("llm.cli", "-m", "ensemble", "--key", "none", *arguments, LLM_USER_PATH=str(tmp_path))

    assert llm("the cat", "-o", "max_tokens", "20", "-o", "seed", "1").strip()
    assert llm("the cat", "-o", "max_tokens", "20", "-o", "seed", "1", "--no-stream").strip()
    assert llm("go on", "-c", "-o", "max_tokens", "20", "-o", "seed", "2").strip()
    assert json.loads(llm("the cat", "--schema", json.dumps(SCHEMA)))["town"] in TOWNS
    assert llm("the cat", "--functions", str(tmp_path / "tools.py"), "-o", "max_tokens", "20", "-o", "seed", "1")


TASK = """\
task: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
GENERATION = """\
doc_to_target: mat
generation_kwargs: {until: ["xyz"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@clients
def test_lm_eval_generates(server: Served, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "the cat sat on the"}\n{"question": "the dog"}\n')
    task = TASK.format(kind="generate_until", data=tmp_path / "data.jsonl", rest=GENERATION)
    (tmp_path / "task.yaml").write_text(task)
    where = f"base_url={server.url}/v1/chat/completions,model=me-local,max_retries=1,tokenizer_backend=None"
    before = server.metric("replies_total")
    told = program(
        "lm_eval.__main__", "run", "--model", "local-chat-completions", "--model_args", where, "--apply_chat_template",
        "--tasks", "generate_until", "--include_path", str(tmp_path), OPENAI_API_KEY="none",
    )  # fmt: skip
    assert "exact_match" in told
    assert server.metric("replies_total") == before + 2


@clients
def test_lm_eval_scores(server: Served, open_member: OpenMember, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sends for a likelihood, and its own reading of the answer: that of one member's tokens."""
    lm_eval = package("lm_eval.models.openai_completions", monkeypatch).LocalCompletionsAPI
    asked = {"model": "me-local/bpe_a", "content": "the cat sat on the mat"}
    ids = server.http.post("/tokenize", json=asked).json()["tokens"]
    body = {"model": "me-local/bpe_a", "prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1}
    answer = server.http.post("/v1/completions", json=body | {"echo": True}).json()
    [(told, _)] = lm_eval.parse_logprobs(answer, ctxlens=[len(ids) - 2])
    member = open_member("bpe_a")
    before = [*server.ensemble.writers[0].raw_prompt().tolist(), *ids]
    expected = 0.0
    for place in (len(before) - 2, len(before) - 1):
        logits = logits_of(member, np.array(before[:place], np.int32)).astype(float)
        expected += logits[before[place]] - np.logaddexp.reduce(logits)
    assert told == pytest.approx(expected, abs=1e-3)


QUESTIONS = [
    {"question": "Q: What did Anna count?\nA:", "choices": ["the lights", "the dogs", "12", "the harbour"]},
    {"question": "Q: Who came home?\nA:", "choices": ["boats", "the cat\n", "café", "her brother laughed"]},
    {"question": "The harbour was:", "choices": ["se", "e", "see"]},  # " se" is the likeliest
]
CHOICES = """\
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@clients
def test_lm_eval_chooses(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Questions as those of ARC: what it finds for each choice is the ensemble's own likelihood of it."""
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = TASK.format(kind="multiple_choice", data=tmp_path / "data.jsonl", rest=CHOICES)
    (tmp_path / "task.yaml").write_text(task)
    models = write_toml(tmp_path, tiny, "bpe_a", "bpe_b", weights=[0.3, 0.7], top="", member="")
    with served(models) as server:
        where = (
            f"base_url={server.url}/v1/completions,model=me-local,max_retries=1,max_length=512,"
            f"tokenizer={tmp_path}/tokenizer,tokenizer_backend=huggingface"
        )
        program(
            "lm_eval.__main__", "run", "--model", "local-completions", "--model_args", where, "--batch_size", "3",
            "--tasks", "multiple_choice", "--include_path", str(tmp_path), "--log_samples",
            "--output_path", str(tmp_path / "out"), OPENAI_API_KEY="none",
        )  # fmt: skip
        [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
        found = {sample["doc_id"]: sample for sample in map(json.loads, samples.read_text().splitlines())}
        for number, question in enumerate(QUESTIONS):
            choices = [f" {choice}" for choice in question["choices"]]
            scores = [server.ensemble.score(str(question["question"]), choice, raw=True) for choice in choices]
            told = [float(response[0]) for [response] in found[number]["resps"]]
            assert told == pytest.approx([score.log_likelihood for score in scores], abs=1e-3)
            greedy = [response[1] == "True" for [response] in found[number]["resps"]]
            assert greedy == [is_greedy(server.ensemble, str(question["question"]), choice) for choice in choices]
        assert greedy[:2] == [True, False]


def is_greedy(ensemble: Ensemble, question: str, choice: str) -> bool:
    """Whether each token of a choice is the likeliest of the mixture, by fresh evaluations of both members."""
    first, second = ensemble.members
    before = first.vocabulary.encode(question.encode(), at_start=True)
    ids = first.vocabulary.encode((question + choice).encode(), at_start=True)
    assert ids[: len(before)] == before
    for place in range(len(before), len(ids)):
        row = sum(
            weight * softmax(member, ids[:place]) for weight, member in zip((0.3, 0.7), (first, second), strict=True)
        )
        if int(np.argmax(row)) != ids[place]:
            return False
    return True


def softmax(member: Any, ids: list[int]) -> Any:
    logits = logits_of(member, np.array(ids, np.int32)).astype(float)
    never = [i for i, piece in enumerate(member.vocabulary.pieces) if not piece and i not in member.vocabulary.end_ids]
    logits[never] = -np.inf
    return np.exp(logits - np.logaddexp.reduce(logits))


def make_tokenizer(folder: Path) -> None:
    """The vocabulary of bpe_a, as the transformers library reads it."""
    vocabulary = chatml_vocab()
    tokens = {token.text: number for number, token in enumerate(vocabulary.tokens)}
    model = tokenizers.models.BPE(vocab=tokens, merges=[tuple(pair.split(" ")) for pair in vocabulary.merges])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": vocabulary.eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


@pytest.mark.node
def test_packages_of_node(server: Served) -> None:
    """OpenAI's, the AI SDK, and Anthropic's."""
    script = Path(__file__).with_name("clients.mjs")
    done = run(["node", script, NODE, server.url], seconds=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("runTools")
    assert told.pop("finish") in ("stop", "length")
    for name, towns in told.items():
        assert set(towns) <= set(TOWNS), name
        assert towns, name
    assert set(told) == {"stream", "response", "object", "tool", "anthropic"}
