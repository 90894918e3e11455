"""The Jinja environment in which chat templates run: Hugging Face's set-up, with brakes. Used by ``chat_template.py``.

Templates are strangers' programs. Jinja's sandbox keeps them from Python's internals; here they also get limits on
processor time and on the size of what they build.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARS = 64 << 20
"""More than any context holds."""
MAX_RENDER_S = 2.0
"""Processor time of one rendering."""

_MAX_NUMBER = 1_000_000
_MAX_NUMBER_BITS = 4096
_WIDE_FORM = re.compile(r"\d{6}|\*")
_deadline: ContextVar[float] = ContextVar("deadline")


@contextmanager
def time_limit() -> Iterator[None]:
    """Whatever a template does inside has this long."""
    token = _deadline.set(time.thread_time() + MAX_RENDER_S)
    try:
        yield
    finally:
        _deadline.reset(token)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja for chat templates."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.filters["paced"] = _paced
        self.filters["joined"] = _joined
        for name in ("center", "indent", "batch", "slice", "wordwrap", "truncate", "round"):
            self.filters[name] = _guarded(self.filters[name], _check_arguments)
        self.filters["format"] = _guarded(self.filters["format"], _check_format_filter)
        self.filters["replace"] = _guarded(self.filters["replace"], _check_replace_filter)
        self.filters["join"] = _measured_join(self.filters["join"])
        del self.globals["lipsum"]
        self.globals["dict"] = _new_dict
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Puts the clock into every loop, and a limit on every ``~``."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "paced", [], [], None, None, lineno=loop.lineno)
        _limit_concatenations(tree)
        tree.set_environment(self)
        return tree

    @staticmethod
    def concat(parts: Iterable[Any]) -> str:
        """What macros and blocks build from their pieces."""
        return _joined(parts)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        check_time()
        _check_arguments(args, kwargs)
        method = getattr(function, "__wrapped__", function)
        if isinstance(text := getattr(method, "__self__", None), str):
            args = _measured_arguments(method.__name__, args)
            _check_method(text, method.__name__, args)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _check_size(_size(left) + _size(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        else:
            _check_form(left)
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's own words for training; here it shows its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


# --- rewriting ---------------------------------------------------------------------------------------------


def _limit_concatenations(node: nodes.Node) -> None:
    """Replaces each ``a ~ b`` in the tree below ``node`` by the filter ``joined`` over a list."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _limited(value))
        elif isinstance(value, list):
            value[:] = [_limited(item) if isinstance(item, nodes.Node) else item for item in value]


def _limited(node: nodes.Node) -> nodes.Node:
    _limit_concatenations(node)
    if not isinstance(node, nodes.Concat):
        return node
    parts = nodes.List(node.nodes, lineno=node.lineno)
    return nodes.Filter(parts, "joined", [], [], None, None, lineno=node.lineno)


def _guarded(filter_function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """A built-in filter whose arguments are looked at first."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        check(args, kwargs)
        return filter_function(*args, **kwargs)

    for mark in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(filter_function, mark):
            setattr(guarded, mark, getattr(filter_function, mark))
    return guarded


def _measured_join(join: Callable[..., Any]) -> Callable[..., Any]:
    """The filter ``join``, which takes any iterable."""

    def measured(pass_arg: Any, items: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        pieces = list(_measured(items))
        _check_join(str(d), pieces)
        return join(pass_arg, pieces, d, attribute)

    for mark in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(join, mark):
            setattr(measured, mark, getattr(join, mark))
    return measured


def _measured_arguments(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``str.join`` takes any iterable too."""
    return (list(_measured(args[0])), *args[1:]) if name == "join" and args else args


def _measured(items: Iterable[Any]) -> Iterator[Any]:
    """The items, as long as all together are not too large."""
    total = 0
    for item in _paced(items):
        total += _size(item) + 1
        _check_size(total)
        yield item


def _paced(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        check_time()
        yield item


def _joined(parts: Iterable[Any]) -> str:
    texts: list[str] = []
    total = 0
    for part in parts:
        text = str(part)
        total += len(text)
        _check_size(total)
        texts.append(text)
    return "".join(texts)


# --- limits ------------------------------------------------------------------------------------------------


def check_time() -> None:
    if time.thread_time() > _deadline.get():
        raise SecurityError("it takes too long")


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise SecurityError("an argument is too large a number")


def _check_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    """Methods of strings that give far more than they take."""
    if name in ("format", "format_map"):
        _check_form(text)
    elif name == "replace":
        _check_replace(text, *args[:2])
    elif name == "join" and args:
        _check_join(text, args[0])
    elif name == "translate" and args and isinstance(args[0], dict):
        _check_size(len(text) * max(map(_size, args[0].values()), default=0))
    elif name == "expandtabs" and args and isinstance(args[0], int):
        _check_size(text.count("\t") * max(args[0], 0))


def _check_format_filter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _check_arguments(args, kwargs)
    _check_form(args[0])


def _check_replace_filter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _, text, *rest = args
    old = kwargs.get("old", rest[0] if rest else "")
    new = kwargs.get("new", rest[1] if len(rest) > 1 else "")
    _check_replace(str(text), str(old), str(new))


def _check_replace(text: str, old: Any = "", new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_size(len(text) + text.count(old) * len(new))


def _check_join(separator: str, items: list[Any] | tuple[Any, ...]) -> None:
    _check_size(len(separator) * len(items) + sum(map(_size, items)))


def _check_form(form: Any) -> None:
    if isinstance(form, str) and _WIDE_FORM.search(form):
        raise SecurityError("a format has too large a width")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int) or isinstance(right, int):
        number, sized = (left, right) if isinstance(left, int) else (right, left)
        _check_size(max(number, 0) * _size(sized))


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int):
        _check_bits(base.bit_length() * max(exponent, 0))


def _check_bits(bits: int) -> None:
    if bits > _MAX_NUMBER_BITS:
        raise SecurityError("it computes too large a number")


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT_CHARS:
        raise SecurityError("it builds too large a value")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


# --- what templates may call ---------------------------------------------------------------------------------


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own it escapes no HTML characters."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return "".join(_measured(encoder.iterencode(value)))


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
