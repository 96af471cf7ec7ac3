"""What `system_fingerprint` says: equal for equal models, settings and builds, and different where any of them is."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from me_local.config import Config
from me_local.ensemble import Ensemble
from me_local.llama.member import Member
from me_local.model import LoadedModel

_CONFIG = TypeAdapter(Config)
_ENDS = 1 << 16  # bytes of a file, at its beginning and at its end: header and weights


def fingerprint(ensemble: Ensemble) -> str:
    """The fingerprint of an ensemble as it is served. Of files it sees the size, the beginning and the end."""
    settings = _CONFIG.dump_python(ensemble.config, mode="json")
    del settings["path"], settings["origin"]
    for told, member in zip(settings["members"], ensemble.members, strict=True):
        told |= _files(member)
    all_of_it = [version("me-local"), version("llama-cpp-python"), ensemble.batch, settings]
    return f"fp_{hashlib.sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()[:16]}"


def _files(member: LoadedModel) -> dict[str, Any]:
    """What a member's files hold, in the place of where they lie."""
    config = member.config
    path = member.weights.path if isinstance(member, Member) else config.path
    template = config.chat_template
    if template and Path(template).is_absolute():
        template = _digest(Path(template))
    files = {"path": path, "lora": config.lora, "tokenizer": config.tokenizer}
    return {key: _digest(file) for key, file in files.items()} | {"hf": None, "chat_template": template}


def _digest(path: Path | None) -> str | None:
    """Of the size and the ends of a file; None where there is none, or it is gone by now."""
    if path is None:
        return None
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begins = file.read(_ENDS)
            file.seek(max(0, size - _ENDS))
            return hashlib.sha256(begins + file.read(_ENDS)).hexdigest() + f" {size}"
    except OSError:
        return None
