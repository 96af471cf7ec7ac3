"""One member: a context on the weights of a GGUF model.

The contract: `sync(ids)` makes the cache hold exactly `ids`, whatever was there before, so that `logits` are those
after them; and the cache is right again even when an evaluation fails or is interrupted in the middle. Knows nothing
of other members, of text, or of sampling. Of several sequences (`sequences`) one reply by itself uses the first.
"""

import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeVar

import llama_cpp
import numpy as np

from me_local.arrays import IntArray, LogitArray
from me_local.config import MemberConfig
from me_local.errors import LoadError, RunError
from me_local.llama.batch import Batch, Outputs, Part
from me_local.llama.cache import Cache
from me_local.llama.checkpoints import Checkpoints
from me_local.llama.context import MOST_SEQUENCES, make_context, require_memory, working_bytes
from me_local.llama.foresight import Foresight
from me_local.llama.memory import allocated_context
from me_local.llama.native_log import native_log
from me_local.llama.options import longest_context
from me_local.llama.origin import Origin, in_batches
from me_local.llama.sequences import Sequences
from me_local.llama.shortlist import Shortlister
from me_local.llama.states import States
from me_local.llama.weights import Weights, supports_gpu
from me_local.model import Abilities, Evaluated, EvaluationInterruptedError, Row
from me_local.system.inflight import InFlight, begin_threads
from me_local.system.machine import usable_cores

log = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")

_MOST_PICKED = 1024
"""Of more, all are handed over: to pick and to order them would take longer."""
_DECODE_ERRORS = {
    1: "no room is left in its KV cache",
    2: "the evaluation was aborted",
    -1: "llama.cpp calls the batch invalid",
}


def _using(
    method: Callable[Concatenate["Member", P], Result],
) -> Callable[Concatenate["Member", P], Result]:
    """A method that uses the context: by one thread at a time, and never once it is freed."""

    @wraps(method)
    def using(self: "Member", /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self.use():
            self.require_open()
            return method(self, *args, **kwargs)

    return using


class Member:
    """A context of a model, for one sequence of tokens or several; `weights` are the model's, which members may share.

    `n_ctx` is the number of tokens that each sequence can hold: the context asked for, at most the length that the
    model was trained with; `caches` has the sequences, of which the methods here use the first alone; `seconds` is the
    time inside `llama_decode` so far; `working_bytes` the size of the buffers for a batch, None where llama.cpp does
    not tell; `on_gpu` says whether logits come from a GPU that can pick the largest. Where `states` is set, a prompt
    that begins like an earlier one gets that one's cache back. One evaluation gives logits after `outputs` tokens; each
    takes the room of the whole vocabulary. Raises LoadError when there can be no such context. Use as a context
    manager, or call `close`; either waits for an evaluation that another thread is in, and so do the weights.
    """

    def __init__(self, config: MemberConfig, weights: Weights, *, outputs: int = 1, sequences: int = 1) -> None:
        self.config = config
        self.name = config.name
        self.weights = weights
        self.vocabulary = weights.vocabulary
        self.summary = f"{weights.description}, {weights.parameters / 1e6:,.0f} M parameters"
        self.states: States | None = None
        self.seconds = 0.0
        self.on_gpu = supports_gpu() and not 0 <= config.n_gpu_layers <= weights.layers
        self._in_flight = InFlight(f'member "{config.name}": ')
        self._shortlister: Shortlister | None = None
        self._context: Any = None
        self._parts = 1  # of the cores, of which it has one
        self._adapter: Any = None
        cells = allocated_context(config.n_ctx, longest_context(config, weights.trained_context))
        if sequences > MOST_SEQUENCES:
            raise LoadError(
                f'member "{config.name}": llama.cpp has room for {MOST_SEQUENCES} replies at once, '
                f"and {sequences} are wanted"
            )
        self.n_batch = max(min(cells, config.n_batch), sequences)
        self._outputs = min(max(outputs, sequences), self.n_batch)
        with weights.use():
            weights.require_open()
            weights.users.add(self)
            self.working_bytes: int | None = None
            self._context = self._make_context(cells, sequences)
            try:
                self._read_context(sequences)
            except BaseException:
                self.close()
                raise

    def _make_context(self, cells: int, sequences: int) -> llama_cpp.llama_context_p:
        """A context with so many cells for each sequence."""
        config, weights = self.config, self.weights
        require_memory(config, weights, cells, sequences)
        context = make_context(config, weights, cells * sequences, self.n_batch, self._outputs, sequences)
        self.working_bytes = working_bytes()
        return context

    def _free_context(self, context: llama_cpp.llama_context_p) -> None:
        llama_cpp.llama_free(context)

    def _read_context(self, sequences: int) -> None:
        if llama_cpp.llama_get_memory(self._context) is None:
            raise LoadError(
                f'member "{self.name}": {self.weights.path}: '
                "it does not generate text: it has no memory of what came before"
            )
        if self.config.lora:
            self._add_adapter(self.config.lora)
        cells: int = llama_cpp.llama_n_ctx(self._context) // sequences
        self.n_ctx = min(cells, longest_context(self.config, self.weights.trained_context) or cells)
        window = self.weights.window
        evicts = window > 0 and not self.config.swa_full
        recurrent = self.weights.memory in ("recurrent", "hybrid")
        self.caches = tuple(
            Cache(self._context, i, name=self.name, cells=cells, window=window, evicts=evicts, recurrent=recurrent)
            for i in range(sequences)
        )
        self._batch = Batch(self.n_batch, cells, sequences)
        self._views: dict[int, LogitArray] = {}
        self.on_gpu = self.on_gpu and self.picks_logits()

    def _add_adapter(self, path: Path) -> None:
        native_log.first_errors.clear()
        self._adapter = llama_cpp.llama_adapter_lora_init(self.weights.pointer, os.fsencode(path))
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter), (ctypes.c_float * 1)()
        scales[0] = self.config.llama.get("lora_scale", 1.0)
        if not self._adapter or llama_cpp.llama_set_adapters_lora(self._context, adapters, 1, scales):
            reason = "; ".join(native_log.first_errors) or "llama.cpp refuses it"
            raise LoadError(f'member "{self.name}": lora = {path} cannot be loaded: {reason}')

    @_using
    def prepare(
        self, ids: IntArray, interrupted: Callable[[], bool] = lambda: False, *, final: int = 0, alone: bool = False
    ) -> Evaluated:
        """Make the cache hold exactly `ids`, int32 (tokens,), at most `n_ctx` of them; there are no logits then.

        The first `final` are known to stay as they are; this has no effect on what the cache holds, but a memory that
        cannot be cut back gets a checkpoint there. With `alone` they are evaluated from the first, in batches that
        follow from their number alone, or left as they are where that is how they came into the cache (`Origin`): what
        another evaluation left there is not used, and `final` has no effect at all. Raises RunError when llama.cpp
        fails, EvaluationInterruptedError when `interrupted()` becomes true between two batches.
        """
        cache, before = self.caches[0], self.seconds
        wanted = self._by_itself(len(ids)) if alone else None
        if self.states is not None:
            cache.exchange(self.states, ids, wanted)
        if wanted is None:
            keep = cache.cut(cache.common(ids, len(ids)))
            due = cache.checkpoints.due_in_prompt(keep, final, len(ids)) if cache.checkpoints else None
            self._extend(ids, self._in_batches(due, len(ids)), interrupted, prompt=True)
        else:
            keep = cache.cut(cache.usable(ids, wanted))
            if keep == 0 or cache.origin != wanted.upto(keep):
                keep = 0
                for each in self.caches:
                    each.forget()
            self._extend(ids, wanted.after(keep), interrupted, prompt=True, alone=True)
        return Evaluated(len(ids) - keep, self.seconds - before)

    def _by_itself(self, length: int) -> Origin:
        """How a prompt of so many tokens is evaluated where there is nothing else."""
        return in_batches(0, Checkpoints.stops(length) if self.caches[0].checkpoints else (), length, self.n_batch)

    def _in_batches(self, due: int | None, length: int) -> Origin:
        """How what the cache lacks of so many tokens is evaluated, with a checkpoint after `due` of them."""
        return in_batches(self.caches[0].length, (due,) if due else (), length, self.n_batch)

    @_using
    def sync(self, ids: IntArray, interrupted: Callable[[], bool] = lambda: False, *, final: int = 0) -> Evaluated:
        """Make the cache hold exactly `ids`, at least one of them; `logits` are then those after them.

        The last id is always evaluated. On a GPU the evaluation may still be under way when this returns. `final` and
        what it raises are as in `prepare`.
        """
        cache, before = self.caches[0], self.seconds
        common = cache.common(ids, len(ids) - 1)
        keep = cache.cut(common)
        due = cache.checkpoints.due_in_text(keep, common, final, len(ids)) if cache.checkpoints else None
        self._extend(ids, self._in_batches(due, len(ids)), interrupted, prompt=False)
        return Evaluated(len(ids) - keep, self.seconds - before)

    @property
    def foreseeing(self) -> Foresight | None:
        """What evaluates guesses with it; a memory that cannot be cut back is left out."""
        return Foresight(self, self._outputs - 1) if self._outputs > 1 and not self.caches[0].checkpoints else None

    @_using
    def shorten(self, count: int, numbers: IntArray) -> None:
        """From the next evaluation on, pick the `count` largest logits on the GPU, if there is one; 0, or many: none.

        Those of ids whose number, in int32 (vocabulary,), is negative are not among them. Raises RunError.
        """
        if not self.on_gpu:
            return
        count = count if count <= _MOST_PICKED else 0
        now = self._shortlister
        if count == (now.count if now else 0) and (now is None or now.numbers is numbers):
            return
        if now:
            self._shortlister = None
            now.close()
        if count:
            self._shortlister = Shortlister(self._context, self.name, len(self.caches), count, numbers)

    @_using
    def picks_logits(self) -> bool:
        """Whether llama.cpp can pick the largest logits where this model runs, which an evaluation tells."""
        numbers = np.zeros(self.vocabulary.size, dtype=np.int32)
        try:
            self.shorten(1, numbers)
            self.evaluate([Part(self.caches[0], numbers[:1], "last")])
            return len(self.row(0)) > 0
        except RunError as error:
            log.debug("the largest logits are picked by NumPy: %s", error)
            return False
        finally:
            self.shorten(0, numbers)
            self.forget()

    def logits(self) -> Row:
        """The logits after the last evaluation: a view that the next one overwrites, or the largest of them.

        Waits for a GPU that is still at work.
        """
        return self.row(-1)

    @_using
    def row(self, index: int) -> Row:
        """The same after one of the tokens of the last evaluation."""
        if self._shortlister:
            return self._shortlister.row(index)
        return self.whole_row(index)

    @_using
    def whole_row(self, index: int) -> LogitArray:
        """All logits after one of the tokens of the last evaluation, float32 (vocabulary,)."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise RunError(f'member "{self.name}": llama.cpp gave no logits after token {self.caches[0].length - 1}')
        # llama.cpp keeps its buffer, and to make an array of a pointer takes long.
        address = ctypes.addressof(pointer.contents)
        view = self._views.get(address)
        if view is None:
            view = self._views[address] = np.ctypeslib.as_array(pointer, shape=(self.vocabulary.size,))
        return view

    def each_logits(self, ids: IntArray, start: int) -> Iterator[LogitArray]:
        """The logits after each id of `ids` from `start` on, as views like that of `logits`.

        The first `start` ids are evaluated in one go, or found so in the cache, and the others always in the same
        batches: numbers do not depend on what was evaluated before. Raises RunError when llama.cpp fails.
        """
        self.prepare(ids[:start], final=start, alone=True)
        for begin in range(start, len(ids), self._outputs):
            part = ids[begin : begin + self._outputs]
            self._evaluate(part, "every")
            for row in range(len(part)):
                yield self.whole_row(row)

    @_using
    def evaluate(self, parts: Sequence[Part]) -> None:
        """One call of `llama_decode` for the parts, at most `n_batch` tokens; raises RunError that names them."""
        begin_threads()
        for part in parts:
            part.cache.expect()
        code = self._decode(parts)
        if code:
            reason = _DECODE_ERRORS.get(code, f"llama.cpp failed with code {code}")
            spans = [(cache.length, cache.length + len(ids) - 1) for cache, ids, _ in parts]
            where = f"tokens {spans[0][0]} to {spans[0][1]}" + (f" and {len(spans) - 1} others" if spans[1:] else "")
            raise RunError(f'member "{self.name}", {where}: {reason}')
        for cache, ids, _ in parts:
            cache.add(ids)

    abilities = Abilities()
    local = True
    wire_seconds = 0.0

    def twin(self) -> "Member":
        """Another context on the same weights."""
        return Member(self.config, self.weights)

    def keep_states(self, states: States) -> None:
        """From now on, exchange what the cache holds with these."""
        self.states = states

    @property
    def places(self) -> int:
        """How many sequences it has."""
        return len(self.caches)

    def several(self) -> Sequences:
        """Its sequences, all empty, for several replies at once."""
        return Sequences(self)

    @property
    def divisible(self) -> bool:
        """Whether numbers do not depend on the number of threads; with flash attention they do, so it stays."""
        return not self.config.flash_attn

    @_using
    def share_cores(self, parts: int) -> None:
        """Evaluate with a part of the threads, one of so many, from now on, if it is divisible."""
        if self.divisible and parts != self._parts:
            self._parts = parts
            count = self.config.n_threads or usable_cores()
            counts = (count, self.config.llama.get("n_threads_batch", count))
            llama_cpp.llama_set_n_threads(self._context, *(max(1, count // parts) for count in counts))

    @_using
    def forget(self) -> None:
        """Empty the cache."""
        self.caches[0].forget()

    def close(self, reason: str | None = None) -> None:
        """Free the context; whatever is asked of the member then raises RunError, which says the `reason`."""
        self._in_flight.end(self._free, reason)

    def _free(self) -> None:
        # What is taken here and not freed, because Ctrl-C comes between, stays; to free it again would be worse.
        context, self._context = self._context, None
        shortlister, self._shortlister = self._shortlister, None
        adapter, self._adapter = self._adapter, None
        if shortlister:
            shortlister.close()
        if context:
            self._free_context(context)
        if adapter:
            llama_cpp.llama_adapter_lora_free(adapter)
        self.weights.users.discard(self)

    def __enter__(self) -> "Member":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use(self) -> RLock:
        """What is to be held while the context is used, `caches` included; see `require_open`.

        Raises RunError in a process that was forked off.
        """
        return self._in_flight.use()

    def require_open(self) -> None:
        """Raise RunError where the member is closed: to be asked by whoever holds it."""
        self._in_flight.require_open()

    def _extend(
        self, ids: IntArray, plan: Origin, interrupted: Callable[[], bool], *, prompt: bool, alone: bool = False
    ) -> None:
        """Evaluate what the cache lacks of `ids`, in these batches; `alone` as in `prepare`."""
        cache = self.caches[0]
        # Where there are others, a sequence that becomes empty does not begin with its first cell again.
        noted = prompt and (alone or len(self.caches) == 1)
        for end in plan.ends:
            start = cache.length
            if end > start:
                if interrupted():
                    raise EvaluationInterruptedError(f'member "{self.name}": stopped at token {start} of {len(ids)}')
                self._evaluate(ids[start:end])
                if noted:
                    cache.note(start)
            if end in plan.checkpoints:
                cache.checkpoint(prompt=prompt)

    def _evaluate(self, ids: IntArray, outputs: Outputs = "last") -> None:
        self.evaluate([Part(self.caches[0], ids, outputs)])

    def _decode(self, parts: Sequence[Part]) -> int:
        """Evaluate the parts; llama.cpp's answer, 0 if all is well."""
        self._batch.fill(parts)
        started = time.perf_counter()
        code: int = llama_cpp.llama_decode(self._context, self._batch.native)
        self.seconds += time.perf_counter() - started
        return code
