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
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, Strict, TypeAdapter

from me_local.checks import (
    AtLeast0,
    Int,
    Text,
    Texts,
    argument,
    by_rule,
    must,
    nearest,
    number,
    parsed,
    require_known,
    shown,
)
from me_local.errors import ConfigError
from me_local.sampling import Bias, Sampling

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
    system: str | None = None
    template_args: _Arguments = field(default_factory=dict, hash=False)  # variables of all chat templates
    max_tokens: Annotated[Int, Field(ge=0)] = 512  # pieces per reply
    stop: Texts = ()
    min_tokens: Annotated[Int, Field(ge=0)] = 0  # pieces before the end of generation may come
    ignore_eos: Annotated[bool, Strict()] = False  # it never comes
    constraint: Constraint | None = None  # of this reply; not in the file

    @property
    def place(self) -> str:
        """What errors begin with."""
        return f"{self.path}: " if self.path else ""


@dataclass(frozen=True, slots=True)
class Overrides:
    """Options that beat the file, for every member; None leaves the file's value. Checked by `override`."""

    strategy: Strategy | None = None
    unit: Unit | None = None
    decode: Decode | None = None
    route: Route | None = None
    parallel: bool | None = None
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


_SAMPLING_KEYS = tuple(field.name for field in fields(Sampling))
_REPLY_KEYS = ("max_tokens", "stop", "min_tokens", "ignore_eos")
_ENSEMBLE_KEYS = (
    *("strategy", "unit", "decode", "seed", "router", "alignment"),
    *("route", "parallel", "system", "template_args"),
)
_MEMBER_KEYS = (*(field.name for field in fields(MemberConfig) if field.name != "sampling"), *_SAMPLING_KEYS)
_ELSEWHERE = ("engine", "api_key_env", "model")
_HERE = (
    *("n_ctx", "n_gpu_layers", "n_threads", "n_batch", "flash_attn", "swa_full", "type_k", "type_v"),
    *("main_gpu", "tensor_split", "lora", "llama"),
)
_PATH_KEYS = ("path", "lora", "tokenizer")
_LISTED = ("logit_bias", "dry_sequence_breakers", "ignore_eos")  # JSON after /set
_NUMBER_SETTINGS = (*(key for key in _SAMPLING_KEYS if key not in _LISTED), "min_tokens", "max_tokens", "seed")
_SETTINGS = (*_NUMBER_SETTINGS, *_LISTED, "stop", "decode", "strategy", "unit", "template_args")


def load_config(path: Path) -> Config:
    """The checked contents of a models.toml; raises ConfigError for the first thing that is wrong with it."""
    document = read_toml(path)
    for key, value in document.items():
        kind = "table" if isinstance(value, dict | list) else "key"
        require_known(key, ("ensemble", "sampling", "members"), f"{path}: ", kind)
    ensemble = _table(document.get("ensemble", {}), _ENSEMBLE_KEYS, f"{path}: [ensemble]")
    sampling = _table(document.get("sampling", {}), (*_SAMPLING_KEYS, *_REPLY_KEYS), f"{path}: [sampling]")
    reply = {key: sampling.pop(key) for key in _REPLY_KEYS if key in sampling}
    members = _members(document.get("members", []), path, Sampling(**sampling))
    config = Config(path=path, members=members, **ensemble, **reply)
    _require_decodable(config, f"{path}: [ensemble].decode")
    _require_words_by_me(config, f"{path}: [ensemble].unit")
    _require_route(config, f"{path}: [ensemble].route")
    return config


def override(config: Config, overrides: Overrides) -> Config:
    """The config with the given options on top; raises ConfigError that names the option, such as --top-k.

    A member's own sampling and system prompt give way to an option. Weights are normalised again.
    """
    options = {field.name: getattr(overrides, field.name) for field in fields(overrides)}
    named = options.pop("weights") or {}
    arguments = check("template_args", dict(options.pop("template_args") or {}), "--template-arg")
    given = {key: value for key, value in options.items() if value is not None}
    given = {key: check(key, value, "--" + key.replace("_", "-")) for key, value in given.items()}
    shape = {key: given.pop(key) for key in _SAMPLING_KEYS if key in given}
    weights = _checked_weights(named, [member.name for member in config.members])
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
    changed = replace(config, members=normalised(members, "--weights") if weights else members, **given)
    _require_decodable(changed, "--decode" if "decode" in given else "--strategy")
    _require_words_by_me(changed, "--unit" if "unit" in given else "--strategy")
    _require_route(changed, "--route" if "route" in given else "--unit")
    return changed


def parse_weights(text: str, names: Sequence[str]) -> dict[str, float]:
    """The value of --weights, "a=0.7,b=0.3" or "0.7,0.3" in the members' order, as name → weight.

    Raises ConfigError for a name that no member has or that comes twice, a wrong count and a bad weight.
    """
    parts = [part.strip() for part in text.split(",")]
    if "=" not in text and len(parts) != len(names):
        raise ConfigError(f"--weights: needs a weight for each of {', '.join(names)}, got {shown(text)}")
    pairs = [part.partition("=")[::2] for part in parts] if "=" in text else zip(names, parts, strict=True)
    weights: dict[str, object] = {}
    for name, value in pairs:
        if name.strip() in weights:
            raise ConfigError(f"--weights: {shown(name.strip())} is named twice")
        weights[name.strip()] = number(value)
    return _checked_weights(weights, names)


def parse_setting(key: str, value: str) -> Overrides:
    """The chat's `/set KEY VALUE` as checked overrides; raises ConfigError that names the key."""
    if key not in _SETTINGS:
        raise ConfigError(f"/set: unknown key {shown(key)}; {nearest(key, _SETTINGS)}")
    typed: object = number(value) if key in _NUMBER_SETTINGS else parsed(value) if key in _LISTED else value
    if key == "template_args":
        typed = dict([argument(value, "/set template_args")])
    return Overrides(**{key: check(key, typed, f"/set {key}")})


def read_toml(path: Path) -> dict[str, object]:
    """What a TOML file holds. Raises ConfigError that names it."""
    try:
        data = path.read_bytes()
        return tomllib.loads(data.decode("utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x} in line {line})") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # tomllib lets the two through on absurd numbers and nesting
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _table(raw: object, allowed: Sequence[str], place: str) -> dict[str, Any]:
    """The checked values of one table of the file."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{place}: must be a table, got {shown(raw)}")
    for key in raw:
        require_known(key, allowed, f"{place}.", "key")
    return {key: check(key, value, f"{place}.{key}") for key, value in raw.items()}


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
    own = {key: values.pop(key) for key in _SAMPLING_KEYS if key in values}
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


def _checked_weights(weights: Mapping[str, object], names: Sequence[str]) -> dict[str, float]:
    for name in weights:
        if name not in names:
            raise ConfigError(f"--weights: unknown member {shown(name)}; {nearest(name, names)}")
    return {name: check("weight", value, f"--weights: {shown(name)}") for name, value in weights.items()}


def normalised(members: tuple[MemberConfig, ...], place: str) -> tuple[MemberConfig, ...]:
    """The members with weights that sum to 1. Raises ConfigError, which begins with the place, where all are 0."""
    if not any(member.weight for member in members):
        raise ConfigError(f"{place}: every weight is 0; one must be above 0")
    # A power of two changes no digit and keeps the sum of huge weights finite.
    exponent = math.frexp(max(member.weight for member in members))[1]
    scaled = [math.ldexp(member.weight, -exponent) for member in members]
    total = math.fsum(scaled)
    return tuple(replace(member, weight=share / total) for member, share in zip(members, scaled, strict=True))


def _require_decodable(config: Config, place: str) -> None:
    if config.decode == "argmax" and config.strategy == "me":
        reason = '"me" runs one member per step and never sees the mixture'
        raise ConfigError(f'{place}: decode "argmax" needs strategy "ce"; {reason}')


def _require_words_by_me(config: Config, place: str) -> None:
    if config.unit == "word" and config.strategy != "me":
        reason = f'"{config.strategy}" averages members piece by piece, and cannot do so for whole words'
        raise ConfigError(f'{place}: unit "word" needs strategy "me"; {reason}')


def _require_route(config: Config, place: str) -> None:
    if config.route == "shared" and config.unit == "word":
        raise ConfigError(f'{place}: unit "word" needs route "own"; words begin at other steps in each reply')


@cache
def _rule(key: str) -> TypeAdapter[Any]:
    hints = [get_type_hints(kind, include_extras=True) for kind in (Sampling, MemberConfig, Config)]
    return TypeAdapter(next(hint[key] for hint in hints if key in hint))


def check(key: str, value: object, place: str) -> Any:
    """The value, checked by the annotation of the field of that name. Raises ConfigError that begins with the place."""
    return by_rule(_rule(key), value, place)
