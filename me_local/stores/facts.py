"""What the header of a GGUF file says of its model, for those who choose one. The weights are not read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import prod
from pathlib import Path

from me_local.gguf import (
    Cursor,
    DamagedError,
    Known,
    Scalar,
    beginning,
    is_string,
    kind_and_length,
    pass_values,
    scalar,
)
from me_local.stores.quantisations import FILE_TYPES, TENSOR_TYPES
from me_local.text.thoughts import KINDS

_MOST = 1 << 28  # bytes of a header
_DIMENSIONS = 4
_ALIGNMENT = 32  # bytes
_THOUSANDS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))
_TOKENS = "tokenizer.ggml.tokens"
_VOCABULARIES = {"llama": "SPM", "gpt2": "BPE", "bert": "WPM", "t5": "UGM", "rwkv": "RWKV", "plamo2": "PLaMo2"}
_FILES = {
    "adapter": "a LoRA adapter, which goes with a model: lora in models.toml",
    "controlvector": "a control vector, which goes with a model",
    "imatrix": "an importance matrix, which helps to quantise a model",
    "mmproj": "a projector, with which another model sees or hears",
    "clip": "a projector, with which another model sees or hears",
    "t5encoder": "an encoder, which generates no text",
    "t5": "it has an encoder, and only models that are decoders alone can be members",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a header says; `context` and `vocabulary_size` are in tokens, 0 where it does not tell.

    `title` is the model's own name. `vocabulary` is "BPE", "SPM" and so on; files with the same tokens have the same
    `vocabulary_id`. `template` is the chat template, `thinks` whether it has marks of thoughts. `unfit` says why it can
    be no member, if it cannot. `shape` has the numbers of the network, as text under their keys, and the architecture,
    as llama.cpp tells them of a model that is loaded.
    """

    title: str
    architecture: str
    parameters: int
    quantisation: str
    context: int
    vocabulary: str
    vocabulary_size: int
    vocabulary_id: str
    template: str | None
    thinks: bool
    unfit: str
    shape: dict[str, str] = field(default_factory=dict, hash=False, repr=False)

    @property
    def count(self) -> str:
        """The number of parameters in three digits: "4.02 B"."""
        for size, letter in _THOUSANDS:
            if self.parameters >= size:
                return f"{self.parameters / size:.3g} {letter}"
        return str(self.parameters)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """How many numbers a file has in all and by the type of its tensors, and where the last tensor ends."""

    counts: dict[int, int]
    end: int

    @property
    def count(self) -> int:
        return sum(self.counts.values())


class Reader:
    """Reads headers. What many files have in common is read once."""

    def __init__(self) -> None:
        self._known: Known = {}
        self._buffer = bytearray()
        self._ids: dict[int, str] = {}  # of lists in `_known`, by their addresses

    def read(self, files: Sequence[Path]) -> Facts:
        """The facts of a model by all its files, the first one first. Raises DamagedError."""
        facts, *others = (self._read(file) for file in files)
        parameters = sum(part.parameters for part in (facts, *others))
        return replace(facts, parameters=parameters)

    def _read(self, path: Path) -> Facts:
        try:
            if path.exists() and not path.is_file():  # a device may have no end
                raise DamagedError("not a regular file")
            with path.open("rb") as file:
                return self._facts(Cursor(file, _MOST, self._known, self._buffer), path.stat().st_size)
        except FileNotFoundError:
            raise DamagedError("there is no such file") from None
        except OSError as error:
            raise DamagedError(f"cannot be read: {error.strerror}") from None

    def _facts(self, cursor: Cursor, size: int) -> Facts:
        _, tensor_count, key_count = beginning(cursor)
        values, counts, vocabulary_id = dict[str, Scalar](), dict[str, int](), ""
        for _ in range(key_count):
            key = cursor.string().decode("utf-8", "replace")
            if not key or key in values or key in counts:
                raise DamagedError(f"its header is damaged: a key is empty, or there twice, at byte {cursor.at:,}")
            kind, length = kind_and_length(cursor)
            if length is None:
                values[key] = scalar(cursor, kind)
                continue
            counts[key] = length
            if key == _TOKENS and is_string(kind):
                vocabulary_id = self._id(cursor.strings(length))
            else:
                pass_values(cursor, kind, length)
        tensors = _tensors(cursor, tensor_count)
        _require_whole(cursor, tensors, _number(values, "general.alignment") or _ALIGNMENT, size)
        return _said(values, counts.get(_TOKENS, 0), vocabulary_id, tensors)

    def _id(self, texts: bytes) -> str:
        if id(texts) not in self._ids:
            digest = blake2b(texts, digest_size=8).hexdigest()
            if not any(texts is known for lists in self._known.values() for known in lists):
                return digest  # it is short, and its address will be that of another
            self._ids[id(texts)] = digest
        return self._ids[id(texts)]


def _tensors(cursor: Cursor, count: int) -> _Tensors:
    counts, last = dict[int, int](), 0
    for _ in range(count):
        if not cursor.string():
            raise DamagedError(f"its header is damaged: a tensor without a name, at byte {cursor.at:,}")
        dimensions = cursor.number(4)
        if dimensions > _DIMENSIONS:
            raise DamagedError(f"its header is damaged: a tensor of {dimensions:,} dimensions, at byte {cursor.at:,}")
        numbers = prod(cursor.number(8) for _ in range(dimensions))
        kind, offset = cursor.number(4), cursor.number(8)
        counts[kind] = counts.get(kind, 0) + numbers
        if kind in TENSOR_TYPES:
            _, block, bytes_ = TENSOR_TYPES[kind]
            last = max(last, offset + numbers // block * bytes_)
    return _Tensors(counts, last)


def _require_whole(cursor: Cursor, tensors: _Tensors, alignment: int, size: int) -> None:
    """Raise DamagedError where tensors lie behind the end of the file, as in a download that was cut off."""
    needed = -(-cursor.at // alignment) * alignment + tensors.end
    if tensors.end and needed > size:
        raise DamagedError(f"it is not whole: {size:,} bytes of at least {needed:,}")


def _said(values: Mapping[str, Scalar], tokens: int, vocabulary_id: str, tensors: _Tensors) -> Facts:
    architecture = _text(values, "general.architecture")
    template = _text(values, "tokenizer.chat_template") or None
    kind = _text(values, "tokenizer.ggml.model")
    return Facts(
        title=_text(values, "general.name"),
        architecture=architecture,
        parameters=tensors.count,
        quantisation=_quantisation(values, tensors),
        context=_number(values, f"{architecture}.context_length"),
        vocabulary=_VOCABULARIES.get(kind, kind) if tokens else "",
        vocabulary_size=tokens,
        vocabulary_id=vocabulary_id,
        template=template,
        thinks=any(kind.stands_in(template or "", ()) for kind in KINDS),
        unfit=_unfit(values, architecture, tokens, tensors),
        shape={"general.architecture": architecture, **_shape(values, architecture)},
    )


def _shape(values: Mapping[str, Scalar], architecture: str) -> dict[str, str]:
    numbers = ((key, value) for key, value in values.items() if key.startswith(f"{architecture}."))
    return {key: str(value) for key, value in numbers if isinstance(value, int) and not isinstance(value, bool)}


def _quantisation(values: Mapping[str, Scalar], tensors: _Tensors) -> str:
    """What the file says of itself; else the type of most of its numbers."""
    file_type = values.get("general.file_type")
    if isinstance(file_type, int) and file_type & 1023 in FILE_TYPES:  # the bit above says that it was guessed
        return FILE_TYPES[file_type & 1023]
    if not tensors.count:
        return ""
    kind = max(tensors.counts, key=lambda kind: tensors.counts[kind])
    return TENSOR_TYPES[kind][0] if kind in TENSOR_TYPES else f"type {kind}"


def _unfit(values: Mapping[str, Scalar], architecture: str, tokens: int, tensors: _Tensors) -> str:
    for kind in (_text(values, "general.type"), architecture):
        if kind in _FILES:
            return _FILES[kind]
    if not tokens:
        return "it has no vocabulary, so it is no language model"
    if values.get(f"{architecture}.attention.causal") is False or _pools(values, architecture):
        return "it generates no text (an embedding model?)"
    return "" if tensors.count else "a vocabulary without weights: for a member behind a url"


def _pools(values: Mapping[str, Scalar], architecture: str) -> bool:
    """Whether it makes one vector, or one grade, of a whole text."""
    return values.get(f"{architecture}.pooling_type") in (1, 2, 3, 4)  # 0: it does not; then mean, CLS, last and rank


def _text(values: Mapping[str, Scalar], key: str) -> str:
    value = values.get(key)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""


def _number(values: Mapping[str, Scalar], key: str) -> int:
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
