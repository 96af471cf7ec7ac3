"""One member: a context on the weights of a GGUF model, and the mirror of what its KV cache holds.

The contract: `sync(ids)` makes the cache hold exactly `ids`, whatever was there before, so that `logits` are those
after them; and the mirror is right again even when an evaluation fails or is interrupted in the middle. Knows nothing
of other members, of text, or of sampling.
"""

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from me_local.checkpoints import Checkpoint, Checkpoints
from me_local.config import MemberConfig
from me_local.errors import LoadError, MeLocalError, RunError
from me_local.footprint import allocated_context, available_memory, kv_cache_bytes
from me_local.states import WORTH, State, States, common_length
from me_local.vocabulary import IntArray
from me_local.weights import Weights, first_errors, last_lines, supports_gpu

LogitArray = npt.NDArray[np.float32]

_LARGEST_BATCH = 512  # tokens that go through a model at once, as llama.cpp has it by default
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
    """What it took to bring a member's cache up to date: `tokens` evaluated, and `seconds` inside `llama_decode`."""

    tokens: int
    seconds: float


class Member:
    """A context of a model with its mirror; `weights` are the model's, which other members may share.

    `n_ctx` is the number of tokens it can hold: the context asked for, at most the length it was trained with;
    `working_bytes` the size of the buffers for a batch, None where llama.cpp does not tell. Where `states` is set, a
    prompt that begins like an earlier one gets that one's cache back. `outputs` is the
    number of tokens after which one evaluation gives logits; each takes the room of the whole vocabulary.
    Raises LoadError when there can be no such context. Use as a context manager, or call `close`.
    """

    def __init__(self, config: MemberConfig, weights: Weights, *, outputs: int = 1) -> None:
        self.config = config
        self.name = config.name
        self.weights = weights
        self.vocabulary = weights.vocabulary
        self.states: States | None = None
        self._closed = False
        self._adapter: Any = None
        cells = allocated_context(config.n_ctx, weights.trained_context)
        _require_memory(config, weights, cells)
        self.n_batch = min(cells, config.n_batch)
        self._outputs = min(outputs, self.n_batch)
        self._context = _make_context(config, weights, cells, self.n_batch, self._outputs)
        self.working_bytes = _working_bytes()
        try:
            self._read_context()
        except BaseException:
            self.close()
            raise

    def _read_context(self) -> None:
        self._memory = llama_cpp.llama_get_memory(self._context)
        if self._memory is None:
            raise LoadError(
                f'member "{self.name}": {self.weights.path}: '
                "it does not generate text: it has no memory of what came before"
            )
        if self.config.lora:
            self._add_adapter(self.config.lora)
        cells: int = llama_cpp.llama_n_ctx(self._context)
        self.n_ctx = min(cells, self.weights.trained_context or cells)
        self._mirror = np.empty(cells, dtype=np.int32)
        self._length = 0
        self._seconds = 0.0  # inside llama_decode, so far
        self._alone = 0  # as many tokens, from the first, were evaluated in one go
        self._evicts = self.weights.window > 0 and not self.config.swa_full
        self._checkpoints = Checkpoints() if self._evicts or self.weights.memory in ("recurrent", "hybrid") else None
        self._all_positions = np.arange(cells, dtype=np.int32)
        self._tokens, self._positions = (np.empty(self.n_batch, dtype=np.int32) for _ in range(2))
        token, position = (array.ctypes.data_as(_INT32) for array in (self._tokens, self._positions))
        self._batch = llama_cpp.llama_batch(token=token, pos=position)
        self._address, self._view = 0, np.empty(0, dtype=np.float32)

    def _add_adapter(self, path: Path) -> None:
        first_errors.clear()
        self._adapter = llama_cpp.llama_adapter_lora_init(self.weights.pointer, os.fsencode(path))
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter), (ctypes.c_float * 1)(1.0)
        if not self._adapter or llama_cpp.llama_set_adapters_lora(self._context, adapters, 1, scales):
            reason = "; ".join(first_errors) or "llama.cpp refuses it"
            raise LoadError(f'member "{self.name}": lora = {path} cannot be loaded: {reason}')

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
        if self.states is not None:
            self._exchange(self.states, ids, alone=alone)
        if alone and not (self._alone == len(ids) and np.array_equal(self._mirror[: self._alone], ids)):
            self.forget()
        before = self._seconds
        keep = self._cut(self._common(ids, len(ids)))
        due = self._checkpoints.due_in_prompt(keep, final, len(ids)) if self._checkpoints else None
        self._extend(ids, due, interrupted, prompt=True)
        if alone or keep == 0:
            self._alone = len(ids)
        return Evaluated(len(ids) - keep, self._seconds - before)

    def sync(self, ids: IntArray, interrupted: Callable[[], bool] = lambda: False, *, final: int = 0) -> Evaluated:
        """Make the cache hold exactly `ids`, at least one of them; `logits` are then those after them.

        The last id is always evaluated. On a GPU the evaluation may still be under way when this returns. `final` and
        what it raises are as in `prepare`.
        """
        before = self._seconds
        common = self._common(ids, len(ids) - 1)
        keep = self._cut(common)
        due = self._checkpoints.due_in_text(keep, common, final, len(ids)) if self._checkpoints else None
        self._extend(ids, due, interrupted, prompt=False)
        return Evaluated(len(ids) - keep, self._seconds - before)

    def logits(self) -> LogitArray:
        """The logits after the last evaluation, float32 (vocabulary,): a view that the next one overwrites.

        Waits for a GPU that is still at work.
        """
        return self._row(-1)

    def _row(self, index: int) -> LogitArray:
        """The logits after one of the tokens of the last evaluation."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise RunError(f'member "{self.name}": llama.cpp gave no logits after token {self._length - 1}')
        # llama.cpp keeps its buffer, and to make an array of a pointer takes long.
        address = ctypes.addressof(pointer.contents)
        if address != self._address:
            self._address, self._view = address, np.ctypeslib.as_array(pointer, shape=(self.vocabulary.size,))
        return self._view

    def each_logits(self, ids: IntArray, start: int) -> Iterator[LogitArray]:
        """The logits after each id of `ids` from `start` on, as views like that of `logits`.

        The first `start` ids are evaluated in one go, or found so in the cache, and the others always in the same
        batches: numbers do not depend on what was evaluated before. Raises RunError when llama.cpp fails.
        """
        self.prepare(ids[:start], final=start, alone=True)
        for begin in range(start, len(ids), self._outputs):
            part = ids[begin : begin + self._outputs]
            self._evaluate(part, every=True)
            for row in range(len(part)):
                yield self._row(row)

    def share_cores(self, parts: int) -> None:
        """Evaluate with a part of the threads, one of so many, from now on."""
        count = max(1, (self.config.n_threads or usable_cores()) // parts)
        llama_cpp.llama_set_n_threads(self._context, count, count)

    def forget(self) -> None:
        """Empty the KV cache."""
        self._shorten(0)
        llama_cpp.llama_memory_clear(self._memory, True)

    def save(self) -> State:
        """What the cache holds, to be put back by `restore`. Raises RunError when llama.cpp refuses."""
        self._cut(self._length)  # an interrupted evaluation may have left cells beyond the mirror
        data = np.empty(llama_cpp.llama_state_seq_get_size(self._context, 0), dtype=np.uint8)
        written = llama_cpp.llama_state_seq_get_data(self._context, _bytes(data), data.size, 0)
        if written != data.size:
            raise RunError(f'member "{self.name}": llama.cpp does not give its state after {self._length} tokens')
        checkpoints = self._checkpoints.copy() if self._checkpoints else None
        return State(self._mirror[: self._length].copy(), data, self._alone, checkpoints)

    def restore(self, state: State) -> None:
        """Make the cache hold what it did when `state` was saved; where llama.cpp refuses, it is empty then."""
        self.forget()
        read = llama_cpp.llama_state_seq_set_data(self._context, _bytes(state.data), state.data.size, 0)
        if read != state.data.size:
            self.forget()
            return
        self._mirror[: len(state.ids)] = state.ids
        self._length, self._alone = len(state.ids), state.alone
        if state.checkpoints:
            self._checkpoints = state.checkpoints.copy()

    def close(self) -> None:
        """Free the context; whatever is asked of the member then raises RunError."""
        if not self._closed:
            self._closed = True
            llama_cpp.llama_free(self._context)
            if self._adapter:
                llama_cpp.llama_adapter_lora_free(self._adapter)

    def __enter__(self) -> "Member":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, states: States, ids: IntArray, *, alone: bool) -> None:
        """Before a new prompt: keep what would be lost by it, and put back what saves most of it."""
        self._require_open()
        now = State(self._mirror[: self._length], _NOTHING, self._alone, self._checkpoints)
        kept = states.best(self.name, ids, alone=alone)
        usable = now.usable(ids, alone=alone)
        if self._length - usable >= WORTH and llama_cpp.llama_state_seq_get_size(self._context, 0) <= states.budget:
            states.add(self.name, self.save())
        if kept and kept.usable(ids, alone=alone) >= usable + WORTH:
            self.restore(kept)

    def _require_open(self) -> None:
        if self._closed:
            raise RunError(f'member "{self.name}": the ensemble is closed')

    def _common(self, ids: IntArray, most: int) -> int:
        """The length of the prefix that the cache has in common with `ids`, at most `most`."""
        self._require_open()
        return common_length(self._mirror[: self._length], ids[:most])

    def _cut(self, length: int) -> int:
        """Shorten the cache to `length` tokens and return how many it holds then.

        Recurrent and hybrid models refuse to drop a part of their memory, and a cache of the window's size has lost
        what stands before it: they go back to a checkpoint, or to zero.
        """
        # The mirror goes first: one that is short of the cache is mended here, one beyond it would go unnoticed.
        self._shorten(length)
        # Also where nothing is to be dropped: an interrupted evaluation may have left cells beyond the mirror.
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1) or not self._has_window():
            self._restore()
        return self._length

    def _has_window(self) -> bool:
        """Whether the cache still has all cells that the next token looks at."""
        if not self._evicts or self._length == 0:
            return True
        first: int = llama_cpp.llama_memory_seq_pos_min(self._memory, 0)
        return 0 <= first <= max(0, self._length - self.weights.window)

    def _shorten(self, length: int) -> None:
        self._length = length
        self._alone = self._alone if self._alone <= length else 0
        if self._checkpoints:
            self._checkpoints.cut(length)

    def _restore(self) -> None:
        """Go back to the newest checkpoint, like llama.cpp's server (tools/server/server-context.cpp), or to zero."""
        newest = self._checkpoints.newest if self._checkpoints else None
        if newest:
            self._shorten(newest.length)
            data, size = _bytes(newest.state), newest.state.size
            read = llama_cpp.llama_state_seq_set_data_ext(self._context, data, size, 0, _PARTIAL)
            # The recurrent part no longer stands behind this position, so a hybrid drops its attention's cells there.
            cut = read == size and llama_cpp.llama_memory_seq_rm(self._memory, 0, newest.length, -1)
            if cut and self._has_window():
                return
        self.forget()

    def _extend(self, ids: IntArray, due: int | None, interrupted: Callable[[], bool], *, prompt: bool) -> None:
        """Evaluate what the cache lacks of `ids`, with a checkpoint after `due` of them."""
        if self._checkpoints and due:
            self._evaluate_to(due, ids, interrupted)
            size = llama_cpp.llama_state_seq_get_size_ext(self._context, 0, _PARTIAL)
            state = np.empty(size, dtype=np.uint8)
            if llama_cpp.llama_state_seq_get_data_ext(self._context, _bytes(state), size, 0, _PARTIAL) == size:
                self._checkpoints.add(Checkpoint(due, state), prompt=prompt)
        self._evaluate_to(len(ids), ids, interrupted)

    def _evaluate_to(self, end: int, ids: IntArray, interrupted: Callable[[], bool]) -> None:
        for start in range(self._length, end, self.n_batch):
            if interrupted():
                raise EvaluationInterruptedError(f'member "{self.name}": stopped at token {start} of {len(ids)}')
            self._evaluate(ids[start : min(end, start + self.n_batch)])

    def _evaluate(self, ids: IntArray, *, every: bool = False) -> None:
        start, end = self._length, self._length + len(ids)
        code = self._decode_each(ids) if every else self._decode(ids)
        if code:
            reason = _DECODE_ERRORS.get(code, f"llama.cpp failed with code {code}")
            raise RunError(f'member "{self.name}", tokens {start} to {end - 1}: {reason}')
        self._mirror[start:end] = ids
        self._length = end

    def _decode(self, ids: IntArray) -> int:
        """Evaluate ids behind those in the cache, for the logits after the last; llama.cpp's answer, 0 if all is well.

        No sequences and no outputs are named: llama.cpp then takes the first sequence, and the last id.
        """
        return self._decode_for(ids, None)

    def _decode_each(self, ids: IntArray) -> int:
        """The same for the logits after each of them."""
        return self._decode_for(ids, np.ones(len(ids), dtype=np.int8))

    def _decode_for(self, ids: IntArray, outputs: npt.NDArray[np.int8] | None) -> int:
        count, start = len(ids), self._length
        self._batch.n_tokens = count
        self._batch.logits = None if outputs is None else outputs.ctypes.data_as(_INT8)
        self._tokens[:count] = ids
        self._positions[:count] = self._all_positions[start : start + count]
        started = time.perf_counter()
        code: int = llama_cpp.llama_decode(self._context, self._batch)
        self._seconds += time.perf_counter() - started
        return code


def usable_cores() -> int:
    """The processors that this process may use: affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _require_memory(config: MemberConfig, weights: Weights, cells: int) -> None:
    """Raise LoadError where the KV cache alone is larger than what is free.

    llama.cpp writes to all of it, so that Linux would kill the process. The weights do not count: their pages come
    from the file and can go back to it. On a GPU the cache is there, and llama.cpp says so if it does not fit.
    """
    if (supports_gpu() and config.n_gpu_layers) or not config.swa_full:
        return
    cache, available = kv_cache_bytes(weights.metadata, weights.memory, config, cells), available_memory()
    if cache is None or available is None:
        return
    needed = cache + _CELL_BYTES * cells
    if needed > available:
        raise LoadError(
            f'member "{config.name}": {weights.path}: not enough memory: a context of {cells:,} tokens takes '
            f"{needed / 1e9:.2f} GB, and {available / 1e9:.2f} GB are free: lower n_ctx"
        )


def _make_context(
    config: MemberConfig, weights: Weights, cells: int, batch: int, outputs: int
) -> llama_cpp.llama_context_p:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = cells, batch, min(batch, _LARGEST_BATCH)
    settings.n_threads = settings.n_threads_batch = config.n_threads or usable_cores()
    flash = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if config.flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.flash_attn_type = flash
    settings.no_perf = True
    settings.swa_full = config.swa_full
    if config.type_k:
        settings.type_k = _cache_type(config.type_k)
    if config.type_v:
        settings.type_v = _cache_type(config.type_v)
    settings.n_outputs_max = outputs  # without it there is room for the logits of a whole batch
    first_errors.clear()
    last_lines.clear()
    context = llama_cpp.llama_init_from_model(weights.pointer, settings)
    if not context:
        reason = "; ".join(first_errors) or "llama.cpp does not say why"
        hint = " (not enough memory: lower n_ctx)" if "alloc" in reason else ""
        raise LoadError(f'member "{config.name}": {weights.path} cannot be loaded: {reason}{hint}')
    return context


def _working_bytes() -> int | None:
    """The size of the context that was made last, besides its cache; llama.cpp tells it in its log alone."""
    sizes = [float(size) for line in last_lines for size in re.findall(r"compute buffer size = +([\d.]+) MiB", line)]
    return round(sum(sizes) * 2**20) if sizes else None


def _cache_type(name: str) -> int:
    return int(getattr(llama_cpp, f"GGML_TYPE_{name.upper()}"))


def _bytes(state: npt.NDArray[np.uint8]) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


_INT32 = ctypes.POINTER(ctypes.c_int32)
_INT8 = ctypes.POINTER(ctypes.c_int8)
_NOTHING = np.empty(0, dtype=np.uint8)
