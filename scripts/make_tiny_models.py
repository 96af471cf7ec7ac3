"""Write the tiny random-weight GGUF models that the tests run on.

Contract: ``make_all(folder)`` writes one file per name in ``NAMES`` and returns their paths. The bytes are
the same on every run; each file is well under 1 MB. The models have learnt nothing, but their next-token
distributions look like a model's: mostly 2 to 4 nats of entropy that depend on the context, an end of
generation about every fifty tokens, many letters and spaces, now and then a piece that cuts a character.

    bpe_a, bpe_b   one byte-level BPE vocabulary, two sets of weights; only bpe_a has a chat template (ChatML)
    bpe_c          another byte-level BPE vocabulary, which starts every prompt with <s>
    spm            a SentencePiece vocabulary with byte tokens and a space prefix

These four are Llamas, with full attention. Of the other kinds of memory there is one each:

    swa            Gemma 3, one layer with a sliding window; the vocabulary of spm
    recurrent      Mamba; the vocabulary of bpe_c
    hybrid         Jamba, Mamba and attention in turn; the vocabulary of bpe_a

``tiny_vocabularies`` has the tokenizers and ``tiny_architectures`` the weights; ``write_model`` puts both into
a file, so a test can pass it a damaged one.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValueType, GGUFWriter
from tiny_architectures import Model, gemma_model, jamba_model, llama_model, mamba_model
from tiny_vocabularies import Vocab, bos_vocab, chatml_vocab, spm_vocab

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(
    path: Path, *, vocab: Vocab, model: Model, chat_template: str | None = None, split_max_tensors: int = 0
) -> None:
    """Write a GGUF file with 32-bit floats; with `split_max_tensors`, several of them."""
    writer = GGUFWriter(path, model.arch, split_max_tensors=split_max_tensors)
    writer.add_name(path.stem)
    for key, value in model.hyper.items():
        if isinstance(value, list):
            writer.add_array(f"{model.arch}.{key}", value)
        else:
            of = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.FLOAT32
            writer.add_key_value(f"{model.arch}.{key}", value, of)
    add_vocab(writer, vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, tensor in model.tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocab(writer: GGUFWriter, vocab: Vocab) -> None:
    """Add the tokenizer's keys to the file."""
    texts = [token.text for token in vocab.tokens]
    writer.add_tokenizer_model(vocab.model)
    writer.add_token_list(texts)
    writer.add_token_types([token.type for token in vocab.tokens])
    if vocab.model == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(vocab.merges)
    else:
        writer.add_token_scores([token.score for token in vocab.tokens])
        writer.add_add_space_prefix(True)
        writer.add_unk_token_id(texts.index("<unk>"))
    writer.add_bos_token_id(texts.index(vocab.bos))
    writer.add_eos_token_id(texts.index(vocab.eos))
    writer.add_add_bos_token(vocab.add_bos)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one tiny model is made of."""

    vocab: Callable[[], Vocab]
    weights: Callable[[Vocab, int], Model]
    seed: int
    chat_template: str | None = None


MODELS = {
    "bpe_a": Recipe(chatml_vocab, llama_model, 1, CHATML),
    "bpe_b": Recipe(chatml_vocab, llama_model, 2),
    "bpe_c": Recipe(bos_vocab, llama_model, 3),
    "spm": Recipe(spm_vocab, llama_model, 4),
    "swa": Recipe(spm_vocab, gemma_model, 5),
    "recurrent": Recipe(bos_vocab, mamba_model, 6),
    "hybrid": Recipe(chatml_vocab, jamba_model, 7),
}
NAMES = tuple(MODELS)


def make_all(folder: Path) -> dict[str, Path]:
    """Write every model into ``folder``, made where it is missing; give the path of each by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.gguf" for name in NAMES}
    for name, recipe in MODELS.items():
        vocab = recipe.vocab()
        model = recipe.weights(vocab, recipe.seed)
        write_model(paths[name], vocab=vocab, model=model, chat_template=recipe.chat_template)
    return paths


def main() -> None:
    """Write the models into the folder named on the command line and list them."""
    parser = argparse.ArgumentParser(description="Write tiny random-weight GGUF models for the tests.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write them")
    for path in make_all(parser.parse_args().folder).values():
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
