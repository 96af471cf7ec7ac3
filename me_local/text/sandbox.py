"""The environment in which chat templates are rendered: they come with models, from anybody.

Jinja's own sandbox keeps them from the system. This one also keeps them from texts of gigabytes and from running for
ever: operations that would make something huge are refused, and steps are counted (a turn of a loop, a call), of which
a rendering has so many and no more.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST = 1_000_000  # characters of a text, entries of a list, or a number that stands for so many
_LONGEST = 64_000_000  # of what is put together from a conversation
_MOST_BITS = 4096  # of a number
_STEPS = 3_000_000  # a second or two; a conversation of 10,000 messages takes some 100,000
_CALL = 10  # steps
_WIDTH = re.compile(r"\d{7}|%[-+#0-9.]*\*")  # in a format


class ExcessError(jinja2.TemplateError):
    """A template does more than any should."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in the dialect of Hugging Face's transformers, for templates that may be hostile.

    `write` renders one; where it does too much, that raises ExcessError.
    """

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        del self.globals["lipsum"]
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.filters |= {_COUNTED: self._counted, _JOINED: _joined, _BOUNDED: _bounded}
        self._left = _STEPS

    def write(self, template: jinja2.Template, /, **given: Any) -> str:
        """What the template makes of these variables."""
        self._left = _STEPS
        pieces, length = [], 0
        for piece in template.generate(given):
            pieces.append(piece)
            length += len(piece)
            _require(length)
        return "".join(pieces)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What is called instead of a text's `format`."""
        wrapped = super().wrap_str_format(value)
        if wrapped:
            _check_format(value.__self__)
        return wrapped

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filtered(loop.iter, _COUNTED)
        for block in tree.find_all(jinja2.nodes.AssignBlock):
            block.filter = _filtered(block.filter, _BOUNDED)
        return _Joins().visit(tree)  # type: ignore[no-any-return]

    def _counted(self, entries: Iterable[Any]) -> Iterator[Any]:
        for entry in entries:
            self._step()
            yield entry

    def _step(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise ExcessError("it does not come to an end")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Calculate, if the result cannot be huge."""
        if _is_huge(operator, left, right):
            raise ExcessError(f"what {operator} makes is too large")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, or a method, if no number that it gets can make its result huge."""
        __self._step(_CALL)
        _check_numbers([*args, *kwargs.values()])
        return _bounded(super().call(__context, __obj, *args, **kwargs))


_COUNTED, _JOINED, _BOUNDED = "counted ", "joined ", "bounded "  # no name that a template could write


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None)


class _Joins(jinja2.visitor.NodeTransformer):
    """Has what stands between tildes put together by `_joined`."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Filter:  # noqa: N802
        """Replace one, and those in it."""
        self.generic_visit(node)
        return _filtered(jinja2.nodes.List(node.nodes), _JOINED)


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _require(sum(map(len, texts)))
    return "".join(texts)


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        _require(len(value))
    return value


def _require(length: int) -> None:
    if length > _LONGEST:
        raise ExcessError("the text that it makes is too long")


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
        raise ExcessError("a number in a call is too large")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDTH.search(text):
        raise ExcessError("a width in a format is too large")


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
