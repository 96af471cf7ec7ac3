"""Members on `llama_cpp.Llama` objects that a program has made, with whatever options it made them.

The contract: an instance stays its owner's. It is driven by `eval`, its `n_tokens` and `input_ids` always say what its
cache holds, and nothing frees it here; where its owner used it in between, it is evaluated anew, and where its owner
closed it, that is said. Besides, it is a member like those of `llama`: the same batches, the same caches, and so the
same numbers as a member from a file with equal options.
"""

import gc
import re
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import llama_cpp
import numpy as np

from me_local.arrays import IntArray
from me_local.config import CacheType, Config, MemberConfig, Overrides, check, is_template_file, override
from me_local.engines.loading import Loaded, prompt_writer, put_together
from me_local.errors import ConfigError, RunError
from me_local.llama.batch import Part
from me_local.llama.context import cache_type
from me_local.llama.member import Member
from me_local.llama.options import context_table
from me_local.llama.weights import Weights
from me_local.model import Evaluated, Row
from me_local.sampling import Sampling
from me_local.text.unified import UnifiedVocabulary

Result = TypeVar("Result")

_PLACE = "Ensemble.of"
_CODE = re.compile(r"llama_decode returned (-?\d+)")
_ALL_LAYERS = 0x7FFFFFFF
_members: "weakref.WeakKeyDictionary[llama_cpp.Llama, weakref.ref[Instance]]" = weakref.WeakKeyDictionary()
"""Those of ensembles that are open, by what they are on."""


class Instance(Member):
    """A member on the `Llama` of a program, whose model `weights` are. To close it leaves the `Llama` as it is.

    Several replies at once it cannot make: such a context has one sequence.
    """

    def __init__(self, config: MemberConfig, weights: Weights, llama: llama_cpp.Llama) -> None:
        self._llama = llama
        self._left: IntArray | None = None  # what its cache held when it was used here last
        self._count: tuple[int, int] | None = None  # of its evaluations then; None: not known
        super().__init__(config, weights)
        self.n_ctx = min(self.n_ctx, len(llama.input_ids))  # llama.cpp's context may be longer, and that array not
        # What is pushed last is called first: before anything that is in use here is freed.
        llama._stack.callback(_closing, weakref.ref(self))
        _members[llama] = weakref.ref(self)

    def prepare(
        self, ids: IntArray, interrupted: Callable[[], bool] = lambda: False, *, final: int = 0, alone: bool = False
    ) -> Evaluated:
        """As in `Member`."""
        return self._driving(lambda: super(Instance, self).prepare(ids, interrupted, final=final, alone=alone))

    def sync(self, ids: IntArray, interrupted: Callable[[], bool] = lambda: False, *, final: int = 0) -> Evaluated:
        """As in `Member`."""
        return self._driving(lambda: super(Instance, self).sync(ids, interrupted, final=final))

    def forget(self) -> None:
        """As in `Member`."""
        self._driving(super().forget)

    def row(self, index: int) -> Row:
        """As in `Member`; where its owner used it since the last `sync`, there are no logits. Raises RunError then."""
        if self._left is None or self._llama.n_tokens != len(self._left):
            raise RunError(f'member "{self.name}": its Llama was used by another while a step was under way')
        row = super().row(index)  # waits for a GPU, too: now all is counted
        self._count = _evaluations(self._context)
        return row

    def several(self) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(one_sequence(self.name))

    def require_open(self) -> None:
        """Raise RunError where the ensemble or the `Llama` is closed."""
        super().require_open()
        if not is_open(self._llama):
            raise RunError(_closed(self.name))

    def _driving(self, work: Callable[[], Result]) -> Result:
        with self.use():
            self.require_open()
            self._take_up()
            try:
                return work()
            finally:
                self._hand_back()

    def _take_up(self) -> None:
        """Empty the cache where it is not as it was left: its owner has used it, and in which batches is not known."""
        llama, left = self._llama, self._left
        same = left is not None and llama.n_tokens == len(left) and np.array_equal(llama.input_ids[: len(left)], left)
        if self._count is not None:
            llama_cpp.llama_synchronize(self._context)
            same = same and self._count == _evaluations(self._context)
        if not same:
            self.caches[0].expect()  # anything may be there
            self.caches[0].forget()

    def _hand_back(self) -> None:
        """Have the `Llama` say what is in its cache."""
        llama, cache = self._llama, self.caches[0]
        if not is_open(llama):  # by a signal's handler, say
            return
        cache.cut(cache.length)  # an interrupted evaluation may have left cells beyond the mirror
        if llama.n_tokens != cache.length:
            llama._requires_eval = True  # its logits are not those after the last token
        llama.n_tokens = cache.length
        llama.input_ids[: cache.length] = cache.ids
        self._left = cache.ids.copy()

    def _decode(self, parts: Sequence[Part]) -> int:
        (part,) = parts
        self._llama.n_tokens = part.cache.length
        self._count = None
        started = time.perf_counter()
        try:
            self._llama.eval(part.ids.tolist())
        except RuntimeError as error:
            if not (code := _CODE.search(str(error))):
                raise RunError(f'member "{self.name}": {error}') from None
            return int(code[1])
        finally:
            self.seconds += time.perf_counter() - started
        return 0

    def _make_context(self, cells: int, sequences: int) -> llama_cpp.llama_context_p:
        self.on_gpu = False  # no samplers are put on a context of somebody else's: all logits come back
        return self._llama.ctx

    def _free_context(self, context: llama_cpp.llama_context_p) -> None:
        _members.pop(self._llama, None)
        if is_open(self._llama):
            llama_cpp.llama_set_n_threads(context, self._llama.n_threads, self._llama.n_threads_batch)

    def _add_adapter(self, path: Path) -> None:
        """Its owner has done so."""


def _closing(instance: "weakref.ref[Instance]") -> None:
    """Let go of a `Llama` whose owner is about to close it, with all contexts that were made on its model."""
    if member := instance():
        member.weights.close(_closed(member.name))


def is_open(llama: llama_cpp.Llama) -> bool:
    """Whether it has its model and its context."""
    return llama._model.model is not None and llama._ctx.ctx is not None


def _is_member(llama: llama_cpp.Llama) -> bool:
    """Whether it is in an ensemble that is open, and not merely forgotten."""
    member = _members.get(llama)
    if member and member():
        gc.collect()
    return member is not None and member() is not None


def one_sequence(name: str) -> str:
    """Why there is one reply at a time."""
    return (
        f'{_PLACE}: the Llama of member "{name}" has room for one reply at a time: for several at once name the files '
        "in a models.toml, and load that (me_local.load)"
    )


def instances_config(
    instances: Mapping[str, Any],
    weights: Mapping[str, float],
    sampling: Mapping[str, Sampling],
    templates: Mapping[str, str],
) -> Config:
    """The config of an ensemble of these `Llama` objects, by the members' names. Raises ConfigError."""
    if not isinstance(instances, Mapping) or not instances:
        raise ConfigError(f"{_PLACE}: takes a mapping from the names of members to llama_cpp.Llama objects")
    for what, named in (("weights", weights), ("sampling", sampling), ("templates", templates)):
        for name in named:
            if name not in instances:
                raise ConfigError(
                    f'{_PLACE}: {what}: "{name}" is no member; there are {", ".join(map(str, instances))}'
                )
    seen: dict[int, str] = {}
    for name, llama in instances.items():
        if problem := _problem(llama):
            raise ConfigError(f'{_PLACE}: "{name}": {problem}')
        if (other := seen.setdefault(id(llama), name)) != name:
            raise ConfigError(
                f'{_PLACE}: "{name}": is the same Llama as "{other}", whose cache holds one text: make another'
            )
    for name, weight in weights.items():
        check("weight", weight, f'{_PLACE}: "{name}".weight')
    members = [
        _member_config(name, llama, sampling.get(name), templates.get(name)) for name, llama in instances.items()
    ]
    shares = {name: weights.get(name, 1.0) for name in instances}
    if not any(shares.values()):
        raise ConfigError(f"{_PLACE}: weights: every one is 0; one must be above 0")
    return override(Config(path=None, members=tuple(members)), Overrides(weights=shares))


def load_instances(config: Config, instances: Mapping[str, llama_cpp.Llama], stack: ExitStack) -> Loaded:
    """Members on these `Llama` objects; `stack` lets go of them. Raises LoadError."""
    members: list[Member] = []
    files: list[Weights] = []
    for member in config.members:
        llama = instances[member.name]
        files.append(stack.enter_context(closing(Weights(member, lent=llama.model))))
        members.append(stack.enter_context(Instance(member, files[-1], llama)))
    writers = [prompt_writer(config, *pair) for pair in zip(config.members, files, strict=True)]
    return put_together(members, files, writers, UnifiedVocabulary([file.vocabulary for file in files]), [])


def _problem(llama: object) -> str | None:
    """Why an object cannot be a member; None if it can."""
    if not isinstance(llama, llama_cpp.Llama):
        return f"is no llama_cpp.Llama, but of the type {type(llama).__name__}"
    if not is_open(llama):
        return "is closed: make it again"
    if llama.model_params.vocab_only:
        return "has no weights: make it without vocab_only"
    if llama.draft_model is not None:
        return "has a draft model, which would write instead of the ensemble: make it without draft_model"
    if llama.context_params.embeddings:
        return "gives embeddings and no logits: make it without embedding"
    if llama._logits_all:
        return "computes the logits of every token, of which the last ones are needed: make it without logits_all"
    if _is_member(llama):
        return "is in another ensemble, which is open: close that first"
    return None


def _member_config(name: str, llama: llama_cpp.Llama, sampling: Sampling | None, template: str | None) -> MemberConfig:
    """What a models.toml would say of it: other contexts on its model are made so."""
    where = f'{_PLACE}: "{name}"'
    model, context = llama.model_params, llama.context_params
    table = context_table(context) | {"n_threads_batch": llama.n_threads_batch}
    if llama.kv_overrides:
        table["kv_overrides"] = dict(llama.kv_overrides)
    if llama.lora_path:
        table["lora_scale"] = llama.lora_scale
    if template and is_template_file(check("chat_template", template, f"{where}.template")):
        template = str(Path(template).expanduser().absolute())
    types = {cache_type(each): each for each in get_args(CacheType)}
    return MemberConfig(
        name=check("name", name, f"{_PLACE}: the name of a member"),
        path=Path(llama.model_path).absolute(),
        sampling=check("sampling", asdict(sampling or Sampling()), where),
        n_ctx=context.n_ctx,
        n_gpu_layers=-1 if model.n_gpu_layers == _ALL_LAYERS else model.n_gpu_layers,
        n_threads=llama.n_threads,
        n_batch=llama.n_batch,
        flash_attn=context.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        swa_full=context.swa_full,
        type_k=types.get(context.type_k),
        type_v=types.get(context.type_v),
        lora=Path(llama.lora_path).absolute() if llama.lora_path else None,
        chat_template=template,
        llama=table,
    )


def _closed(name: str) -> str:
    return f'the Llama of member "{name}" was closed: make another, and an ensemble of it'


def _evaluations(context: llama_cpp.llama_context_p) -> tuple[int, int]:
    """How many tokens the context has evaluated so far: in batches, and one by one."""
    counted = llama_cpp.llama_perf_context(context)
    return counted.n_p_eval, counted.n_eval
