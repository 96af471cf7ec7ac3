"""The environment in which chat templates are rendered: they come with models, from anybody.

Jinja's own sandbox keeps them from the system. This one also keeps them from making a text of gigabytes in one
operation. What takes many (a text that is doubled in a loop, a loop in a loop) is left to whoever tries a file first.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST = 1_000_000  # characters of a text, entries of a list, or a number that stands for so many
_LONGEST = 64_000_000  # of what is put together from a conversation
_MOST_BITS = 4096  # of a number
_WIDTH = re.compile(r"\d{7}|%[^a-zA-Z%]*\*")  # in a format


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in the dialect of Hugging Face's transformers, without operations that make something huge."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        del self.globals["lipsum"]
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Calculate, if the result cannot be huge."""
        if _is_huge(operator, left, right):
            raise jinja2.TemplateError(f"what {operator} makes is too large")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, or a method, if no number that it gets can make its result huge."""
        _check_numbers([*args, *kwargs.values()])
        if getattr(__obj, "__name__", "") in ("format", "format_map"):
            _check_format(getattr(__obj, "__self__", ""))
        return super().call(__context, __obj, *args, **kwargs)


def _is_huge(operator: str, left: Any, right: Any) -> bool:
    lengths = [len(value) for value in (left, right) if hasattr(value, "__len__")]
    if operator == "%":
        return isinstance(left, str) and bool(_WIDTH.search(left))
    if operator == "+":
        return sum(lengths) > _LONGEST
    numbers = [abs(value) for value in (left, right) if isinstance(value, int)]
    if operator == "*":
        return (bool(lengths) and math.prod([*lengths, *numbers]) > _MOST) or sum(
            map(int.bit_length, numbers)
        ) > _MOST_BITS
    return len(numbers) == 2 and numbers[0].bit_length() * numbers[1] > _MOST_BITS


def _check_numbers(arguments: Iterable[Any]) -> None:
    if any(isinstance(argument, int) and abs(argument) > _MOST for argument in arguments):
        raise jinja2.TemplateError("a number in a call is too large")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDTH.search(text):
        raise jinja2.TemplateError("a width in a format is too large")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _check_numbers([*args[1:], *kwargs.values()])
        if name == "format":
            _check_format(args[0])
        return function(*args, **kwargs)

    return filtered


class _Generation(jinja2.ext.Extension):
    """Lets `{% generation %}` through, which marks the replies for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
