"""The template sandbox: Hugging Face's dialect, and limits on what a template can do."""

import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from text.errors import TemplateError, TemplateLimitError
from text.sandbox import RenderLimits, SandboxedTemplate

pytestmark = pytest.mark.unit

_LIMITS = RenderLimits(time_s=1.0, output_chars=10_000)


def _stopped() -> float:
    return 0.0


def _ticking() -> Callable[[], float]:
    """A clock that advances by a millisecond whenever it is read."""
    reads = iter(range(1 << 60))
    return lambda: next(reads) / 1000


def _render(source: str, clock: Callable[[], float] = _stopped, /, **variables: Any) -> str:
    now = datetime(2024, 7, 26)
    return SandboxedTemplate(source, limits=_LIMITS, clock=clock, now=lambda: now).render(variables)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),  # trim_blocks and lstrip_blocks
        ("{{ {'k': '<é>', 'l': [1, none]} | tojson }}", '{"k": "<é>", "l": [1, null]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}answer{% endgeneration %}", "answer"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{{ 'a' ~ 1 ~ none ~ missing }}", "a1None"),
        ("{{ [{'n': {'m': 1}}, {'n': {'m': 2}}] | join('-', 'n.m') }}", "1-2"),
        ("{{ '-'.join(['a', 'b']) }}{{ 'aXbX'.replace('X', '.', 1) }}", "a-ba.bX"),
        ("{% for i in [1] %}{{ 'aX'.replace('X', 'b') }}{% endfor %}", "ab"),
        ("{{ 'a\nb' | indent(2) }}|{{ '%s-%d' | format('x', 3) }}|{{ '{:>3}'.format(7) }}", "a\n  b|x-3|  7"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('y') }}", "[y]"),
        ("{{ none }}{{ true }}{{ 1.5 }}", "NoneTrue1.5"),
    ],
)
def test_templates_render_as_hugging_face_renders_them(source: str, expected: str) -> None:
    assert _render(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**9 }}",
        "{{ [1] * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ (10**99)**99 }}",
        "{{ 2 ** -(10**9) }}",
        "{{ 10**900 * 10**900 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**9) }}",
        "{{ 'x' | indent(10**9, true) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ ('x' * 5000) ~ ('x' * 5001) }}",
        "{{ ('x' * 5000) + ('x' * 5001) }}",
        "{{ ('x' * 5000).replace('x', 'xxx') }}",
        "{{ ('x' * 5000) | replace('x', 'xxx') }}",
        "{{ ('y' * 5000).join(['a', 'b', 'c', 'd']) }}",
        "{{ range(9000) | join('..') }}",
        "{% for i in range(3) %}{{ 'x' * 5000 }}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}"
        "{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='x') %}"
        "{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    ],
)
def test_an_operation_that_would_make_too_much_is_refused(source: str) -> None:
    with pytest.raises(TemplateLimitError):
        _render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% for i in range(9) %}{{ m(n) if n < 9 }}{% endfor %}{% endmacro %}{{ m(0) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(source: str) -> None:
    with pytest.raises(TemplateError, match=r"took more than 1 s|recursion"):
        _render(source, _ticking())


def test_a_template_is_stopped_by_time_and_not_by_its_length() -> None:
    source = "{% for i in range(9999) %}{% set x = i %}{% endfor %}done"
    assert _render(source) == "done"
    with pytest.raises(TemplateLimitError, match="took more than 1 s"):
        _render(source, _ticking())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "line 1"),
        ("\n\n{{ }", "line 3"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'x'.ljust(10**9) }}", "unsafe"),
        ("{{ (1).to_bytes(10**9, 'big') }}", "unsafe"),
        ("{% set ns = namespace(__init__=1) %}", "__init__"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ lipsum(n=9999) }}", "lipsum"),
        ("{{ 'x' | center(10**9) }}", "center"),
        ("{{ undefined.attribute }}", "undefined"),
        ("{{ 1 / 0 }}", "division"),
        ("{% include 'file' %}", "loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
    ],
)
def test_every_failure_of_a_template_is_a_template_error_with_its_reason(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        _render(source, messages=[])


def test_a_template_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(TemplateError, match="at most"):
        _render("x" * ((1 << 20) + 1))


def test_a_trace_function_that_was_there_before_is_there_afterwards() -> None:
    def tracer(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        _render("{{ 1 }}")
        with pytest.raises(TemplateLimitError):
            _render("{{ 'x' * 10**9 }}")
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
