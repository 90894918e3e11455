"""Log-probabilities in the forms that clients know: OpenAI's list of records (chat) and parallel lists (completions),
and vLLM's for prompts."""

from collections.abc import Sequence
from typing import Final

from shoal.frontend.schemas.chat import ChatLogprobs, ChatTokenLogprob, ChatTopLogprob
from shoal.frontend.schemas.completions import CompletionLogprobs
from shoal.frontend.schemas.usage import PromptLogprob, PromptLogprobs
from shoal.messages import TokenLogprob
from shoal.tokenizer import Tokenizer

_LOWEST: Final = -9999.0
"""What OpenAI writes for an impossible token: JSON has no infinity."""


def chat_logprobs(tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Tokens as records; one of ``logprobs`` for each id."""
    records = []
    for token_id, entry in zip(ids, logprobs, strict=True):
        top = [_candidate(tokenizer, other, logprob) for other, logprob in entry.top]
        own = _candidate(tokenizer, token_id, entry.logprob)
        records.append(ChatTokenLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(records)


def prompt_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[TokenLogprob], most: int
) -> PromptLogprobs:
    """Each prompt token with its ``most`` likeliest rivals, by id. ``logprobs`` begin at the second token: nothing
    stands before the first."""
    lists: PromptLogprobs = [None]
    for token_id, entry in zip(ids[1:], logprobs, strict=True):
        top = entry.top[:most]
        ranks = {other: (value, rank) for rank, (other, value) in enumerate(top, start=1)}
        ranked: dict[int, tuple[float, int | None]] = {token_id: (entry.logprob, None), **ranks}
        lists.append(
            {
                str(other): PromptLogprob(max(value, _LOWEST), rank, _text(tokenizer, other))
                for other, (value, rank) in ranked.items()
            }
        )
    return lists


class CompletionLogprobWriter:
    """Writes the tokens of one choice from piece to piece, and keeps their offset in its text."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._text = tokenizer.stream(skip_special, goes_on=True)
        self._offset = 0

    def write(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The next tokens as parallel lists; the sampled token is among the candidates."""
        lists = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(ids, logprobs, strict=True):
            self._add(lists, token_id, entry)
            self._offset += len(self._text.feed(token_id))
        return lists

    def write_prompt(
        self, ids: Sequence[int], unseen: int, text: str, logprobs: Sequence[TokenLogprob], most: int
    ) -> CompletionLogprobs:
        """An echoed prompt, before anything else. Its first ``unseen`` tokens have no part in ``text``, and the very
        first one has no log-probability."""
        lists = CompletionLogprobs([], [], [], [])
        stream = self._tokenizer.stream(skip_special=False)
        for place, (token_id, entry) in enumerate(zip(ids, (None, *logprobs), strict=True)):
            shown = None if entry is None else TokenLogprob(entry.logprob, entry.top[:most])
            self._add(lists, token_id, shown)
            if place >= unseen:
                self._offset = min(self._offset + len(stream.feed(token_id)), len(text))
        self._offset = len(text)
        return lists

    def _add(self, lists: CompletionLogprobs, token_id: int, entry: TokenLogprob | None) -> None:
        lists.tokens.append(_spelled(self._tokenizer.token_bytes(token_id)))
        lists.text_offset.append(self._offset)
        lists.token_logprobs.append(None if entry is None else max(entry.logprob, _LOWEST))
        lists.top_logprobs.append(
            None if entry is None else self._candidates(token_id, entry.logprob, entry.top)
        )

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


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _spelled(raw: bytes) -> str:
    """The token's text; OpenAI's ``bytes:\\xe2\\x80`` where it is only a part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
