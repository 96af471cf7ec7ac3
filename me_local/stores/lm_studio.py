"""LM Studio's store: folders of publishers, in them folders of models, in them GGUF files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from me_local.gguf import whole_name
from me_local.stores.entry import Entry, home, missing_parts, models_in

STORE, PREFIX = "LM Studio", "lmstudio:"


def entries() -> Iterator[Entry]:
    """The models in LM Studio's store."""
    seen: set[str] = set()
    for folder in _folders():
        if (resolved := os.path.realpath(folder)) in seen:
            continue
        seen.add(resolved)
        for files in models_in(folder):
            name = whole_name(files[0].relative_to(folder).as_posix())
            yield Entry(STORE, PREFIX + name, name.rpartition("/")[2], files, problem=missing_parts(files))


def _folders() -> list[Path]:
    """Where it keeps models: where its settings say, else in its home, which was another one before 2025."""
    homes = [home(".lmstudio"), home(".cache", "lm-studio")]
    try:
        pointed = home(".lmstudio-home-pointer").read_text("utf-8").strip()
        homes = [Path(pointed), *homes] if pointed and "\0" not in pointed else homes
    except (OSError, ValueError):
        pass
    return [_set_folder(folder) or folder / "models" for folder in homes]


def _set_folder(folder: Path) -> Path | None:
    """The folder of models that its settings name."""
    try:
        value = json.loads(folder.joinpath("settings.json").read_bytes())["downloadsFolder"]
        return Path(value) if value and "\0" not in value else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
