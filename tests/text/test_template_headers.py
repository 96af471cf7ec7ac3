"""Templates as the header of a GGUF has them: blank, with a byte order mark, not in UTF-8, or of other contents."""

import struct
from pathlib import Path

import pytest
from make_tiny_models import write_model
from tiny_architectures import llama_model
from tiny_vocabularies import bos_vocab, chatml_vocab

from me_local import ConfigError, Ensemble, load
from me_local.text.messages import Message

HI = [Message("user", "Hi there")]
CALM = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
PARTS = "{% for m in messages %}[{% for p in m.content %}{{ p.text }}{% endfor %}]{% endfor %}"


def models_with(folder: Path, template: bytes, *, bos: bool = False) -> Path:
    """A models.toml of one model whose header has these bytes as its chat template."""
    vocab = bos_vocab() if bos else chatml_vocab()
    path = folder / "m.gguf"
    # Tensors start at the next multiple of 32 bytes, so 32 more or less in front of them change nothing else.
    stand_in = b"#" * (len(template) + 32)
    write_model(path, vocab=vocab, model=llama_model(vocab, 1), chat_template=stand_in.decode())
    written = path.read_bytes()
    entry = struct.pack("<Q", len(stand_in)) + stand_in
    assert written.count(entry) == 1
    path.write_bytes(written.replace(entry, struct.pack("<Q", len(template)) + template))
    models = folder / "models.toml"
    models.write_text(f'[[members]]\nname = "m"\npath = "{path}"\nn_ctx = 256\nn_threads = 1\n')
    return models


def text_of(ensemble: Ensemble, ids: list[int]) -> str:
    """Control tokens by their names, other tokens as text."""
    words = ensemble.members[0].vocabulary
    return b"".join(words.pieces[i] or words.text_of(i).encode() for i in ids).decode()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [b"", b" \n\t ", "\ufeff\n".encode()])
def test_a_blank_template_is_as_none(tmp_path: Path, template: bytes, bos: bool) -> None:
    with load(models_with(tmp_path, template, bos=bos)) as ensemble:
        prompt = text_of(ensemble, ensemble.writers[0].prompt(HI).tolist())
        assert prompt.removeprefix("<s>").endswith("assistant.\n\nUser:\nHi there\n\nAssistant:\n")
        assert ["no chat template, so it sees a plain transcript" in notice for notice in ensemble.notices] == [True]


@pytest.mark.parametrize("template", [CALM.encode(), PARTS.encode(), ("\ufeff" + CALM).encode()])
def test_a_template_shows_the_message_and_nothing_of_its_file(tmp_path: Path, template: bytes) -> None:
    with load(models_with(tmp_path, template)) as ensemble:
        assert text_of(ensemble, ensemble.writers[0].prompt(HI).tolist()) == "[Hi there]"
        assert ensemble.notices == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (b"caf\xe9 " + CALM.encode(), "the chat template in the GGUF is not UTF-8: set chat_template"),
        (b"Hello!", "the chat template in the GGUF leaves out the message that is to be answered: set chat_template"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line_and_another_can(
    tmp_path: Path, template: bytes, message: str
) -> None:
    models = models_with(tmp_path, template)
    with pytest.raises(ConfigError) as raised:
        load(models)
    assert str(raised.value).startswith(f'{models}: member "m": {message}')
    assert "\n" not in str(raised.value)
    models.write_text(models.read_text() + 'chat_template = "chatml"\n')
    with load(models) as ensemble:
        prompt = text_of(ensemble, ensemble.writers[0].prompt(HI).tolist())
    assert prompt == "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"


def test_what_a_template_leaves_out_is_a_notice(tmp_path: Path) -> None:
    with load(models_with(tmp_path, b"{{ messages[-1].content }}")) as ensemble:
        assert ensemble.notices == [
            "m: its chat template leaves out: the system message, earlier messages, earlier replies"
        ]
