"""Settings as a user types them: the value of --weights, and the chat's /set."""

from collections.abc import Sequence

from me_local.checks import argument, nearest, number, parsed, shown
from me_local.config import SAMPLING_KEYS, Overrides, check, checked_weights
from me_local.errors import ConfigError

_LISTED = ("logit_bias", "dry_sequence_breakers", "ignore_eos")  # JSON after /set
_NUMBER_SETTINGS = (*(key for key in SAMPLING_KEYS if key not in _LISTED), "min_tokens", "max_tokens", "seed")
_SETTINGS = (*_NUMBER_SETTINGS, *_LISTED, "stop", "decode", "strategy", "unit", "template_args")


def parse_weights(text: str, names: Sequence[str]) -> dict[str, float]:
    """The value of --weights, "a=0.7,b=0.3" or "0.7,0.3" in the members' order, as name → weight.

    Raises ConfigError for a name that no member has or that comes twice, a wrong count and a bad weight.
    """
    parts = [part.strip() for part in text.split(",")]
    if "=" not in text and len(parts) != len(names):
        raise ConfigError(f"--weights: needs a weight for each of {', '.join(names)}, got {shown(text)}")
    pairs = [part.partition("=")[::2] for part in parts] if "=" in text else zip(names, parts, strict=True)
    weights: dict[str, object] = {}
    for name, value in pairs:
        if name.strip() in weights:
            raise ConfigError(f"--weights: {shown(name.strip())} is named twice")
        weights[name.strip()] = number(value)
    return checked_weights(weights, names)


def parse_setting(key: str, value: str) -> Overrides:
    """The chat's `/set KEY VALUE` as checked overrides; raises ConfigError that names the key."""
    if key not in _SETTINGS:
        raise ConfigError(f"/set: unknown key {shown(key)}; {nearest(key, _SETTINGS)}")
    typed: object = number(value) if key in _NUMBER_SETTINGS else parsed(value) if key in _LISTED else value
    if key == "template_args":
        typed = dict([argument(value, "/set template_args")])
    return Overrides(**{key: check(key, typed, f"/set {key}")})
