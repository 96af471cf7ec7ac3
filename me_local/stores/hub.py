"""The cache of Hugging Face, which llama.cpp has used since 2026, too: a folder for each repository.

`models--OWNER--REPO/snapshots/COMMIT/FILE` are links to blobs, and `refs/main` has the commit that is the latest
(llama.cpp: common/hf-cache.cpp).
"""

import os
from collections.abc import Iterator
from pathlib import Path

from me_local.gguf import whole_name
from me_local.stores.entry import Entry, cache_folder, folder_of, missing_parts, models_in

STORE, PREFIX = "Hugging Face", "hf:"


def entries() -> Iterator[Entry]:
    """The models in the cache of Hugging Face."""
    seen: set[str] = set()
    for root in roots():
        for repository in sorted(root.glob("models--*")):
            for snapshot in _snapshots(repository):
                for files in models_in(snapshot):
                    name = f"{_title(repository)}:{files[0].relative_to(snapshot).as_posix()}"
                    if name not in seen:
                        seen.add(name)
                        label = whole_name(files[0].name)
                        yield Entry(STORE, PREFIX + name, label, files, problem=missing_parts(files))


def roots() -> list[Path]:
    """The folders that are such caches, in the order in which they are looked at, each once."""
    own = folder_of("HF_HUB_CACHE") or folder_of("HUGGINGFACE_HUB_CACHE") or folder_of("HF_HOME", "hub")
    folders = [own or cache_folder("huggingface") / "hub", folder_of("LLAMA_CACHE")]
    return list(dict.fromkeys(folder for folder in folders if folder))


def _title(repository: Path) -> str:
    return repository.name.removeprefix("models--").replace("--", "/")


def _snapshots(repository: Path) -> list[Path]:
    """All of them: first what `refs/main` names, then the newest."""
    try:
        main = repository.joinpath("refs", "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        main = ""
    folders = [folder for folder in repository.glob("snapshots/*") if os.path.isdir(folder)]
    return sorted(folders, key=lambda folder: (folder.name != main, -os.stat(folder).st_mtime, folder.name))
