"""One member: a GGUF model in a context of its own, and the mirror of what its KV cache holds.

The contract: `sync(ids)` makes the cache hold exactly `ids` and returns the logits after them, whatever was there
before, and the mirror is right again even when an evaluation fails or is interrupted in the middle. Knows nothing
of other members, of text, or of sampling.
"""

import contextlib
import ctypes
import io
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from me_local.checkpoints import Checkpoint, Checkpoints
from me_local.config import MemberConfig
from me_local.errors import ConfigError, LoadError, MeLocalError, RunError
from me_local.footprint import allocated_context, available_memory, kv_cache_bytes
from me_local.gguf import read_header
from me_local.vocabulary import IntArray, Vocabulary

log = logging.getLogger("me_local.llama_cpp")

LogitArray = npt.NDArray[np.float32]

_CELL_BYTES = 48  # of position and sequences, besides keys and values (llama-kv-cells.h)
_PARTIAL = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY  # of a state, only what cannot be cut back
_DECODE_ERRORS = {
    1: "no room is left in its KV cache",
    2: "the evaluation was aborted",
    -1: "llama.cpp calls the batch invalid",
}


class EvaluationInterruptedError(MeLocalError):
    """The user stopped an evaluation between two batches; the member's cache and its mirror are in order."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What it took to bring a member's cache up to date: `tokens` evaluated, and `seconds` inside llama.cpp."""

    tokens: int
    seconds: float


class Member:
    """A `llama_cpp.Llama` with its vocabulary and the mirror of its KV cache.

    `n_ctx` is the number of tokens it can hold: the context asked for, at most the length it was trained with.
    Raises LoadError when the file cannot be loaded. Use as a context manager, or call `close`.
    """

    def __init__(self, config: MemberConfig) -> None:
        self.config = config
        self.name = config.name
        self._closed = False
        self.path = _checked_file(config)
        self._llama = _load(config, self.path)
        try:
            self._read_model()
        except MeLocalError as error:
            self.close()
            raise LoadError(f'member "{self.name}": {self.path}: {error}') from None
        except BaseException:
            self.close()
            raise

    def _read_model(self) -> None:
        model = self._llama.model
        self._memory = llama_cpp.llama_get_memory(self._llama.ctx)
        if self._memory is None:
            raise LoadError("it does not generate text: it has no memory of what came before (an embedding model?)")
        self.metadata: dict[str, str] = self._llama.metadata
        self.vocabulary = Vocabulary(model, self.config.tokenizer)
        trained: int = llama_cpp.llama_model_n_ctx_train(model)
        self.n_ctx: int = min(self._llama.n_ctx(), trained) if trained > 0 else self._llama.n_ctx()
        self.trained_context = trained
        self.description = self._llama._model.desc()
        self.size: int = llama_cpp.llama_model_size(model)
        self.parameters: int = llama_cpp.llama_model_n_params(model)
        self.memory = _memory_kind(model)
        self.chat_template: str | None = self.metadata.get("tokenizer.chat_template")
        self.token_texts = _token_texts(model, self.vocabulary)
        self._mirror = np.empty(self._llama.n_ctx(), dtype=np.int32)
        self._length = 0
        self._alone = 0  # as many tokens, from the first, were evaluated in one go
        self._checkpoints = Checkpoints() if self.memory in ("recurrent", "hybrid") else None

    def prepare(
        self, ids: IntArray, interrupted: Callable[[], bool] = lambda: False, *, final: int = 0, alone: bool = False
    ) -> Evaluated:
        """Make the cache hold exactly `ids`, int32 (tokens,), at most `n_ctx` of them; there are no logits then.

        The first `final` are known to stay as they are; this has no effect on what the cache holds, but a memory that
        cannot be cut back gets a checkpoint there. With `alone` they are evaluated in one go, or left as they are if
        that is how they came into the cache: a part of them that another evaluation left there is not used, because
        numbers depend on how batches were cut. Raises RunError when llama.cpp fails, EvaluationInterruptedError when
        `interrupted()` becomes true between two batches.
        """
        if alone and not (self._alone == len(ids) and np.array_equal(self._mirror[: self._alone], ids)):
            self.forget()
        started = time.perf_counter()
        keep = self._cut(self._common(ids, len(ids)))
        due = self._checkpoints.due_in_prompt(keep, final, len(ids)) if self._checkpoints else None
        self._extend(ids, due, interrupted, prompt=True)
        if alone or keep == 0:
            self._alone = len(ids)
        return Evaluated(len(ids) - keep, time.perf_counter() - started)

    def sync(
        self, ids: IntArray, interrupted: Callable[[], bool] = lambda: False, *, final: int = 0
    ) -> tuple[LogitArray, Evaluated]:
        """Make the cache hold exactly `ids`, at least one of them, and return the logits after them.

        The last id is always evaluated. The logits, float32 (vocabulary,), are a view that the next evaluation
        overwrites. `final` and what it raises are as in `prepare`.
        """
        started = time.perf_counter()
        common = self._common(ids, len(ids) - 1)
        keep = self._cut(common)
        due = self._checkpoints.due_in_text(keep, common, final, len(ids)) if self._checkpoints else None
        self._extend(ids, due, interrupted, prompt=False)
        return self._logits(), Evaluated(len(ids) - keep, time.perf_counter() - started)

    def forget(self) -> None:
        """Empty the KV cache."""
        self._shorten(0)
        llama_cpp.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        """Free the model and its context; whatever is asked of the member then raises RunError."""
        self._closed = True
        if hasattr(self, "vocabulary"):
            self.vocabulary.close()
        self._llama.close()

    def __enter__(self) -> "Member":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _common(self, ids: IntArray, most: int) -> int:
        """The length of the prefix that the cache has in common with `ids`, at most `most`."""
        if self._closed:
            raise RunError(f'member "{self.name}": the ensemble is closed')
        limit = min(self._length, most)
        different = np.flatnonzero(self._mirror[:limit] != ids[:limit])
        return int(different[0]) if len(different) else limit

    def _cut(self, length: int) -> int:
        """Shorten the cache to `length` tokens and return how many it holds then.

        Recurrent and hybrid models refuse to drop a part of their memory: they go back to a checkpoint, or to zero.
        """
        # The mirror goes first: one that is short of the cache is mended here, one beyond it would go unnoticed.
        self._shorten(length)
        # Also where nothing is to be dropped: an interrupted evaluation may have left cells beyond the mirror.
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1):
            self._restore()
        return self._length

    def _shorten(self, length: int) -> None:
        self._llama.n_tokens = self._length = length
        self._alone = self._alone if self._alone <= length else 0
        if self._checkpoints:
            self._checkpoints.cut(length)

    def _restore(self) -> None:
        """Go back to the newest checkpoint, like llama.cpp's server (tools/server/server-context.cpp), or to zero."""
        newest = self._checkpoints.newest if self._checkpoints else None
        if newest:
            self._shorten(newest.length)
            data, size = _bytes(newest.state), newest.state.size
            read = llama_cpp.llama_state_seq_set_data_ext(self._llama.ctx, data, size, 0, _PARTIAL)
            # The recurrent part no longer stands behind this position, so a hybrid drops its attention's cells there.
            if read == size and llama_cpp.llama_memory_seq_rm(self._memory, 0, newest.length, -1):
                return
        self.forget()

    def _extend(self, ids: IntArray, due: int | None, interrupted: Callable[[], bool], *, prompt: bool) -> None:
        """Evaluate what the cache lacks of `ids`, with a checkpoint after `due` of them."""
        if self._checkpoints and due:
            self._evaluate_to(due, ids, interrupted)
            size = llama_cpp.llama_state_seq_get_size_ext(self._llama.ctx, 0, _PARTIAL)
            state = np.empty(size, dtype=np.uint8)
            if llama_cpp.llama_state_seq_get_data_ext(self._llama.ctx, _bytes(state), size, 0, _PARTIAL) == size:
                self._checkpoints.add(Checkpoint(due, state), prompt=prompt)
        self._evaluate_to(len(ids), ids, interrupted)

    def _evaluate_to(self, end: int, ids: IntArray, interrupted: Callable[[], bool]) -> None:
        for start in range(self._length, end, self._llama.n_batch):
            if interrupted():
                raise EvaluationInterruptedError(f'member "{self.name}": stopped at token {start} of {len(ids)}')
            self._evaluate(ids[start : min(end, start + self._llama.n_batch)])

    def _evaluate(self, ids: IntArray) -> None:
        start, end = self._length, self._length + len(ids)
        try:
            self._llama.eval(ids.tolist())
        except RuntimeError as error:
            raise RunError(f'member "{self.name}", tokens {start} to {end - 1}: {_decode_error(error)}') from None
        self._mirror[start:end] = ids
        self._length = end

    def _logits(self) -> LogitArray:
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        if not pointer:
            raise RunError(f'member "{self.name}": llama.cpp gave no logits after token {self._length - 1}')
        return np.ctypeslib.as_array(pointer, shape=(self.vocabulary.size,))


def supports_gpu() -> bool:
    """Whether this build of llama.cpp can offload layers to a GPU."""
    return bool(llama_cpp.llama_supports_gpu_offload())


def usable_cores() -> int:
    """The processors that this process may use: affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def render_built_in(template: str, messages: Sequence[tuple[str, str]]) -> str:
    """Render (role, content) pairs by one of llama.cpp's built-in chat templates, up to where the reply starts.

    Contents must not hold NUL characters. Raises ConfigError when there is no template of this name.
    """
    chat = (llama_cpp.llama_chat_message * len(messages))(
        *[llama_cpp.llama_chat_message(role.encode(), content.encode()) for role, content in messages]
    )
    size = 0
    while True:
        buffer = ctypes.create_string_buffer(size) if size else None
        needed = llama_cpp.llama_chat_apply_template(template.encode(), chat, len(messages), True, buffer, size)
        if needed < 0:
            raise ConfigError(f'chat_template = "{template}": llama.cpp has no built-in template of this name')
        if buffer is not None and needed <= size:
            return buffer.raw[:needed].decode()
        size = needed + 1


def _checked_file(config: MemberConfig) -> Path:
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
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # network, authorisation, missing file: the library has a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoadError(f'member "{config.name}": hf = "{config.hf}" cannot be fetched: {reason}') from None


def _load(config: MemberConfig, path: Path) -> llama_cpp.Llama:
    _send_log()
    # verbose=False would point the whole process's stdout and stderr to nowhere while it loads.
    with contextlib.redirect_stderr(io.StringIO()):
        settings = _settings(config, path)
        _first_errors.clear()
        try:
            llama = llama_cpp.Llama(str(path), **settings, no_perf=True, verbose=True)
        except Exception as error:  # ValueError, RuntimeError, and what a broken chat template raises
            reason = "; ".join(_first_errors) or str(error)
            hint = " (not enough memory: lower n_ctx)" if "alloc" in reason else ""
            raise LoadError(f'member "{config.name}": {path} cannot be loaded: {reason}{hint}') from None
    # A null pointer is not None: llama-cpp-python takes an adapter that failed to load for one.
    if config.lora and not llama._lora_adapter:
        llama.close()
        reason = "; ".join(_first_errors) or "llama.cpp refuses it"
        raise LoadError(f'member "{config.name}": lora = {config.lora} cannot be loaded: {reason}')
    return llama


def _settings(config: MemberConfig, path: Path) -> dict[str, Any]:
    threads = config.n_threads or usable_cores()
    header = read_header(path)
    trained = header.get(f"{header.get('general.architecture')}.context_length", "")
    cells = allocated_context(config.n_ctx, int(trained) if trained.isdigit() else 0)
    if not (supports_gpu() and config.n_gpu_layers):  # on a GPU the cache is there, and llama.cpp says so if it is not
        _require_memory(config, path, header, cells)
    return {
        "n_ctx": cells,
        "n_batch": config.n_batch,
        "n_threads": threads,
        "n_threads_batch": threads,
        "n_gpu_layers": config.n_gpu_layers if supports_gpu() else 0,
        "main_gpu": config.main_gpu,
        "tensor_split": list(config.tensor_split) if config.tensor_split else None,
        "flash_attn": config.flash_attn,
        "type_k": _cache_type(config.type_k),
        "type_v": _cache_type(config.type_v),
        "lora_path": str(config.lora) if config.lora else None,
    }


def _require_memory(config: MemberConfig, path: Path, header: dict[str, str], cells: int) -> None:
    """Raise LoadError where the KV cache alone is larger than what is free.

    llama.cpp writes to all of it, so that Linux would kill the process. The weights do not count: their pages come
    from the file and can go back to it; but next to an adapter llama-cpp-python reads them into memory.
    """
    cache, available = kv_cache_bytes(header, "full", config, cells), available_memory()
    if cache is None or available is None:
        return
    needed = cache + _CELL_BYTES * cells + (path.stat().st_size if config.lora else 0)
    if needed > available and not _keeps_states(path):
        raise LoadError(
            f'member "{config.name}": {path}: not enough memory: a context of {cells:,} tokens takes '
            f"{needed / 1e9:.2f} GB, and {available / 1e9:.2f} GB are free: lower n_ctx"
        )


def _keeps_states(path: Path) -> bool:
    """Whether the model has layers without keys and values, or cannot be read: the size of its cache is not known."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        return True
    kind = _memory_kind(model)
    llama_cpp.llama_model_free(model)
    return kind in ("recurrent", "hybrid")


def _cache_type(name: str | None) -> int | None:
    return None if name is None else int(getattr(llama_cpp, f"GGML_TYPE_{name.upper()}"))


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


def _bytes(state: npt.NDArray[np.uint8]) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _decode_error(error: RuntimeError) -> str:
    code = int(str(error).rsplit(maxsplit=1)[-1]) if str(error)[-1:].isdigit() else 0
    return _DECODE_ERRORS.get(code, f"llama.cpp failed: {error}")


_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # enum ggml_log_level
_first_errors: list[str] = []  # two at most: the first is the cause, and later ones say less and less


class _LineLogger:
    """Logs whole lines of what llama.cpp writes in parts; its level 5 continues the part before."""

    def __init__(self) -> None:
        self._level, self._line = logging.DEBUG, ""

    def write(self, level: int, text: str) -> None:
        self._level = _LEVELS.get(level, self._level)
        *lines, self._line = (self._line + text).split("\n")
        for line in filter(str.strip, lines):
            log.log(self._level, "%s", line.rstrip())
            says_why = self._level == logging.ERROR and not line.endswith(": failed to load model")
            if says_why and len(_first_errors) < 2:
                _first_errors.append(line.strip())


_line_logger = _LineLogger()


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    _line_logger.write(level, text.decode("utf-8", "replace"))


def _send_log() -> None:
    """Send llama.cpp's log to `logging`, where it is shown at -v."""
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
