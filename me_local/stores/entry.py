"""A model in a store, and finding GGUF files in a folder. Knows nothing of what any store looks like."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from me_local.gguf import part_names


@dataclass(frozen=True, slots=True)
class Entry:
    """A model in a store.

    `name` is what `--member` takes, `label` a short name for a member. `files` are all parts of it, the first one
    first; `lora` is an adapter that belongs to it. `problem` says what is wrong with it, as far as the store tells.
    """

    store: str
    name: str
    label: str
    files: tuple[Path, ...]
    lora: Path | None = None
    problem: str = ""


def home(*parts: str) -> Path:
    """A path below the user's home."""
    return Path(os.path.expanduser("~"), *parts)


def folder_of(variable: str, *below: str) -> Path | None:
    """The folder that an environment variable names, or one below it; None where it is not set."""
    value = os.environ.get(variable)
    return Path(os.path.expanduser(value), *below) if value else None


def cache_folder(name: str) -> Path:
    """Where a program of this name has its cache."""
    return folder_of("XDG_CACHE_HOME", name) or home(".cache", name)


def models_in(folder: Path) -> Iterator[tuple[Path, ...]]:
    """The GGUF files in a folder and below it, the parts of a model together; links to folders are followed, once."""
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        models = {tuple(part_names(name)) for name in names if name.lower().endswith(".gguf")}
        yield from (tuple(Path(root, name) for name in model) for model in sorted(models))


def missing_parts(files: tuple[Path, ...]) -> str:
    """What to say where not all parts of a model are there; else nothing."""
    missing = [file for file in files if not os.path.exists(file)]
    if not missing or len(files) == 1:
        return ""
    return f"{len(missing)} of its {len(files)} parts are missing, first of all {missing[0].name}"
