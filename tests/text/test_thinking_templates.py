"""Templates of ten models that think, on tiny models that have their control tokens: ids that llama.cpp gives.

Three turns of a conversation in which the ensemble writes a thought and an answer in the marks of that model. The
prompt of each turn is compared with what llama-cpp-python's own formatter and llama_tokenize make of the same messages.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fetch_vocabularies
import make_tiny_models
import pytest
from gguf import TokenType
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from served import served
from test_real_templates import tokenised
from tiny_architectures import CONSTANT, llama_model
from tiny_vocabularies import Token, chatml_vocab, control

from me_local import Ensemble, Message, Overrides, load
from me_local.chat import Chat
from me_local.config import Constraint
from me_local.llama.member import Member
from me_local.text.thoughts import parted

pytestmark = pytest.mark.vocabularies

MARKS = re.compile(r"</?think>|</?seed:think>")  # that llama.cpp takes for tokens of the text
CONTROL = re.compile(r"<\|[a-z_|A-Z]+?\|>|\[/?[A-Z_]+\]|<｜[^｜<>]{1,30}｜>|</?s>")
WORDS = "[a-z ]{3,12}[a-z]"
TAGS = rf"<think>\n{WORDS}\n</think>\n\n{WORDS}"


@dataclass(frozen=True)
class Model:
    """A template, and how its model writes a reply where no thought is opened for it; `args` are its variables."""

    template: str
    writes: str = ""
    args: str = ""
    thought: str = "reasoning_content"


MODELS = [
    Model("Qwen-Qwen3-0.6B", TAGS),
    Model("deepseek-ai-DeepSeek-R1-Distill-Llama-8B"),
    Model("mistralai-Ministral-3-14B-Reasoning-2512", rf"\[THINK\]{WORDS}\[/THINK\]{WORDS}"),
    Model(
        "openai-gpt-oss-120b",
        rf"<\|channel\|>analysis<\|message\|>{WORDS}<\|end\|><\|start\|>assistant<\|channel\|>final<\|message\|>{WORDS}",
        thought="thinking",
    ),
    Model("GLM-4.7-Flash"),
    Model("HuggingFaceTB-SmolLM3-3B", TAGS),
    Model("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
    Model(
        "ibm-granite-granite-3.3-2B-Instruct", rf"<think>{WORDS}</think><response>{WORDS}</response>", "thinking = true"
    ),
    Model("MiniMax-M2"),
    Model("LFM2.5-8B-A1B", TAGS),
]


def source(model: Model) -> Path:
    return fetch_vocabularies.folder() / "templates" / f"{model.template}.jinja"


def write(model: Model, path: Path, *, thinks: bool = True) -> None:
    """A tiny model with the tokens of the template; one that `thinks` soon ends a thought that is opened for it."""
    vocab = chatml_vocab()
    text = source(model).read_text()
    known = {token.text for token in vocab.tokens}
    names = [name for name in dict.fromkeys(CONTROL.findall(text)) if name not in known]
    marks = [Token(mark, TokenType.USER_DEFINED, mark.encode()) for mark in dict.fromkeys(MARKS.findall(text))]
    more = control("<|return|>", "<|call|>") if "<|channel|>" in names and "<|return|>" not in names else []
    vocab = replace(vocab, tokens=[*vocab.tokens, *(control(*names) if thinks else []), *more, *marks])
    made = llama_model(vocab, 1)
    if thinks and "</think>" in text:
        output = made.tensors["output.weight"]
        ids = [token.text for token in vocab.tokens]
        output[ids.index("</think>"), CONSTANT] = output[:, CONSTANT].max() + 0.2
    make_tiny_models.write_model(path, vocab=vocab, model=made)


def models_toml(folder: Path, model: Model, *others: str) -> Path:
    path = folder / "models.toml"
    write(model, folder / "thinks.gguf")
    args = f"[ensemble]\ntemplate_args = {{ {model.args} }}\n" if model.args else ""
    member = f'[[members]]\nname = "thinks"\npath = "thinks.gguf"\nchat_template = "{source(model)}"\nn_ctx = 2048\n'
    path.write_text("\n".join([args, member, *others]))
    return path


def by_llama_cpp(ensemble: Ensemble, model: Model, messages: Sequence[Message]) -> list[int]:
    """The ids of a prompt, by llama-cpp-python's formatter and llama_tokenize."""
    member = ensemble.members[0]
    assert isinstance(member, Member)
    listed = [
        {"role": m.role, "content": m.content} | ({model.thought: m.thought} if m.thought else {}) for m in messages
    ]
    formatter = Jinja2ChatFormatter(source(model).read_text(), **member.weights.token_texts)
    given = {"thinking": True} if model.args else {}
    text = str(formatter(messages=listed, tools=None, **given).prompt)
    return tokenised(member.vocabulary, text)


def ids_of(ensemble: Ensemble, chat: Chat, messages: Sequence[Message]) -> list[int]:
    head, prompts, _ = ensemble.prompter.prompts(messages, chat.config)
    return [*prompts[0].tolist(), *ensemble.members[0].vocabulary.canonical(head)]


def constraint(ensemble: Ensemble, model: Model, chat: Chat) -> Overrides:
    head, *_ = ensemble.prompter.prompts([Message("user", "Hi")], chat.config)
    assert bool(head) == (not model.writes)
    return Overrides(constraint=Constraint("regex", model.writes or WORDS))


@pytest.mark.parametrize("model", MODELS, ids=[model.template for model in MODELS])
def test_three_turns(model: Model, tmp_path: Path) -> None:
    with load(models_toml(tmp_path, model), Overrides(seed=1, max_tokens=200)) as ensemble:
        chat = Chat(ensemble)
        chat.set(constraint(ensemble, model, chat))
        for n in range(3):
            asked = [*chat.messages, Message("user", f"question {n}, naïve")]
            assert ids_of(ensemble, chat, asked) == by_llama_cpp(ensemble, model, asked)
            reply = chat.say(asked[-1].content).finish()
            assert reply.finish_reason == "stop", reply.text
            check_parted(reply.thought, reply.answer, opened=not model.writes)
            assert chat.messages[-1] == Message("assistant", reply.answer, reply.thought)


@pytest.mark.parametrize("model", MODELS, ids=[model.template for model in MODELS])
def test_three_turns_over_http(model: Model, tmp_path: Path) -> None:
    """The server is told the messages that it gave, and goes on as the chat does whose prompts are checked above."""
    with served(models_toml(tmp_path, model)) as server:
        chat = Chat(server.ensemble)
        wanted = constraint(server.ensemble, model, chat)
        chat.set(replace(wanted, seed=1, max_tokens=200))
        turns: list[Any] = []
        for n in range(3):
            turns.append({"role": "user", "content": f"question {n}, naïve"})
            reply = chat.say(turns[-1]["content"]).finish()
            fields: dict[str, Any] = {"guided_regex": model.writes or WORDS, "seed": reply.seed, "max_tokens": 200}
            [choice] = server.chat(messages=turns, **fields).json()["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (reply.answer, "stop")
            assert choice["message"].get("reasoning_content") == (reply.thought or None)
            turns.append(choice["message"])
        assert any(turn.get("reasoning_content") for turn in turns)


def check_parted(thought: str, answer: str, *, opened: bool) -> None:
    assert re.fullmatch(WORDS, answer.strip())
    assert "THINK" not in thought + answer
    assert "<|" not in answer
    assert opened or re.fullmatch(WORDS, thought.strip())


@pytest.mark.parametrize("model", [MODELS[1], MODELS[2]], ids=["opened", "written"])
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_a_pair_of_one_that_thinks_and_one_that_does_not(
    model: Model, strategy: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    other = f'[[members]]\nname = "other"\npath = "{tiny["bpe_a"]}"\nn_ctx = 2048\n'
    path = models_toml(tmp_path, model, other)
    with load(path, Overrides(seed=1, max_tokens=300, strategy=strategy)) as ensemble:  # type: ignore[arg-type]
        chat = Chat(ensemble)
        chat.set(constraint(ensemble, model, chat))
        head, prompts, _ = ensemble.prompter.prompts([Message("user", "Hi")], chat.config)
        assert len(prompts) == 2
        for n in range(2):
            reply = chat.say(f"question {n}").finish()
            assert reply.finish_reason == "stop"
            check_parted(reply.thought, reply.answer, opened=bool(head))
            assert (reply.thought, reply.answer) == parted(reply.text, ensemble.prompter.kinds, head.decode())
            assert {usage.member for usage in reply.usage if usage.calls} == {"thinks", "other"}


def test_what_a_user_types_is_no_thought(tmp_path: Path) -> None:
    model = MODELS[2]
    with load(models_toml(tmp_path, model), Overrides(seed=1)) as ensemble:
        words = ensemble.members[0].vocabulary
        think = words.control["[THINK]"]
        typed = [
            Message("user", "[THINK] a [/THINK]"),
            Message("assistant", "[THINK]b", "[THINK]c"),
            Message("user", "d"),
        ]
        harmless = [Message("user", "a"), Message("assistant", "b", "c"), Message("user", "d")]
        ids, own = (ensemble.prompter.prompts(said, ensemble.config).ids[0].tolist() for said in (typed, harmless))
        assert ids.count(think) == own.count(think)
        head = ensemble.prompter.raw_prompts("[THINK]", ensemble.config).head
        assert think not in words.canonical(head, typed=len(head), at_start=True)
