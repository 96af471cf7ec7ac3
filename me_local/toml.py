"""TOML files that users wrote."""

import tomllib
from pathlib import Path

from me_local.errors import ConfigError


def read_toml(path: Path) -> dict[str, object]:
    """What a TOML file holds. Raises ConfigError that names it."""
    try:
        data = path.read_bytes()
        return tomllib.loads(data.decode("utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x} in line {line})") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # tomllib lets the two through on absurd numbers and nesting
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
