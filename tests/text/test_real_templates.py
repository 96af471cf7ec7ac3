"""Prompts by all templates in llama.cpp's source, its built-in ones too: the ids that llama.cpp gives for their text.

The text is that of llama_chat_apply_template or of llama-cpp-python's own formatter; llama_tokenize then looks for
control tokens in all of it, so contents here have none. Where llama.cpp would put a second BOS there is one.
"""

import ctypes
import functools
import random
from collections.abc import Callable, Sequence

import fetch_vocabularies
import llama_cpp
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from real_vocabularies import NAMES, vocabulary

from me_local.errors import InputError
from me_local.text.messages import Message
from me_local.text.prompts import PromptWriter
from me_local.text.templates import Template, choose_template
from me_local.text.vocabulary import Vocabulary

pytestmark = pytest.mark.vocabularies

CONVERSATIONS = 12  # by each template in each of 17 vocabularies
JINJA = 70
NO_SYSTEM = {"yandex", "google-gemma-2-2b-it"}  # the first leaves out such messages, the second refuses them
NEEDS_FUNCTIONS = "fireworks-ai-llama-3-firefunction-v2"  # refuses a conversation without a variable of its own

# No part is a control token's name or a piece of one that another part or a template could complete.
PARTS = [
    "The",
    " the",
    " cat",
    "s",
    " naïve",
    " дом",
    " 한국",
    "你好",
    "。",
    "🙂",
    "12",
    " 3.14",
    ",",
    ".",
    "\n",
    "\n\n",
]
PARTS += [
    "  ",
    " ",
    "\t",
    "def f(x):\n\treturn x**2",
    "'s",
    "!",
    "\u3000",
    "\u00a0",
    ": ",
    " it is",
    "Paris",
    "<",
    "]",
    "|",
]


def text(random_: random.Random) -> str:
    """A text with white space at either end now and then."""
    parts = random_.choices(PARTS, k=random_.randint(0, 9))
    parts.insert(random_.randint(0, len(parts)), random_.choice(["x", "Paris", "12", "é", "<", "!"]))
    return "".join(parts)


def conversation(random_: random.Random) -> list[Message]:
    turns = [Message("system", text(random_))] if random_.random() < 0.5 else []
    for _ in range(random_.randint(0, 3)):
        turns += [Message("user", text(random_)), Message("assistant", text(random_))]
    return [*turns, Message("user", text(random_))]


def by_hand(messages: Sequence[Message], name: str) -> list[tuple[str, str]]:
    """Role and content, the system message in the first question where the template has no place for it."""
    turns = [(m.role, m.content) for m in messages]
    if name in NO_SYSTEM and turns[0][0] == "system":
        return [("user", f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]]
    return list(turns)


def applied(name: str, turns: Sequence[tuple[str, str]]) -> str:
    """What llama_chat_apply_template makes of a conversation."""
    chat = (llama_cpp.llama_chat_message * len(turns))(
        *[llama_cpp.llama_chat_message(role.encode(), content.encode()) for role, content in turns]
    )
    buffer = ctypes.create_string_buffer(1 << 16)
    length = llama_cpp.llama_chat_apply_template(name.encode(), chat, len(turns), True, buffer, len(buffer))
    assert 0 < length <= len(buffer)
    return buffer.raw[:length].decode()


def formatted(formatter: Jinja2ChatFormatter, turns: Sequence[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(formatter(messages=messages).prompt)
    except TypeError:  # some loop over the tools, of which there are none
        return str(formatter(messages=messages, tools=[]).prompt)


def tokenised(words: Vocabulary, rendered: str) -> list[int]:
    """What llama_tokenize gives with its own additions, but without a BOS that stands there twice."""
    raw = rendered.encode()
    buffer = (llama_cpp.llama_token * (len(raw) + 16))()
    length = llama_cpp.llama_tokenize(words._pointer, raw, len(raw), buffer, len(buffer), True, True)
    assert length > 0
    ids = list(buffer[:length])
    if llama_cpp.llama_vocab_get_add_eos(words._pointer):
        ids.pop()
    return ids[1:] if words.bos is not None and ids[:2] == [words.bos] * 2 else ids


def check(name: str, words: Vocabulary, template: Template, text_of: Callable[[list[tuple[str, str]]], str]) -> None:
    """Compare prompts by a template with llama.cpp's."""
    assert template.remarks == ()
    writer = PromptWriter(words, template.render)
    random_ = random.Random(f"{name} {words.size}")
    for _ in range(CONVERSATIONS):
        messages = conversation(random_)
        expected = tokenised(words, text_of(by_hand(messages, name)))
        assert writer.prompt(messages).tolist() == expected, (name, messages)


def built_in_names() -> list[str]:
    names = (ctypes.c_char_p * 100)()
    return [name.decode() for name in names[: llama_cpp.llama_chat_builtin_templates(names, len(names))]]


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary_name", NAMES)
def test_built_in_templates(vocabulary_name: str) -> None:
    words = vocabulary(vocabulary_name)
    assert {"chatml", "llama2", "mistral-v7", "deepseek2", "yandex"} <= set(built_in_names())
    for name in built_in_names():
        check(name, words, choose_template(name, None, {}), functools.partial(applied, name))


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary_name", NAMES)
def test_templates_of_known_models(vocabulary_name: str) -> None:
    words = vocabulary(vocabulary_name)
    tokens = {"bos_token": words.text_of(words.bos or 0), "eos_token": words.text_of(words.end_ids[0])}
    paths = fetch_vocabularies.kept(fetch_vocabularies.folder(), ".jinja")
    assert len(paths) == JINJA
    for path in paths:
        if path.stem != NEEDS_FUNCTIONS:
            formatter = Jinja2ChatFormatter(path.read_text(), **tokens)
            check(path.stem, words, choose_template(str(path), None, tokens), functools.partial(formatted, formatter))


def test_one_that_needs_a_variable_of_its_own_says_so() -> None:
    path = fetch_vocabularies.folder() / "templates" / f"{NEEDS_FUNCTIONS}.jinja"
    with pytest.raises(InputError, match="refuses the conversation: 'functions' is undefined"):
        choose_template(str(path), None, {}).render([Message("user", "Hi")])
