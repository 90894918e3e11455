"""Whether the grammars of requests can be held: each is compiled once, and the outcome remembered.

The ranks follow them; here is only checked, with the same code and under the same limits, so that a schema that cannot
be held is the client's 400 and not a failure in the middle of an answer. Compiling runs in one thread beside the event
loop: a hostile grammar costs its sender a second, and others the wait for it.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, Final

from llguidance import LLTokenizer
from msgspec import Struct

from shoal.errors import ModelError, RequestError
from shoal.frontend.lark import SEPARATORS
from shoal.grammar_tokens import compiler_threads, open_matcher

_REMEMBERED: Final = 1024
_PATIENCE_S: Final = 10.0
_MOST_WAITING: Final = 64
_SEARCH_S: Final = 0.5
_LONGEST_ERROR: Final = 1000
_SHARED: Final = ("$defs", "definitions")
_MAPS: Final = ("properties", "patternProperties", *_SHARED)
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLES: Final = ("items", "additionalProperties", "not", "if", "then", "else")
Path = tuple[str | int, ...]


class Grammars:
    """Checks grammars for one model. ``make_tokens`` may take seconds: it is called by ``load``, else with the first
    check."""

    def __init__(self, make_tokens: Callable[[], LLTokenizer]) -> None:
        self._make_tokens = make_tokens
        self._tokens: LLTokenizer | None = None
        self._refusal = ""
        """Why this model can hold no grammar."""
        self._threads: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._faults: OrderedDict[bytes, Fault] = OrderedDict()
        """By the digest of a source and its field."""

    def load(self) -> None:
        """Makes llguidance's view of the vocabulary, unless it is there. Before a process forks, so that its children
        share it."""
        if self._tokens is None and not self._refusal:
            try:
                self._tokens = self._make_tokens()
            except ModelError as error:
                self._refusal = str(error)

    async def check(self, source: str, field: str, schema: dict[str, Any] | None = None) -> None:
        """Raises RequestError where ``source`` cannot be held: 400 that names the place in ``schema``, where it is
        made of one, or else ``field``; 503 where too many others are being checked."""
        digest = blake2b(f"{field}\0{source}".encode(), digest_size=16).digest()
        fault = self._faults.get(digest)
        if fault is None:
            fault = await self._compile(source, field, schema)
            self._faults[digest] = fault
            if len(self._faults) > _REMEMBERED:
                self._faults.popitem(last=False)
        else:
            self._faults.move_to_end(digest)
        if fault.wrong:
            message = f"{fault.place}: {fault.wrong}"[:_LONGEST_ERROR]
            raise RequestError(400, message, param=fault.place, code="invalid_value")

    async def _compile(self, source: str, field: str, schema: dict[str, Any] | None) -> "Fault":
        if self._waiting >= _MOST_WAITING:
            raise _busy()
        if self._threads is None:
            self._threads = compiler_threads("grammar-checks")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._threads, self._find_fault, source, field, schema)
            return await asyncio.wait_for(work, _PATIENCE_S)
        except TimeoutError as error:
            raise _busy() from error
        finally:
            self._waiting -= 1

    # --- in the thread ---

    def _find_fault(self, source: str, field: str, schema: dict[str, Any] | None) -> "Fault":
        self.load()
        if self._tokens is None:
            return Fault(field, self._refusal)
        wrong = self._error(source)
        if not wrong or schema is None:
            return Fault(field, wrong)
        return Fault(field + "".join(map(_step, self._place(schema, wrong))), wrong)

    def _error(self, source: str) -> str:
        assert self._tokens is not None
        try:
            open_matcher(self._tokens, source)
        except ValueError as error:
            return str(error)
        return ""

    def _place(self, schema: dict[str, Any], wrong: str) -> Path:
        """Where in ``schema`` the innermost part stands that by itself gives the same error."""
        deadline_s = time.monotonic() + _SEARCH_S
        shared: dict[str, Any] = {name: schema[name] for name in _SHARED if name in schema}
        path: Path = ()
        found = True
        while found:
            found = False
            for step, inner in _inner_schemas(schema):
                if time.monotonic() > deadline_s:
                    break
                if self._error(json_source({**shared, **inner})) == wrong:
                    path, schema, found = path + step, inner, True
                    break
        return path


class Fault(Struct, frozen=True):
    """What is wrong with a grammar; an empty ``wrong``: nothing."""

    place: str
    wrong: str


def json_source(schema: dict[str, Any]) -> str:
    """The grammar of a JSON schema by itself."""
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": SEPARATORS}}]})


def _inner_schemas(schema: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for name in _MAPS:
        inner = schema.get(name)
        if isinstance(inner, dict):
            yield from (((name, key), value) for key, value in inner.items() if isinstance(value, dict))
    for name in _LISTS:
        listed = schema.get(name)
        if isinstance(listed, list):
            yield from (((name, n), value) for n, value in enumerate(listed) if isinstance(value, dict))
    for name in _SINGLES:
        if isinstance(schema.get(name), dict):
            yield (name,), schema[name]


def _step(step: str | int) -> str:
    return f"[{step}]" if isinstance(step, int) else f".{step}"


def _busy() -> RequestError:
    return RequestError(
        503, "too many grammars are being checked; try again", code="overloaded", retry_after_s=1
    )
