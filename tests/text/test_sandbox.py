"""Templates come from anybody: what would make gigabytes at once is refused, what templates do is not."""

import jinja2
import pytest

from me_local.errors import ConfigError, InputError
from me_local.text.messages import Message
from me_local.text.sandbox import Sandbox
from me_local.text.templates import jinja_render

BOMBS = [
    "{{ 'a' * 10000000000 }}",
    "{{ 10000000000 * 'a' }}",
    "{{ [messages] * 2000000 }}",
    "{{ 'ab' * 1000 * 1000 }}",
    "{{ 10 ** 9999999999 }}",
    "{{ 7 ** 5000 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10000000000) }}",
    "{{ 'a'.center(10000000000) }}",
    "{{ 'a'.ljust(width) }}",
    "{{ 'a' | center(10000000000) }}",
    "{{ 'a' | indent(10000000000) }}",
    "{{ lipsum(100000) }}",
    "{{ range(10000000000) | list }}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_what_would_be_huge_is_refused(source: str) -> None:
    sandbox = Sandbox()
    with pytest.raises((jinja2.TemplateError, OverflowError)):
        sandbox.write(sandbox.from_string(source), messages=["a"], width=10**10)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ '-' * 80 }}", "-" * 80),
        ("{{ 3 * 4 }} {{ 2000000 * 3000 }} {{ 2 ** 31 }} {{ 0.5 * 4 }}", "12 6000000000 2147483648 2.0"),
        ("{{ messages + ['b'] }}", "['a', 'b']"),
        ("{{ 'a' + 'b' + 1 | string }}", "ab1"),
        ("{{ 'a' ~ 1 ~ (2 ~ 'b') ~ none }}", "a12bNone"),
        (
            "{% for a in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% else %}none{% endfor %}",
            "1/1True",
        ),
        (
            "{% for a in nothing %}x{% else %}no{% endfor %}"
            "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
            "noa1",
        ),
        (
            "{% for a in [1, 2, 3] if a != 2 recursive %}{{ a }}{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}",
            "1331",
        ),
        ("{% for a in [[1], [2]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "12"),
        ("{% set x | upper %}a{% endset %}{{ x }}{% set y %}b{{ x }}{% endset %}{{ y }}", "AbA"),
        (
            "{% macro m(a) %}[{{ a }}]{{ caller() if caller }}{% endmacro %}{{ m(1) }}{% call m(2) %}c{% endcall %}",
            "[1][2]c",
        ),
        ("{{ '%s is %5.2f' % ('x', 1.5) }} {{ 'a %% *' % () }}", "x is  1.50 a % *"),
        ("{{ '%s' | format('x') }} {{ '{:>5}'.format('x') }}", "x     x"),
        ("{{ text.split('{')[0] }} {{ text.startswith('{1234567}') }}", "say  False"),
        ("{{ 12345678 | string }} {{ [3, 1] | sort | join(',') }} {{ 'a\nb' | indent(2) }}", "12345678 1,3 a\n  b"),
        (
            "{% generation %}x{% endgeneration %}"
            "{% for i in [0, 1] %}{{ i }}{% if i %}{% break %}{% endif %}{% endfor %}",
            "x01",
        ),
    ],
)
def test_what_templates_do_is_done(source: str, text: str) -> None:
    given = {"messages": ["a"], "text": "say {1234567} * 3"}
    sandbox = Sandbox()
    template = sandbox.from_string(source)
    for _ in range(2):  # what it may do is counted for each rendering
        assert sandbox.write(template, **given) == text


def test_variables_have_any_names() -> None:
    sandbox = Sandbox()
    names = ("template", "self", "given", "context")
    assert sandbox.write(sandbox.from_string("{{ template }}{{ given }}"), **dict.fromkeys(names, "x")) == "xx"


@pytest.mark.slow
@pytest.mark.parametrize("source", BOMBS)
def test_a_template_says_so_in_a_line(source: str) -> None:
    with pytest.raises((ConfigError, InputError), match=r"^t (refuses the conversation|is not a template)") as raised:
        jinja_render(source + "{{ messages[0].content }}", {}, "t")([Message("user", "Hi")])
    assert "\n" not in str(raised.value)
