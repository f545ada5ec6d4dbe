"""Jinja with limits on time and size, in the dialect that Hugging Face chat templates are written in.

A template is code that came with a model. It runs in Jinja's immutable sandbox and sees plain values only.
A trace function stops it at a deadline, and every operation that can multiply text is checked before it
runs, since a single one (`'x' * 10**10`) would never come back to the trace function. That stops runaway
templates and the usual bombs; it is no substitute for trusting where a model comes from.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.filters import do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from text.errors import TemplateError, TemplateLimitError

_TEMPLATE_FILENAME = "<template>"  # what Jinja calls code compiled from a string
_MAX_SOURCE_CHARS = 1 << 20
_MAX_NODES = 1 << 18
_MAX_INTEGER_BITS = 4096
_MAX_ERROR_CHARS = 300
_WIDE_FORMAT = re.compile(r"\d{5,}|\*|\{[^}]*\{")

# fmt: off
_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "reverse", "round", "safe", "select", "selectattr", "sort", "title", "trim", "unique", "upper",
)
# Methods that allocate what their arguments say.
_DENIED_TEXT_METHODS = frozenset((
    "center", "encode", "expandtabs", "ljust", "maketrans", "rjust", "translate",
    "zfill",
))
# fmt: on


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """Seconds of the rendering thread's own CPU time by default, and characters of any text that is made."""

    time_s: float = 2.0
    output_chars: int = 16 << 20


class _OutOfTime(BaseException):
    """Raised in template code by the trace function. Not an Exception, so that nothing there swallows it."""


class SandboxedTemplate:
    """A compiled template.

    `clock` gives the seconds that `limits.time_s` bounds; `now` is what `strftime_now` formats.
    """

    def __init__(
        self, source: str, *, limits: RenderLimits, clock: Callable[[], float], now: Callable[[], datetime]
    ) -> None:
        """Raises TemplateError if `source` is not a template, or is too long."""
        if len(source) > _MAX_SOURCE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters; at most {_MAX_SOURCE_CHARS} may be"
            )
        self._limits = limits
        self._clock = clock
        with self._limited():
            self._template = _Environment(limits, now).from_string(source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises TemplateError (wrong, or it refuses the input) or TemplateLimitError."""
        with self._limited():
            return self._template.render(**variables)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        try:
            with _deadline(self._clock, self._limits.time_s):
                yield
        except TemplateError:
            raise
        except _OutOfTime:
            raise TemplateLimitError(f"the chat template took more than {self._limits.time_s:g} s") from None
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is wrong in line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:
            reason = str(error)[:_MAX_ERROR_CHARS] or type(error).__name__
            raise TemplateError(f"the chat template failed: {reason}") from error


@contextmanager
def _deadline(clock: Callable[[], float], limit_s: float) -> Iterator[None]:
    """Raise _OutOfTime in this thread at the first line of template code after `limit_s`."""
    end_s = clock() + limit_s

    def on_line(frame: FrameType, event: str, arg: Any) -> Any:
        if clock() > end_s:
            raise _OutOfTime
        return on_line

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        on_line(frame, event, arg)
        return on_line if frame.f_code.co_filename == _TEMPLATE_FILENAME else None

    previous = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(previous)


class _Environment(ImmutableSandboxedEnvironment):
    """Hugging Face's environment (trim_blocks, lstrip_blocks, loop controls, its globals), with bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, limits: RenderLimits, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            finalize=self._weighed,
        )
        self._max_chars = limits.output_chars
        self._now = now
        self.filters = {name: self.filters[name] for name in _FILTERS} | {
            "format": self._format,
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "string": self._string,
            "tojson": self._tojson,
        }
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")} | {
            "dict": _plain_dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _BoundedConcat().visit(super()._parse(source, name, filename))
        return tree

    def concat(self, parts: Iterable[str]) -> str:
        """Join the pieces of a block, a macro or the whole output."""
        collected, num_chars = [], 0
        for part in parts:
            num_chars += len(part)
            self._check_chars(num_chars)
            collected.append(part)
        return "".join(collected)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._check_chars(len(left) + len(right))
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(max(1, left.bit_length()) * abs(right))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, method = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and method == "replace":
            __obj = partial(__self._replace, owner)
        elif isinstance(owner, str) and method == "join":
            __obj = partial(__self._join, d=owner)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        if (wrapped := super().wrap_str_format(value)) is not None:
            self._check_format(value.__self__)
        return wrapped

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _DENIED_TEXT_METHODS:
            return False
        return not isinstance(obj, int | float | bytes) and super().is_safe_attribute(obj, attr, value)

    def _check_chars(self, num_chars: int) -> None:
        if num_chars > self._max_chars:
            raise TemplateLimitError(f"the chat template makes more than {self._max_chars} characters")

    def _check_bits(self, num_bits: int) -> None:
        if num_bits > _MAX_INTEGER_BITS:
            raise TemplateLimitError(
                f"the chat template makes a number of more than {_MAX_INTEGER_BITS} bits"
            )

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() + right.bit_length())
        for text, times in ((left, right), (right, left)):
            if hasattr(text, "__len__") and isinstance(times, int):
                self._check_chars(len(text) * times)

    def _check_format(self, pattern: str) -> None:
        if _WIDE_FORMAT.search(pattern):
            raise TemplateLimitError("the chat template formats with a width of more than four digits")

    def _weighed(self, value: Any) -> Any:
        """`value`, if writing it as text stays within bounds: nested lists can share parts and explode."""
        num_nodes, num_chars, stack = 0, 0, [value]
        while stack:
            item = stack.pop()
            num_nodes += 1
            if num_nodes > _MAX_NODES:
                raise TemplateLimitError(f"the chat template writes a value of more than {_MAX_NODES} parts")
            if isinstance(item, str):
                num_chars += len(item)
                if num_chars > self._max_chars:  # not a call, which would be traced
                    self._check_chars(num_chars)
            elif isinstance(item, dict):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                stack += item
        return value

    def _string(self, value: Any) -> str:
        return str(self._weighed(value))

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = value if attribute is None else map(make_attrgetter(self, attribute), value)
        separator = str(d)
        parts: list[str] = []
        num_chars = 0
        for item in items:
            parts.append(self._string(item))
            num_chars += len(parts[-1]) + len(separator)
            self._check_chars(num_chars)
        return separator.join(parts)

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        source, sought, put = self._string(text), self._string(old), self._string(new)
        num_found = source.count(sought)
        times = num_found if count is None or count < 0 else min(num_found, count)
        self._check_chars(len(source) + times * len(put))
        return source.replace(sought, put, times)

    def _format(self, pattern: Any, *args: Any, **kwargs: Any) -> str:
        text = self._string(pattern)
        self._check_format(text)
        return text % (kwargs or args)

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self._string(text)
        margin_chars = len(width) if isinstance(width, str) else int(width)
        self._check_chars(len(text) + (text.count("\n") + 1) * margin_chars)
        return do_indent(text, width, first, blank)

    def _strftime_now(self, pattern: str) -> str:
        self._check_format(pattern)
        return self._now().strftime(pattern)

    def _tojson(self, value: Any, **options: Any) -> str:
        """Hugging Face's tojson: no escaping for HTML, and json.dumps's own options."""
        allowed = {"ensure_ascii": False, "indent": None, "separators": None, "sort_keys": False}
        if unknown := options.keys() - allowed.keys():
            raise TypeError(f"tojson() has no option {min(unknown)!r}")
        settings = allowed | options
        if not isinstance(settings["indent"], int | None) or (settings["indent"] or 0) > 16:
            raise TemplateLimitError("the chat template indents JSON by more than 16")
        return json.dumps(self._weighed(value), **settings)


class _BoundedConcat(NodeTransformer):
    """`a ~ b` compiles to a join that cannot be intercepted; write it as the filter that can."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks an answer's tokens for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's namespace without underscore names, through which templates have reached Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _plain_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict`, but a function: the type itself has attributes that templates need not see."""
    return dict(*args, **kwargs)


def _raise_exception(message: Any = "") -> NoReturn:
    raise TemplateError(f"the chat template refuses these messages: {str(message)[:_MAX_ERROR_CHARS]}")
