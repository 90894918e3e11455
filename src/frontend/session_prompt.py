"""A session's prompt: the whole conversation through the chat template, in the very tokens that the model has seen.

The text of an answer, tokenised again, need not give the tokens that were drawn; then the cache would hold other
tokens, and the conversation would be computed again from there. So a session keeps the ids of its conversation, and a
turn's prompt is those ids and the tokens of what the template puts behind them. Where the template shows an answer
otherwise than it was drawn (thinking left out, white space trimmed), all of it is tokenised anew.
"""

from functools import lru_cache
from hashlib import blake2b
from itertools import takewhile

from msgspec import Struct

from shoal.frontend.prompts import chat_text, text_ids
from shoal.frontend.schemas.chat import ChatMessage
from shoal.frontend.service import Service
from shoal.messages import Limits
from shoal.storage.sessions import Context
from shoal.tokenizer import Tokenizer
from shoal.wire import pack_ids, unpack_ids

_DIGEST_BYTES = 16
_SAMPLED_TOKENS = 1024


class Prompt(Struct, frozen=True):
    """What one turn asks the model."""

    ids: list[int]
    text: str
    """What they spell."""
    history_tokens: int
    """How many of them the turn before left."""


def build(
    service: Service, limits: Limits, messages: list[ChatMessage], context: Context, *, to_answer: bool
) -> Prompt:
    """Renders and tokenises. RequestError 400 for what the template refuses, or what is far too long."""
    text = chat_text(service, messages, to_answer=to_answer)
    known = [] if not context.ids else list(unpack_ids(context.ids))
    if known and _digest(service.tokenizer, text[: context.characters]) == context.digest:
        added = text_ids(service, limits, text[context.characters :], add_special=False, field="messages")
        if _begins_with_special(service.tokenizer, added, text[context.characters :]):
            closes = added[0] == context.stop_id
            return Prompt(known + added, text, len(known) + closes)
    ids = text_ids(service, limits, text, add_special=False, field="messages")
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, ids, strict=False)))
    return Prompt(ids, text, same)


def context_after(
    service: Service, prompt: Prompt, answer: str, ids: list[int], stop_ids: tuple[int, ...]
) -> Context:
    """What the next turn goes on from: prompt and answer, where ``ids`` spell the answer exactly, else the prompt."""
    stop_id = ids[-1] if ids and ids[-1] in stop_ids else -1
    drawn = ids[:-1] if stop_id >= 0 else ids
    if service.tokenizer.decode(drawn, skip_special=False) != answer:
        drawn, answer, stop_id = [], "", -1
    text = prompt.text + answer
    return Context(pack_ids(prompt.ids + drawn), len(text), _digest(service.tokenizer, text), stop_id)


def _begins_with_special(tokenizer: Tokenizer, ids: list[int], text: str) -> bool:
    """Tokenisers split texts at special tokens: only there do two texts have the tokens that they have together."""
    return (
        bool(ids)
        and ids[0] in tokenizer.special_ids
        and text.encode().startswith(tokenizer.token_bytes(ids[0]))
    )


def _digest(tokenizer: Tokenizer, text: str) -> bytes:
    return blake2b(text.encode(), digest_size=_DIGEST_BYTES, key=_vocabulary_digest(tokenizer)).digest()


@lru_cache(maxsize=1)
def _vocabulary_digest(tokenizer: Tokenizer) -> bytes:
    """Tells vocabularies apart, for a store that is served with another model: from tokens all over it."""
    digest = blake2b(str(tokenizer.vocab_size).encode(), digest_size=_DIGEST_BYTES)
    for token_id in range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // _SAMPLED_TOKENS)):
        digest.update(tokenizer.token_bytes(token_id) + b"\0")
    return digest.digest()
