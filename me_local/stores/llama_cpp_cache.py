"""The cache that llama.cpp had before it used that of Hugging Face: files side by side, OWNER_REPO_FILE.gguf.

`manifest=OWNER=REPO=TAG.json` says which part of such a name is which.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from me_local.gguf import part_names, whole_name
from me_local.stores.entry import Entry, cache_folder, folder_of, home, missing_parts

STORE, PREFIX = "llama.cpp", "hf:"


def entries() -> Iterator[Entry]:
    """The models in llama.cpp's own cache."""
    folder = _folder()
    repositories = {
        f"{owner}_{repository}_": f"{owner}/{repository}"
        for _, owner, repository, _ in (
            path.name.split("=") for path in folder.glob("manifest=*=*=*.json") if path.name.count("=") == 3
        )
    }
    models = sorted({tuple(part_names(path.name)) for path in folder.glob("*.gguf")})
    for names in models:
        files = tuple(folder / name for name in names)
        prefix = max((start for start in repositories if names[0].startswith(start)), key=len, default="")
        name = f"{PREFIX}{repositories[prefix]}:{names[0].removeprefix(prefix)}" if prefix else str(files[0])
        yield Entry(STORE, name, whole_name(names[0].removeprefix(prefix)), files, problem=missing_parts(files))


def _folder() -> Path:
    default = home("Library", "Caches", "llama.cpp") if sys.platform == "darwin" else cache_folder("llama.cpp")
    return folder_of("LLAMA_CACHE") or default
