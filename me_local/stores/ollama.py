"""Ollama's store: a manifest for each name and tag, whose layers are files named by their hashes.

Manifests lie in `manifests/HOST/NAMESPACE/NAME/TAG`, since 2026 also in `manifests-v2`, which goes first, and whose
entries are links to blobs (ollama: manifest/paths.go and manifest.go).
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from me_local.stores.entry import Entry, folder_of, home

STORE, PREFIX = "Ollama", "ollama:"

_OF_THE_SERVICE = Path("/usr/share/ollama/.ollama/models")  # of the user that its installer makes on Linux
_HOSTS = ("registry.ollama.ai", "ollama.com")
_NAMESPACE, _TAG = "library", "latest"
_MODEL = "application/vnd.ollama.image.model"
_ADAPTER = "application/vnd.ollama.image.adapter"
_TENSOR = "application/vnd.ollama.image.tensor"
_LIST = "application/vnd.ollama.manifest.list.v2+json"
_RUNNERS = ("ollama", "llamacpp", "")
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
_MOST = 1 << 20  # bytes of a manifest


def entries() -> Iterator[Entry]:
    """The models in Ollama's store."""
    given = folder_of("OLLAMA_MODELS")
    seen: set[str] = set()
    for root in [given] if given else [home(".ollama", "models"), _OF_THE_SERVICE]:
        for manifests in ("manifests-v2", "manifests"):
            for path in sorted(root.joinpath(manifests).glob("*/*/*/*")):
                name = _name(*path.parts[-4:])
                if name.casefold() not in seen and not os.path.isdir(path):
                    seen.add(name.casefold())
                    yield _entry(name, path, root / "blobs")


def full_name(text: str) -> str:
    """The name and tag that somebody means, in the form of those of `entries`."""
    *front, last = text.casefold().split("/")
    model, _, tag = last.partition(":")
    namespace = front.pop() if front else _NAMESPACE
    return _name("/".join(front) or _HOSTS[0], namespace, model, tag or _TAG)


def _name(host: str, namespace: str, model: str, tag: str) -> str:
    """As `ollama list` shows it, without what goes without saying."""
    if host in _HOSTS:
        return f"{model}:{tag}" if namespace == _NAMESPACE else f"{namespace}/{model}:{tag}"
    return f"{host}/{namespace}/{model}:{tag}"


def _entry(name: str, manifest: Path, blobs: Path) -> Entry:
    label = name.rpartition("/")[2].removesuffix(f":{_TAG}")
    try:
        layers = _layers(_read(manifest), blobs)
        models = _blobs(layers, _MODEL, blobs)
        adapters = _blobs(layers, _ADAPTER, blobs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"its manifest cannot be read: {error.strerror if isinstance(error, OSError) else error}"
        return Entry(STORE, PREFIX + name, label, (manifest,), problem=problem)
    problem = ""
    if not models:
        stored = any(layer["mediaType"] == _TENSOR for layer in layers)
        problem = "its weights are no GGUF file" if stored else "it has no weights here (a model in Ollama's cloud?)"
    elif len(models) > 1 or len(adapters) > 1:
        problem = "it is made of several files, which llama.cpp does not join under such names"
    return Entry(STORE, PREFIX + name, label, tuple(models) or (manifest,), next(iter(adapters), None), problem)


def _read(manifest: Path) -> Any:
    with manifest.open("rb") as file:
        return json.loads(file.read(_MOST))


def _layers(manifest: Any, blobs: Path) -> list[Any]:
    """The layers of a manifest, or of the one for llama.cpp in a list of them."""
    if manifest.get("mediaType") != _LIST:
        return list(manifest.get("layers") or [])
    for runner in _RUNNERS:
        for child in manifest.get("manifests") or []:
            if child.get("runner", "").lower() == runner:
                return _layers(child if child.get("layers") else _read(_blob(child["digest"], blobs)), blobs)
    return []


def _blobs(layers: list[Any], kind: str, blobs: Path) -> list[Path]:
    return [_blob(layer["digest"], blobs) for layer in layers if layer["mediaType"] == kind]


def _blob(digest: str, blobs: Path) -> Path:
    if not _DIGEST.fullmatch(digest):
        raise ValueError("a layer has no SHA-256")
    return blobs / digest.replace(":", "-")
