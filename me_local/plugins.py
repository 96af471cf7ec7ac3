"""Routers and alignments by name: me-local's own and those of any installed package, as entry points."""

from importlib.metadata import entry_points
from typing import Any

from me_local.errors import ConfigError


def find(group: str, name: str, place: str) -> Any:
    """The object that an installed package registered as `name` in an entry-point group.

    Raises ConfigError, which begins with the place of the name, when there is none, or when it cannot be imported.
    """
    known = entry_points(group=group)
    matches = [point for point in known if point.name == name]
    if not matches:
        names = ", ".join(sorted({point.name for point in known})) or "none"
        raise ConfigError(f'{place}: "{name}": no installed package provides it in {group} (there are: {names})')
    try:
        return matches[0].load()
    except Exception as error:  # whatever the package's import raises
        raise ConfigError(f'{place}: "{name}" of {group} cannot be imported from {matches[0].value}: {error}') from None
