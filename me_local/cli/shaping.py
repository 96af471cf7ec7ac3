"""Options on how a member's distribution is shaped, and help texts in sections, as there are many of them."""

from collections.abc import Callable
from typing import Any

import click

from me_local.sampling import parse_bias

Attributes = dict[str, Any]


class Option(click.Option):
    """An option that stands in a section of the help text."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Sectioned(click.Command):
    """A command whose help text has sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Lines(click.types.StringParamType):
    """Texts, of which an environment variable holds one: white space belongs to it."""

    def split_envvar_value(self, rv: str) -> list[str]:
        """The values of an environment variable."""
        return [rv]


_TRUNCATION: dict[str, Attributes] = {
    "--temperature": {"help": "Sharpens (< 1) or flattens each member's distribution; 0: its argmax."},
    "--top-k": {"type": int, "help": "Keep each member's k likeliest tokens; 0: all."},
    "--typical-p": {"help": "Keep each member's most typical tokens of this total probability; 1: off."},
    "--top-p": {"help": "Keep each member's likeliest tokens of this total probability; 1: off."},
    "--min-p": {"help": "Drop tokens below this part of the likeliest one's probability; 0: off."},
    "--top-n-sigma": {"help": "Drop tokens whose logit is more standard deviations below the largest; -1: off."},
    "--xtc-probability": {"help": "How often the likeliest tokens are dropped; 0: never."},
    "--xtc-threshold": {"help": "Which: all from this probability on, but for the least likely of them."},
}
_REPETITION: dict[str, Attributes] = {
    "--repeat-penalty": {"help": "Divides logits of tokens that stand in the context; 1: off."},
    "--presence-penalty": {"help": "Taken from their logits; 0: off."},
    "--frequency-penalty": {"help": "Taken from them once for each time they stand there; 0: off."},
    "--repeat-last-n": {"type": int, "help": "In so many tokens of the context; -1: in all of it; 0: off."},
    "--dry-multiplier": {"help": "DRY, against repeated sequences: what one of the allowed length costs; 0: off."},
    "--dry-base": {"help": "Each token more costs so many times as much."},
    "--dry-allowed-length": {"type": int, "help": "Tokens that may be repeated for nothing."},
    "--dry-penalty-last-n": {"type": int, "help": "Look for them in so many tokens of the context; -1: in all of it."},
    "--dry-sequence-breaker": {
        "name": "dry_sequence_breakers",
        "type": Lines(),
        "multiple": True,
        "help": "A text at which sequences end; may be given several times.",
    },
}
_FORCE: dict[str, Attributes] = {
    "--logit-bias": {
        "type": Lines(),
        "multiple": True,
        "metavar": "TEXT=B",
        "help": "Add B to the logits of the token with this text; -100 or false: never; may be given several times.",
    },
    "--min-tokens": {"type": int, "help": "The smallest number of pieces in a reply."},
    "--ignore-eos": {"is_flag": True, "default": None, "help": "Never end before --max-tokens or a stop text."},
}
OPTIONS: dict[str, dict[str, Attributes]] = {
    "Sampling": _TRUNCATION,
    "Repetition": _REPETITION,
    "What may come": _FORCE,
}
"""By section."""


def each_option(make: Callable[..., Callable[[Any], Any]]) -> list[Callable[[Any], Any]]:
    """What `make` makes of each: its name, its section and the rest."""
    made = []
    for section, options in OPTIONS.items():
        for name, attributes in options.items():
            attributes = attributes.copy()
            destination = attributes.pop("name", None)
            typed = attributes if {"type", "is_flag"} & attributes.keys() else attributes | {"type": float}
            made.append(make(name, *([destination] if destination else []), section=section, **typed))
    return made


def take_shaping(given: dict[str, Any]) -> dict[str, Any]:
    """The options as overrides have them. Raises ConfigError."""
    taken = dict(given)
    taken["logit_bias"] = [parse_bias(text) for text in given["logit_bias"]] or None
    taken["dry_sequence_breakers"] = given["dry_sequence_breakers"] or None
    return taken
