"""Members that are named in a line, without a models.toml: `qwen.gguf`, `ollama:llama3.2:3b:0.3`.

Files are looked for on this machine alone; one of Hugging Face that is not here is for the loader to fetch.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from me_local.checks import number, shown
from me_local.config import Config, MemberConfig, check, normalised
from me_local.errors import ConfigError
from me_local.gguf import part_names, whole_name
from me_local.stores import hub, lm_studio, ollama
from me_local.stores.catalogue import entries
from me_local.stores.entry import Entry, missing_parts

_WEIGHT = re.compile(r"(?P<model>.+):(?P<weight>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)|nan|inf)", re.DOTALL)
_HF_FILE = re.compile(r"(?P<repository>[^/:]+/[^/:]+):(?P<file>.+\.gguf)", re.DOTALL)
_NO_NAME = re.compile(r"[=,\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_LIST = "me-local models lists those on this machine"
_SHOWN = 3  # names in an error


class _UnknownError(ConfigError):
    """There is no such model here."""


def config_of(texts: Sequence[str]) -> Config:
    """An ensemble of members that are named in a line each. Raises ConfigError."""
    members: list[MemberConfig] = []
    for text in texts:
        member = member_of(text)
        taken = {other.name for other in members}
        names = (member.name, *(f"{member.name}-{i}" for i in range(2, len(texts) + 1)))
        members.append(replace(member, name=next(name for name in names if name not in taken)))
    return Config(path=None, members=normalised(tuple(members), "--member"))


def member_of(text: str) -> MemberConfig:
    """A member by its line: [url=]model[:weight]. Raises ConfigError."""
    place = f"--member {shown(text)}"
    url, model = None, text
    if text.startswith(("http://", "https://")):
        url, _, model = text.partition("=")
        if not model:
            vocabulary = "a GGUF file that has its vocabulary (me-local vocabulary makes one)"
            raise ConfigError(f"{place}: behind the url must stand =FILE, {vocabulary}")
        url = check("url", url, place)
    try:
        entry, weight = _weighed(model)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    name = _NO_NAME.sub("-", entry.label).strip("-") or "model"
    if entry.store == hub.STORE and not entry.files:
        hf = check("hf", entry.name.removeprefix(hub.PREFIX), place)
        return MemberConfig(name=name, hf=hf, url=url, weight=weight)
    path = Path(os.path.abspath(entry.files[0]))
    return MemberConfig(name=name, path=path, url=url, lora=None if url else entry.lora, weight=weight)


def _weighed(text: str) -> tuple[Entry, float]:
    """The model, and its weight; what is the name of a model as a whole has none. Raises ConfigError."""
    match = _WEIGHT.fullmatch(text)
    try:
        return _find(text), 1.0
    except _UnknownError:
        if not match:
            raise
    weight: float = check("weight", number(match["weight"]), "the weight")
    return _find(match["model"]), weight


def _find(text: str) -> Entry:
    if text.startswith(ollama.PREFIX):
        entry = _of_ollama(text)
    elif text.startswith(lm_studio.PREFIX):
        entry = _of_lm_studio(text)
    elif text.startswith(hub.PREFIX):
        entry = _of_hub(text)
    else:
        entry = _of_path(text)
    if entry.problem:
        raise ConfigError(entry.problem)
    return entry


def _of_ollama(text: str) -> Entry:
    name = ollama.PREFIX + ollama.full_name(text.removeprefix(ollama.PREFIX))
    for entry in ollama.entries():
        if entry.name.casefold() == name:
            return entry
    raise _UnknownError(f"Ollama has no such model here; {_meant(text)}")


def _of_lm_studio(text: str) -> Entry:
    wanted = text.removesuffix(".gguf").casefold()
    models = list(lm_studio.entries())
    exact = [entry for entry in models if entry.name.casefold() == wanted]
    below = [entry for entry in models if entry.name.casefold().startswith(f"{wanted}/") and _may_be_meant(entry)]
    return _only(exact or below, "LM Studio", text)


def _of_hub(text: str) -> Entry:
    """A file of a repository by its name or its quantisation, or its only one."""
    repository, _, wanted = text.removeprefix(hub.PREFIX).partition(":")
    start = f"{hub.PREFIX}{repository}:".casefold()
    models = [entry for entry in entries() if entry.name.casefold().startswith(start)]
    named = _HF_FILE.fullmatch(text.removeprefix(hub.PREFIX))
    if named:
        wanted = part_names(named["file"])[0]
        exact = [entry for entry in models if entry.name[len(start) :] == wanted]
        if exact:
            return exact[0]
        name = f"{hub.PREFIX}{named['repository']}:{wanted}"
        return Entry(hub.STORE, name, whole_name(wanted.rpartition("/")[2]), ())
    quantisation = re.compile(rf"(?<![A-Za-z0-9]){re.escape(wanted)}(?![A-Za-z0-9_])", re.IGNORECASE)
    models = [entry for entry in models if _may_be_meant(entry)]
    if models and wanted:
        here = ", ".join(entry.name[len(start) :] for entry in models[:_SHOWN])
        models = [entry for entry in models if quantisation.search(entry.name[len(start) :])]
        if not models:
            raise _UnknownError(f"this quantisation of it is not here, but {here}; {_FETCHED}")
    if not models:
        raise _UnknownError(f"the repository is not on this machine; {_FETCHED}")
    return _only(models, "the cache of Hugging Face", text)


_FETCHED = "hf:owner/repo:FILE.gguf, with the whole name of a file, is fetched"


def _of_path(text: str) -> Entry:
    if not text:
        raise ConfigError(f"no model is named; {_LIST}")
    path = Path(os.path.expanduser(text))
    if "\0" in text or not os.path.lexists(path):
        raise _UnknownError(f"there is no such file; {_meant(text)}")
    if path.is_dir():
        raise ConfigError("it is a folder: name a GGUF file in it")
    files = tuple(path.with_name(name) for name in part_names(path.name))
    return Entry("", text, whole_name(path.name), files, problem=missing_parts(files))


def _only(models: Sequence[Entry], store: str, text: str) -> Entry:
    """The one model that is meant."""
    if not models:
        raise _UnknownError(f"{store} has no such model here; {_meant(text)}")
    if len(models) > 1:
        names = ", ".join(entry.name for entry in models[:_SHOWN])
        raise ConfigError(f"several models of {store} are meant by this: {names}{', ...' * (len(models) > _SHOWN)}")
    return models[0]


def _may_be_meant(entry: Entry) -> bool:
    """Whether it can be what a name says that is not its whole one: no projector, and its file is here."""
    return not entry.files[0].name.startswith("mmproj") and os.path.exists(entry.files[0])


def _meant(text: str) -> str:
    """A name on this machine that is much like this one, or how to see all of them."""
    names = {word.casefold(): entry.name for entry in entries() for word in _names(entry)}
    near = get_close_matches(text.casefold(), names, n=1, cutoff=0.7)
    return f"did you mean {shown(names[near[0]])}?" if near else _LIST


def _names(entry: Entry) -> Iterable[str]:
    """The words by which somebody may call it."""
    return (entry.label, entry.name.partition(":")[2], entry.name)
