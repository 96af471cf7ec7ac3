"""Writing weights into a models.toml, with its comments and its layout left as they are."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import tomlkit

from me_local.errors import ConfigError


def write_weights(path: Path, weights: Mapping[str, float]) -> None:
    """Set the weight of each member that is named, in four digits. The file is replaced in one step.

    The file must be one that `load_config` accepts. Raises ConfigError when it cannot be written.
    """
    document = tomlkit.parse(path.read_bytes().decode("utf-8-sig"))
    for member in document["members"]:
        if member["name"] in weights:
            member["weight"] = float(f"{weights[member['name']]:.4g}")
    target = path.resolve()
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_bytes(tomlkit.dumps(document).encode())
        shutil.copymode(target, beside)
        beside.replace(target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None
