"""models.toml as frozen dataclasses, and the options that override it.

`load_config` reads and checks the whole file; `override` puts the command line's options, or the chat's
`/set`, on top. In what comes out every default is filled in, paths are absolute, weights sum to 1 and each
member's sampling is resolved: nobody else needs to know the file's layout. The rule for a value is the
annotation of its field and exists once, for the file, the options and `/set`. The first problem is raised as
a `ConfigError` of one line that names the file and the key, or the option. Whether a GGUF exists is for the
member's loader to say.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, Strict, TypeAdapter

from me_local.checks import AtLeast0, Int, Text, Texts, as_key, by_rule, must, nearest, require_known, shown
from me_local.errors import ConfigError
from me_local.sampling import Bias, Sampling
from me_local.toml import read_toml

Strategy = Literal["me", "ce", "union"]
Unit = Literal["token", "word"]
Decode = Literal["sample", "argmax"]
Route = Literal["shared", "own"]
Engine = Literal["llama-server", "vllm"]
ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]

_UNQUANTISED = ("f32", "f16", "bf16")
_NAME = re.compile(r"(?!\s)[^=,\x00-\x1f\x7f-\x9f\u2028\u2029]+(?<!\s)")
_HF_FILE = re.compile(r"\w[\w.-]*/\w[\w.-]*:(?:[^\s/:\\.][^\s/:\\]*/)*[^\s/:\\.][^\s/:\\]*\.gguf", re.ASCII)

_URL = re.compile(r"https?://[^\s/?#@\x00-\x20]+(?:/[^\s?#@]*)?", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


_Name = Annotated[str, must('be a name without "=", ",", control characters and outer spaces', _NAME.fullmatch)]
_HfFile = Annotated[str, must('look like "owner/repo:file.gguf"', _HF_FILE.fullmatch)]
_TAKEN = ("messages", "tools", "add_generation_prompt")
_Arguments = Annotated[
    dict[str, Any],
    must(f"leave out {', '.join(_TAKEN)}, which the conversation gives", lambda given: not given.keys() & set(_TAKEN)),
]
_Split = Annotated[tuple[AtLeast0, ...], must("have a number above 0", any)]
_Url = Annotated[str, must('look like "http://host:port", without a key in it', _URL.fullmatch)]
_Variable = Annotated[str, must("be the name of an environment variable", _VARIABLE.fullmatch)]
_File = Annotated[Path, must("be the path of a file", lambda path: path.name and "\0" not in str(path))]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a reply has to be (`text.constraints`).

    `text` is a JSON schema, nothing for any JSON object, a regular expression, a JSON list of texts to choose from, or
    a grammar in llama.cpp's GBNF or in Lark's form.
    """

    kind: ConstraintKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class MemberConfig:
    """One model of the ensemble: which file, what share, how it is loaded and prompted."""

    name: _Name
    path: _File | None = None  # absolute; exactly one of path and hf is set
    hf: _HfFile | None = None  # "owner/repo:file.gguf"
    url: _Url | None = None  # of the engine that runs it; the file is then its vocabulary alone
    engine: Engine | None = None  # None = "llama-server", where there is a url
    api_key_env: _Variable | None = None
    model: Text | None = None  # the name that the engine knows it by, where it has several
    weight: AtLeast0 = 1.0  # in a loaded Config the weights sum to 1
    sampling: Sampling = field(default_factory=Sampling)
    n_ctx: Annotated[Int, Field(ge=0)] = 4096  # tokens; 0 = the length that the model was trained with
    n_gpu_layers: Annotated[Int, Field(ge=-1)] = -1  # -1 = all, where the build supports it
    n_threads: Annotated[Int, Field(ge=1, le=512)] | None = None  # 512 is ggml's limit; None = all usable cores
    n_batch: Annotated[Int, Field(ge=1)] = 512  # tokens
    flash_attn: Annotated[bool, Strict()] = False
    swa_full: Annotated[bool, Strict()] = True
    type_k: CacheType | None = None  # None = llama.cpp's default, f16
    type_v: CacheType | None = None
    main_gpu: Annotated[Int, Field(ge=0)] = 0
    tensor_split: _Split | None = None  # share of each GPU
    lora: _File | None = None  # absolute
    system: str | None = None  # None = the ensemble's
    chat_template: Text | None = None  # None = the GGUF's; "plain"; a built-in's name; an absolute path
    template_args: _Arguments = field(default_factory=dict, hash=False)  # its variables, before the ensemble's
    tokenizer: _File | None = None  # tokenizer.json, absolute
    llama: dict[str, Any] = field(
        default_factory=dict, hash=False
    )  # llama.cpp's own parameters; `llama.options` checks


@dataclass(frozen=True, slots=True)
class Config:
    """A checked models.toml."""

    path: Path | None  # as it was given; None = there is no file
    members: tuple[MemberConfig, ...]
    strategy: Strategy = "me"
    unit: Unit = "token"  # what a member is drawn for; "word" exists for "me" alone
    decode: Decode = "sample"  # "argmax", of the mixture, does not exist for "me"
    seed: Annotated[int, Strict(), Field(ge=0, le=2**63 - 1)] | None = None
    router: Text = "constant"  # name of an entry point, looked up by its loader
    alignment: Text = "top_k"  # the same
    route: Route | None = None  # of ME's replies at once; None = shared, where that keeps ME's gain
    parallel: Annotated[bool, Strict()] | None = None  # CE's members at the same time; None = the faster way
    draft: Text | None = None  # what guesses how a reply goes on: "none", "ngram", a member; None: by the machine
    system: str | None = None
    template_args: _Arguments = field(default_factory=dict, hash=False)  # variables of all chat templates
    max_tokens: Annotated[Int, Field(ge=0)] = 512  # pieces per reply
    stop: Texts = ()
    min_tokens: Annotated[Int, Field(ge=0)] = 0  # pieces before the end of generation may come
    ignore_eos: Annotated[bool, Strict()] = False  # it never comes
    constraint: Constraint | None = None  # of this reply; not in the file
    presets: dict[str, "Overrides"] = field(default_factory=dict, hash=False)  # by their names
    preset: str | None = None  # the one in use
    origin: "tuple[Config, Overrides] | None" = field(default=None, compare=False, repr=False)  # see `override`

    @property
    def place(self) -> str:
        """What errors begin with."""
        return f"{self.path}: " if self.path else ""


@dataclass(frozen=True, slots=True)
class Overrides:
    """Options that beat the file, for every member; None leaves the file's value. Checked by `override`."""

    preset: str | None = None  # which of the file's goes before it, and behind all other options; "" = none
    strategy: Strategy | None = None
    unit: Unit | None = None
    decode: Decode | None = None
    route: Route | None = None
    parallel: bool | None = None
    draft: str | None = None
    seed: int | None = None
    system: str | None = None
    template_args: Mapping[str, Any] | None = None  # variables of chat templates; those not named stay
    max_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_last_n: int | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: tuple[str, ...] | None = None
    logit_bias: Mapping[str, float] | Sequence[Bias | Sequence[object]] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    constraint: Constraint | None = None
    weights: Mapping[str, float] | None = None  # member's name → weight; the members not named keep theirs


SAMPLING_KEYS = tuple(field.name for field in fields(Sampling))
_REPLY_KEYS = ("max_tokens", "stop", "min_tokens", "ignore_eos")
_ENSEMBLE_KEYS = (
    *("strategy", "unit", "decode", "seed", "router", "alignment"),
    *("route", "parallel", "draft", "system", "template_args"),
)
_MEMBER_KEYS = (*(field.name for field in fields(MemberConfig) if field.name != "sampling"), *SAMPLING_KEYS)
_PRESET_KEYS = ("strategy", "unit", "decode", "system", "template_args", *SAMPLING_KEYS, *_REPLY_KEYS)
_ELSEWHERE = ("engine", "api_key_env", "model")
_HERE = (
    *("n_ctx", "n_gpu_layers", "n_threads", "n_batch", "flash_attn", "swa_full", "type_k", "type_v"),
    *("main_gpu", "tensor_split", "lora", "llama"),
)
_PATH_KEYS = ("path", "lora", "tokenizer")


def load_config(path: Path) -> Config:
    """The checked contents of a models.toml; raises ConfigError for the first thing that is wrong with it."""
    document = read_toml(path)
    for key, value in document.items():
        kind = "table" if isinstance(value, dict | list) else "key"
        require_known(key, ("ensemble", "sampling", "members", "presets"), f"{path}: ", kind)
    ensemble = _table(document.get("ensemble", {}), _ENSEMBLE_KEYS, f"{path}: [ensemble]")
    sampling = _table(document.get("sampling", {}), (*SAMPLING_KEYS, *_REPLY_KEYS), f"{path}: [sampling]")
    reply = {key: sampling.pop(key) for key in _REPLY_KEYS if key in sampling}
    members = _members(document.get("members", []), path, Sampling(**sampling))
    config = Config(path=path, members=members, **ensemble, **reply)
    _require_possible(config, lambda *keys: f"{path}: [ensemble].{keys[0]}")
    return replace(config, presets=_presets(document.get("presets", {}), config))


def override(config: Config, overrides: Overrides) -> Config:
    """The config with the given options on top; raises ConfigError that names the option, such as --top-k.

    A member's own sampling and system prompt give way to an option. Weights are normalised again. A preset goes behind
    all options there are, also those of before: `origin` has the config without any, and all of them but the preset.
    """
    given = replace(overrides, preset=None)
    base, options = config.origin or (config, Overrides())
    options = _merged(options, given)
    if overrides.preset is None:
        return replace(_changed(config, given), origin=(base, options))
    preset = preset_of(base, overrides.preset, "--preset") if overrides.preset else Overrides()
    changed = _changed(base, _merged(preset, options), asked=overrides)
    return replace(changed, preset=overrides.preset or None, origin=(base, options))


def seeded(config: Config, index: int) -> Config:
    """The config for one of several replies, each of which has a seed of its own."""
    return config if config.seed is None else override(config, Overrides(seed=config.seed + index))


def preset_of(config: Config, name: str, place: str) -> Overrides:
    """The preset of that name. Raises ConfigError, which begins with the place, where there is none."""
    if name not in config.presets:
        known = nearest(name, config.presets) if config.presets else "models.toml has no [presets.NAME]"
        raise ConfigError(f"{place}: unknown preset {shown(name)}; {known}")
    return config.presets[name]


def _given(overrides: Overrides) -> dict[str, Any]:
    options = {field.name: getattr(overrides, field.name) for field in fields(overrides)}
    return {key: value for key, value in options.items() if value is not None}


def _merged(first: Overrides, later: Overrides) -> Overrides:
    """Both; what is said later holds. Weights belong together, variables of templates do not."""
    arguments = {**(first.template_args or {}), **(later.template_args or {})}
    return replace(first, **_given(later) | {"template_args": arguments or None})


def _option(key: str) -> str:
    return "--" + key.replace("_", "-").removesuffix("s" if key == "template_args" else "")


def _changed(
    config: Config, overrides: Overrides, named: Callable[[str], str] = _option, asked: Overrides | None = None
) -> Config:
    """The config with options on top, without a preset; `named` says what errors call a key, one that was `asked`."""
    given = _given(overrides)
    said = _given(asked or overrides)
    arguments = check("template_args", dict(given.pop("template_args", {})), named("template_args"))
    weights = checked_weights(given.pop("weights", {}), [m.name for m in config.members], named("weights"))
    given = {key: check(key, value, named(key)) for key, value in given.items()}
    shape = {key: given.pop(key) for key in SAMPLING_KEYS if key in given}
    members = tuple(
        replace(
            member,
            weight=weights.get(member.name, member.weight),
            sampling=replace(member.sampling, **shape),
            system=None if "system" in given else member.system,
            template_args={**member.template_args, **arguments},
        )
        for member in config.members
    )
    given["template_args"] = {**config.template_args, **arguments}
    changed = replace(config, members=normalised(members, named("weights")) if weights else members, **given)
    _require_possible(changed, lambda *keys: named(next((key for key in (*keys, "preset") if key in said), keys[-1])))
    return changed


def _table(raw: object, allowed: Sequence[str], place: str) -> dict[str, Any]:
    """The checked values of one table of the file."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{place}: must be a table, got {shown(raw)}")
    for key in raw:
        require_known(key, allowed, f"{place}.", "key")
    return {key: check(key, value, f"{place}.{key}") for key, value in raw.items()}


def _presets(raw: object, config: Config) -> dict[str, Overrides]:
    """The presets of a file, each tried on it."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{config.place}presets: must be tables, each headed [presets.NAME], got {shown(raw)}")
    return {name: _preset(name, table, config) for name, table in raw.items()}


def _preset(name: str, raw: object, config: Config) -> Overrides:
    place = f"{config.place}[presets.{as_key(name)}]"
    check("name", name, place)
    table = raw.copy() if isinstance(raw, dict) else raw
    weights = table.pop("weights", None) if isinstance(table, dict) else None
    if not isinstance(weights, dict | None):
        raise ConfigError(f"{place}.weights: must be a table, such as {{ {config.members[0].name} = 0.7 }}")
    preset = Overrides(weights=weights, **_table(table, _PRESET_KEYS, place))
    _changed(config, preset, lambda key: f"{place}.{key}")
    return preset


def _members(raw: object, path: Path, sampling: Sampling) -> tuple[MemberConfig, ...]:
    if not isinstance(raw, list):
        raise ConfigError(f"{path}: members: must be a list of tables, each headed [[members]]")
    if not raw:
        raise ConfigError(f"{path}: no members; add a [[members]] table with name and path")
    members: dict[str, MemberConfig] = {}
    for index, table in enumerate(raw):
        name = table.get("name") if isinstance(table, dict) else None
        place = f"{path}: members[{index}]" + (f" {shown(name)}" if name and isinstance(name, str) else "")
        member = _member(table, place, path.parent, sampling)
        if member.name in members:
            raise ConfigError(f"{place}.name: already used by members[{list(members).index(member.name)}]")
        members[member.name] = member
    return normalised(tuple(members.values()), f"{path}: members")


def _member(raw: object, place: str, folder: Path, sampling: Sampling) -> MemberConfig:
    values = _table(raw, _MEMBER_KEYS, place)
    if "name" not in values:
        raise ConfigError(f"{place}.name: is missing")
    if ("path" in values) == ("hf" in values):
        raise ConfigError(f"{place}: needs exactly one of path and hf")
    if values.get("type_v", "f16") not in _UNQUANTISED and not values.get("flash_attn"):
        raise ConfigError(f'{place}.type_v: "{values["type_v"]}" needs flash_attn = true')
    _require_one_place(values, place)
    own = {key: values.pop(key) for key in SAMPLING_KEYS if key in values}
    if "logit_bias" in own:
        own["logit_bias"] = tuple(replace(bias, member=values["name"]) for bias in own["logit_bias"])
    paths = {key: _absolute(values[key], folder) for key in _PATH_KEYS if key in values}
    if is_template_file(template := values.get("chat_template", "")):
        values["chat_template"] = str(_absolute(template, folder))
    return MemberConfig(sampling=replace(sampling, **own), **(values | paths))


def is_template_file(template: str) -> bool:
    """Whether a chat template is named by its path."""
    return "/" in template or template.endswith((".jinja", ".j2", ".txt"))


def _require_one_place(values: Mapping[str, object], place: str) -> None:
    """Raise ConfigError for a key that says how a member runs here, where it runs elsewhere, or the other way round."""
    for key in values:
        if "url" in values and key in _HERE:
            raise ConfigError(f"{place}.{key}: the engine at the url decides this; leave it out")
        if "url" not in values and key in _ELSEWHERE:
            raise ConfigError(f"{place}.{key}: goes with url, the address of an engine")


def _absolute(path: str | Path, folder: Path) -> Path:
    # Links stay as they are: llama.cpp finds the other parts of a split GGUF by the name of the first.
    return Path(os.path.abspath(folder / os.path.expanduser(path)))


def checked_weights(weights: Mapping[str, object], names: Sequence[str], place: str = "--weights") -> dict[str, float]:
    """The weights, by members' names. Raises ConfigError, which begins with the place, also for a name of none."""
    for name in weights:
        if name not in names:
            raise ConfigError(f"{place}: unknown member {shown(name)}; {nearest(name, names)}")
    return {name: check("weight", value, f"{place}: {shown(name)}") for name, value in weights.items()}


def normalised(members: tuple[MemberConfig, ...], place: str) -> tuple[MemberConfig, ...]:
    """The members with weights that sum to 1. Raises ConfigError, which begins with the place, where all are 0."""
    if not any(member.weight for member in members):
        raise ConfigError(f"{place}: every weight is 0; one must be above 0")
    # A power of two changes no digit and keeps the sum of huge weights finite.
    exponent = math.frexp(max(member.weight for member in members))[1]
    scaled = [math.ldexp(member.weight, -exponent) for member in members]
    total = math.fsum(scaled)
    return tuple(replace(member, weight=share / total) for member, share in zip(members, scaled, strict=True))


def _require_possible(config: Config, place: Callable[..., str]) -> None:
    """Raise ConfigError for settings that do not go together; `place` names the one of several that was given."""
    if config.decode == "argmax" and config.strategy == "me":
        reason = '"me" runs one member per step and never sees the mixture'
        raise ConfigError(f'{place("decode", "strategy")}: decode "argmax" needs strategy "ce"; {reason}')
    if config.unit == "word" and config.strategy != "me":
        reason = f'"{config.strategy}" averages members piece by piece, and cannot do so for whole words'
        raise ConfigError(f'{place("unit", "strategy")}: unit "word" needs strategy "me"; {reason}')
    if config.route == "shared" and config.unit == "word":
        reason = "words begin at other steps in each reply"
        raise ConfigError(f'{place("route", "unit")}: unit "word" needs route "own"; {reason}')
    known = ("none", "ngram", *(member.name for member in config.members))
    if config.draft is not None and config.draft not in known:
        raise ConfigError(f"{place('draft')}: unknown draft {shown(config.draft)}; {nearest(config.draft, known)}")


@cache
def _rule(key: str) -> TypeAdapter[Any]:
    hints = [get_type_hints(kind, include_extras=True) for kind in (Sampling, MemberConfig, Config)]
    return TypeAdapter(next(hint[key] for hint in hints if key in hint))


def check(key: str, value: object, place: str) -> Any:
    """The value, checked by the annotation of the field of that name. Raises ConfigError that begins with the place."""
    return by_rule(_rule(key), value, place)
