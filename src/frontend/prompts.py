"""A text to a prompt's token ids, with bounded work however long it is. Called by the routes, off the event loop."""

from typing import Final

from shoal.errors import RequestError
from shoal.frontend.service import Service
from shoal.messages import Limits

_PROBE_CHARACTERS_A_TOKEN: Final = 16
"""Texts longer than this many characters for each token of the context are probed first."""


def text_ids(service: Service, limits: Limits, text: str, *, add_special: bool, field: str) -> list[int]:
    """Token ids of ``text``. A text whose beginning alone is twice the context is refused without its rest."""
    probe = limits.session_len * _PROBE_CHARACTERS_A_TOKEN
    if len(text) > 2 * probe:
        tokens = len(service.tokenizer.encode(text[:probe], add_special=add_special))
        if tokens > 2 * limits.session_len:
            raise overflow(limits, field, f"far more than {tokens} tokens are in the {field}")
    ids = service.tokenizer.encode(text, add_special=add_special)
    if ids and max(ids) >= service.vocab_size:
        raise _without_embedding(service, max(ids), field)
    return ids


def _without_embedding(service: Service, token_id: int, field: str) -> RequestError:
    """Tokens are added to tokenizers, [PAD] for one, whose models were never given rows for them."""
    spelled = service.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
    message = (
        f"{field}: {spelled[:40]!r} is token {token_id}, which this model has no embedding for "
        f"(0 to {service.vocab_size - 1}); leave it out"
    )
    return RequestError(400, message, param=field, code="invalid_value")


def overflow(limits: Limits, field: str, numbers: str) -> RequestError:
    """The refusal of what does not fit the context."""
    message = (
        f"this server's context length is {limits.session_len} tokens, but {numbers}; shorten the {field}, "
        "ask for fewer tokens, or start the server with a larger --session_len"
    )
    return RequestError(400, message, param=field, code="context_length_exceeded")
