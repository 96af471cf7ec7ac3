"""A tiny model that thinks: its template opens a thought, which it closes after some pieces, by a control token."""

from pathlib import Path

import make_tiny_models
from make_tiny_models import CHATML
from tiny_architectures import CONSTANT, llama_model
from tiny_vocabularies import chatml_vocab, control

OPENS, CLOSES = "<think>", "</think>"
CLOSING = 1.5  # added to the logit of the likeliest tokens, for the one that closes a thought

TEMPLATE = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message['content'] }}",
).replace(
    "assistant\n{% endif %}",
    "assistant\n{% if reasoning_effort is defined %}[{{ reasoning_effort }}]{% endif %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}",
)
"""ChatML with thoughts: of all replies, and opened unless `enable_thinking` is false. Tells `reasoning_effort`."""


def write_thinker(path: Path, *, closing: float = CLOSING, template: str = TEMPLATE) -> None:
    """Write the model, with both marks as control tokens."""
    vocab = chatml_vocab()
    vocab.tokens.extend(control(OPENS, CLOSES))
    model = llama_model(vocab, 1)
    output = model.tensors["output.weight"]
    output[-1, CONSTANT] = output[:, CONSTANT].max() + closing / 8  # the constant is about 8 there
    make_tiny_models.write_model(path, vocab=vocab, model=model, chat_template=template)


def write_thinkers(folder: Path, tiny: dict[str, Path], *others: str, n_ctx: int = 2048, top: str = "") -> Path:
    """A models.toml of the model that thinks, and of others."""
    write_thinker(folder / "thinker.gguf")
    paths = {"thinker": folder / "thinker.gguf"} | {name: tiny[name] for name in others}
    tables = [
        f'[[members]]\nname = "{name}"\npath = "{path}"\nn_ctx = {n_ctx}\nn_threads = 1\n'
        for name, path in paths.items()
    ]
    models = folder / "models.toml"
    models.write_text("\n".join([top, *tables]))
    return models
