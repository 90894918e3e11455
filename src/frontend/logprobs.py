"""Log-probabilities in OpenAI's two forms: a list of records (chat), parallel lists (completions)."""

import codecs
from typing import Final

from shoal.frontend.api_types import ChatLogprobs, ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs
from shoal.frontend.generation import Piece
from shoal.frontend.tokenize import Tokenizer

_LOWEST: Final = -9999.0
"""What OpenAI writes for an impossible token: JSON has no infinity."""


def chat_logprobs(tokenizer: Tokenizer, piece: Piece) -> ChatLogprobs:
    """The piece's tokens as records."""
    records = []
    for token_id, entry in zip(piece.ids, piece.logprobs, strict=True):
        top = [_candidate(tokenizer, other, logprob) for other, logprob in entry.top]
        own = _candidate(tokenizer, token_id, entry.logprob)
        records.append(ChatTokenLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(records)


class CompletionLogprobWriter:
    """Keeps the offset in the text from piece to piece of one choice."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, piece: Piece) -> CompletionLogprobs:
        """The piece's tokens as parallel lists; the sampled token is among the candidates."""
        lists = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(piece.ids, piece.logprobs, strict=True):
            raw = self._tokenizer.token_bytes(token_id)
            lists.tokens.append(_spelled(raw))
            lists.token_logprobs.append(max(entry.logprob, _LOWEST))
            lists.top_logprobs.append(self._candidates(token_id, entry.logprob, entry.top))
            lists.text_offset.append(self._offset)
            self._offset += len(self._utf8.decode(raw))
        return lists

    def _candidates(
        self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]
    ) -> dict[str, float]:
        """Several ids may be spelled alike: the best one's value stays."""
        candidates: dict[str, float] = {}
        for other, value in (*top, (token_id, logprob)):
            candidates.setdefault(_spelled(self._tokenizer.token_bytes(other)), max(value, _LOWEST))
        return candidates


def _candidate(tokenizer: Tokenizer, token_id: int, logprob: float) -> ChatTopLogprob:
    raw = tokenizer.token_bytes(token_id)
    return ChatTopLogprob(raw.decode("utf-8", "replace"), max(logprob, _LOWEST), list(raw))


def _spelled(raw: bytes) -> str:
    """The token's text; OpenAI's ``bytes:\\xe2\\x80`` where it is only a part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
