"""Writing weights into a models.toml, with its comments and its layout left as they are."""

from collections.abc import Mapping
from pathlib import Path

import tomlkit

from me_local.errors import ConfigError
from me_local.system.files import replace_file


def write_weights(path: Path, weights: Mapping[str, float]) -> None:
    """Set the weight of each member that is named, in four digits. The file is replaced in one step.

    The file must be one that `load_config` accepts. Raises ConfigError when it cannot be written.
    """
    document = tomlkit.parse(path.read_bytes().decode("utf-8-sig"))
    for member in document["members"]:
        if member["name"] in weights:
            member["weight"] = float(f"{weights[member['name']]:.4g}")
    try:
        replace_file(path, tomlkit.dumps(document).encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None
