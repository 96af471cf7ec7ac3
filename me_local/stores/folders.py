"""The folders that a user names in ME_LOCAL_MODEL_DIRS, parted as in PATH: GGUF files in them, and below."""

import os
from collections.abc import Iterator
from pathlib import Path

from me_local.gguf import whole_name
from me_local.stores.entry import Entry, missing_parts, models_in

STORE, VARIABLE = "folder", "ME_LOCAL_MODEL_DIRS"


def entries() -> Iterator[Entry]:
    """The models in the user's own folders."""
    for text in dict.fromkeys(os.environ.get(VARIABLE, "").split(os.pathsep)):
        if text:
            for files in models_in(Path(os.path.abspath(os.path.expanduser(text)))):
                yield Entry(STORE, str(files[0]), whole_name(files[0].name), files, problem=missing_parts(files))
