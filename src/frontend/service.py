"""What every route needs, put together once at start: settings, tokenizer, template, switchboard."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from shoal import __version__
from shoal.config import Settings
from shoal.errors import RequestError
from shoal.frontend.chat_template import ChatTemplate
from shoal.frontend.grammar import Grammars
from shoal.frontend.switchboard import Switchboard
from shoal.storage.opened import Storage
from shoal.tokenizer import Tokenizer

_INLINE_CHARACTERS: Final = 16_384
"""Longer texts are tokenised off the event loop, so that no other request notices."""

R = TypeVar("R")


class Defaults(Struct, frozen=True, kw_only=True):
    """Sampling values for what a request leaves unset: the model's own, else OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    declared: frozenset[str] = frozenset()
    """The fields that the model's authors set: a route's own defaults give way to them."""


class Service(Struct, kw_only=True):
    """The parts that routes share; nothing in here changes but what the switchboard holds, what the grammars
    remember, and what runs in the background."""

    settings: Settings
    tokenizer: Tokenizer
    template: ChatTemplate
    vocab_size: int
    """Rows of the model's embedding: ids from 0 to below this are valid."""
    eos_ids: tuple[int, ...]
    defaults: Defaults
    switchboard: Switchboard
    storage: Storage
    grammars: Grammars
    created: int
    """Unix time that /v1/models tells."""
    background: set[asyncio.Task[None]] = msgspec.field(default_factory=set)
    """Work that goes on when its request has been answered; a drain waits for it."""

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint."""
        return f"shoal-{__version__}"

    def check_model(self, name: str | None) -> None:
        """Raises RequestError 404 for a model that is not served; none named means the served one."""
        served = self.settings.model_name
        if name not in (None, "", served):
            message = f"the model {name!r} is not served here; served: {served}"
            raise RequestError(404, message, param="model", code="model_not_found")


async def off_loop(characters: int, work: Callable[[], R]) -> R:
    """Runs ``work`` here where its text is short, else in a thread."""
    return work() if characters <= _INLINE_CHARACTERS else await asyncio.to_thread(work)


def now() -> int:
    """OpenAI's ``created``: whole seconds."""
    return int(time.time())


def pick_defaults(declared: dict[str, Any]) -> Defaults:
    """Those of the model's generation defaults that are known here and make sense; the others are OpenAI's."""
    limits = {
        "temperature": (0.0, 2.0),
        "top_p": (1e-6, 1.0),
        "top_k": (0, 1 << 30),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (0.01, 10.0),
    }
    picked = {
        name: declared[name]
        for name, (low, high) in limits.items()
        if isinstance(declared.get(name), int | float) and low <= declared[name] <= high
    }
    if "top_k" in picked:
        picked["top_k"] = int(picked["top_k"])
    return Defaults(**picked, declared=frozenset(picked))
