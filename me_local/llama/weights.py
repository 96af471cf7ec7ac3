"""A GGUF model that is loaded: its tensors, its vocabulary and what its header says, shared by all its members.

Members of one file have contexts of their own on one copy of the weights. Knows nothing of contexts or of text.
"""

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import llama_cpp

from me_local.config import MemberConfig
from me_local.errors import ConfigError, LoadError, MeLocalError
from me_local.gguf import part_names
from me_local.llama.native_log import native_log, send_log
from me_local.llama.options import header_overrides, model_key, set_model
from me_local.system.inflight import InFlight
from me_local.text.vocabulary import Vocabulary

_ALL_LAYERS = 0x7FFFFFFF


class User(Protocol):
    """What must be closed before the weights."""

    def close(self, reason: str | None = None) -> None:
        """Let go of them; see `InFlight.end`."""


class VocabularyFile:
    """What a GGUF file says of text, without its tensors, which it may have or not.

    `metadata` holds the single values of its header, as text; `warnings` are what llama.cpp finds wrong with its
    vocabulary, a line each; `trained_context` is 0 where the header does not tell. `close` frees it. Raises LoadError
    when the file cannot be loaded.
    """

    def __init__(self, config: MemberConfig) -> None:
        settings = llama_cpp.llama_model_default_params()
        settings.vocab_only = True
        self._open(config, settings)

    def _open(self, config: MemberConfig, settings: llama_cpp.llama_model_params | None, lent: Any = None) -> None:
        self.path = config.path if lent and config.path else checked_file(config)
        self._in_flight = InFlight(f'member "{config.name}": ')
        self._lent = lent is not None
        self.pointer: Any = lent if self._lent else _load(config, self.path, settings)
        self.warnings = () if self._lent else _vocabulary_warnings(native_log.warnings)
        try:
            self._read(config.tokenizer, header_overrides(config))
        except MeLocalError as error:
            self.close()
            raise LoadError(f'member "{config.name}": {self.path}: {error}') from None
        except BaseException:
            self.close()
            raise

    def _read(self, tokenizer: Path | None, replaced: dict[str, str]) -> None:
        model = self.pointer
        self.metadata = _metadata(model) | replaced
        architecture = self.metadata.get("general.architecture", "")
        if self.metadata.get(f"{architecture}.attention.causal") == "false":
            raise LoadError("it does not generate text (an embedding model?)")
        if llama_cpp.llama_model_has_encoder(model):
            raise LoadError("it has an encoder, as T5 does, and only models that are decoders alone can be members")
        self.vocabulary = Vocabulary(model, tokenizer, replaced)
        # Without its tensors llama.cpp does not read these itself.
        self.trained_context = _number(self.metadata.get(f"{architecture}.context_length", ""))
        self.description = " ".join(filter(None, [architecture, self.metadata.get("general.size_label")]))
        self.chat_template = _chat_template(model)
        self.token_texts = _token_texts(model, self.vocabulary)

    def close(self, reason: str | None = None) -> None:
        """Free the model, once no evaluation of it is under way; whoever asks for it later is told the `reason`."""
        self._in_flight.end(partial(self._free, reason), reason)

    def use(self) -> threading.RLock:
        """What is to be held while a context is made; see `require_open`.

        Raises RunError in a process that was forked off.
        """
        return self._in_flight.use()

    def require_open(self) -> None:
        """Raise RunError where the model is freed: to be asked by whoever holds it."""
        self._in_flight.require_open()

    def _free(self, reason: str | None) -> None:
        if hasattr(self, "vocabulary"):
            self.vocabulary.close(reason)
        pointer, self.pointer = self.pointer, None
        if pointer and not self._lent:
            llama_cpp.llama_model_free(pointer)


class Weights(VocabularyFile):
    """One GGUF model in memory. `close` frees it, after the contexts of all its members.

    `users` are the members that have such contexts; one is made within `use`, which keeps the model where it is.
    `size` is in bytes; `memory` says what a context keeps of its tokens: "full", "sliding window N", "recurrent" or
    "hybrid"; `window` is that N, or 0. Without `extra_buffers` no weights are packed anew for the processor. `lent` is
    a model that somebody else has loaded, and frees.
    """

    def __init__(self, config: MemberConfig, *, extra_buffers: bool = True, lent: Any = None) -> None:
        self.users: set[User] = set()
        self._open(config, None if lent else _settings(config, extra_buffers=extra_buffers), lent)

    def _read(self, tokenizer: Path | None, replaced: dict[str, str]) -> None:
        super()._read(tokenizer, replaced)
        model = self.pointer
        self.trained_context = llama_cpp.llama_model_n_ctx_train(model)
        self.description = _text(llama_cpp.llama_model_desc, model)
        self.size: int = llama_cpp.llama_model_size(model)
        self.parameters: int = llama_cpp.llama_model_n_params(model)
        self.layers: int = llama_cpp.llama_model_n_layer(model)
        self.window: int = llama_cpp.llama_model_n_swa(model)
        self.memory = _memory_kind(model)

    def _free(self, reason: str | None) -> None:
        for user in list(self.users):  # those that an interrupted end has left
            user.close(reason)
        super()._free(reason)


class Shelf:
    """Weights that are loaded once for all members that name the same file and put it in the same place."""

    def __init__(self) -> None:
        self._weights: dict[tuple[object, ...], Weights] = {}
        self._without_extra_buffers: set[Path] = set()

    def avoid_extra_buffers(self, path: Path) -> None:
        """Load this file, from now on, without packing its weights anew for the processor."""
        self._without_extra_buffers.add(path)

    def weights(self, config: MemberConfig) -> Weights:
        """The weights of a member. Raises LoadError."""
        path = checked_file(config)
        status = path.stat()
        layers = config.n_gpu_layers if supports_gpu() else 0
        place = (layers, config.main_gpu, config.tensor_split)
        key = (status.st_dev, status.st_ino, config.tokenizer, *place, model_key(config))
        if key not in self._weights:
            self._weights[key] = Weights(config, extra_buffers=path not in self._without_extra_buffers)
        return self._weights[key]

    def close(self) -> None:
        """Free all of them."""
        while self._weights:
            self._weights.popitem()[1].close()


def supports_gpu() -> bool:
    """Whether this build of llama.cpp can offload layers to a GPU."""
    return bool(llama_cpp.llama_supports_gpu_offload())


def build_identity() -> str:
    """Equal for builds of llama.cpp that compute alike."""
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib")
    libraries = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.glob("*"))
    return f"{llama_cpp.__version__} {llama_cpp.llama_print_system_info().decode()} {folder} {libraries}"


def checked_file(config: MemberConfig) -> Path:
    """The GGUF file of a member, fetched from the hub where it names one. Raises LoadError."""
    path = config.path or _from_hub(config)
    where = f'member "{config.name}": {path}'
    if path.exists() and not path.is_file():
        raise LoadError(f"{where}: not a regular file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise LoadError(f"{where}: there is no such file") from None
    except OSError as error:
        raise LoadError(f"{where}: cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise LoadError(f"{where}: not a GGUF file (it does not start with the letters GGUF)")
    return path


def _from_hub(config: MemberConfig) -> Path:
    repository, _, file = str(config.hf).partition(":")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise LoadError(f'member "{config.name}": hf needs huggingface_hub: pip install "me-local[hub]"') from None
    try:
        paths = {part: Path(hf_hub_download(repository, part)) for part in part_names(file)}
    except Exception as error:  # network, authorisation, missing file: the library has a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoadError(f'member "{config.name}": hf = "{config.hf}" cannot be fetched: {reason}') from None
    return paths[file]


def _settings(config: MemberConfig, *, extra_buffers: bool) -> llama_cpp.llama_model_params:
    """How the tensors of a member are loaded. Raises ConfigError."""
    settings = llama_cpp.llama_model_default_params()
    layers = config.n_gpu_layers if supports_gpu() else 0
    settings.n_gpu_layers = _ALL_LAYERS if layers < 0 else layers
    settings.main_gpu = config.main_gpu
    llama_cpp.llama_backend_init()
    set_model(settings, config)
    settings.use_extra_bufts = settings.use_extra_bufts and extra_buffers
    if config.tensor_split:
        # llama.cpp reads as many numbers as it knows devices
        devices = llama_cpp.llama_max_devices()
        if len(config.tensor_split) > devices:
            raise ConfigError(
                f'member "{config.name}": tensor_split: has {len(config.tensor_split)} numbers, and llama.cpp knows '
                f"{devices} devices at most"
            )
        split = (ctypes.c_float * devices)(*config.tensor_split)
        settings.tensor_split = split
    return settings


def _load(config: MemberConfig, path: Path, settings: llama_cpp.llama_model_params | None) -> llama_cpp.llama_model_p:
    send_log()
    native_log.first_errors.clear()
    native_log.warnings.clear()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        reason = "; ".join(native_log.first_errors) or "llama.cpp does not say why"
        raise LoadError(f'member "{config.name}": {path} cannot be loaded: {reason}')
    for line in native_log.warnings:
        if found := _BAD_OVERRIDE.search(line):  # llama.cpp goes on without it
            llama_cpp.llama_model_free(model)
            raise ConfigError(f'member "{config.name}".llama.kv_overrides."{found[1]}": must be {found[2]}')
    return model


_BAD_OVERRIDE = re.compile(r"Bad metadata override type for key '(.*)', expected (\w+) but got")


def _vocabulary_warnings(lines: Iterable[str]) -> tuple[str, ...]:
    """The warnings of `llama_vocab::impl::load` that its user should know, each once.

    Not those on what it puts right by itself, nor the frame of stars around what follows from a warning.
    """
    said = (line.removeprefix("load: ").strip() for line in lines if line.startswith("load: "))
    return tuple(dict.fromkeys(text for text in said if text.strip("* ") and not _PUT_RIGHT.search(text)))


_PUT_RIGHT = re.compile(
    "control-looking token|dummy tokens|^setting token|^override|is a normal token here|removing '<\\|end\\|>'"
    "|special_pad_id|disabling|using default id"
)


def _number(text: str) -> int:
    """A number of the header, 0 where it is none."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


def _metadata(model: llama_cpp.llama_model_p) -> dict[str, str]:
    def read(function: Callable[..., int], index: int) -> str:
        return _text(lambda *buffer: function(model, index, *buffer))

    names, values = llama_cpp.llama_model_meta_key_by_index, llama_cpp.llama_model_meta_val_str_by_index
    return {read(names, i): read(values, i) for i in range(llama_cpp.llama_model_meta_count(model))}


def _chat_template(model: llama_cpp.llama_model_p) -> str | None:
    """The template in the header, None where it is blank; what is not UTF-8 becomes lone surrogates."""
    raw = llama_cpp.llama_model_chat_template(model, None) or b""
    text = str(raw.decode("utf-8", "surrogateescape")).removeprefix("\ufeff")
    return text if text.strip() else None


def _text(function: Callable[..., int], *arguments: Any) -> str:
    """What a function of llama.cpp writes into a buffer; its answer is the length that is needed."""
    buffer = ctypes.create_string_buffer(256)
    needed = function(*arguments, buffer, len(buffer))
    if needed >= len(buffer):
        buffer = ctypes.create_string_buffer(needed + 1)
        function(*arguments, buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def _token_texts(model: llama_cpp.llama_model_p, vocabulary: Vocabulary) -> dict[str, str]:
    """What chat templates know as `bos_token` and `eos_token`."""
    pointer = llama_cpp.llama_model_get_vocab(model)
    ids = {"bos_token": llama_cpp.llama_vocab_bos(pointer), "eos_token": llama_cpp.llama_vocab_eos(pointer)}
    return {name: vocabulary.text_of(id_) if id_ >= 0 else "" for name, id_ in ids.items()}


def _memory_kind(model: llama_cpp.llama_model_p) -> str:
    if llama_cpp.llama_model_is_hybrid(model):
        return "hybrid"
    if llama_cpp.llama_model_is_recurrent(model):
        return "recurrent"
    window = llama_cpp.llama_model_n_swa(model)
    return f"sliding window {window}" if window > 0 else "full"
