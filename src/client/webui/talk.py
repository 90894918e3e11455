"""A page's conversation to a request, and the answer's events to what the page shows. Knows nothing of gradio."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.client.api_client import APIClient, Json, Message


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the page's fields hold."""

    model: str
    system: str
    temperature: float
    top_p: float
    top_k: float
    max_tokens: float
    """0: what fits."""
    repetition_penalty: float
    seed: str
    """Empty: none."""


@dataclass(slots=True)
class Reply:
    """An answer so far."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Json = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float | None = None

    def add(self, event: Json) -> None:
        """Takes a chunk of a chat completion."""
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            said, thought = delta.get("content") or "", delta.get("reasoning_content") or ""
            self.text += said
            self.reasoning += thought
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if said or thought:
                self.last_s = time.monotonic()
                self.first_s = self.first_s or self.last_s

    def summary(self) -> str:
        """Counts and speed, one line."""
        parts = []
        prompt, cached = self.usage.get("prompt_tokens"), _cached(self.usage)
        tokens = self.usage.get("completion_tokens", 0)
        if prompt is not None:
            parts.append(f"{prompt} tokens in" + (f" ({cached} cached)" if cached else "") + f", {tokens} out")
        if self.first_s is not None:
            parts.append(f"first after {self.first_s - self.started_s:.2f} s")
            if self.last_s is not None and self.last_s > self.first_s and tokens > 1:
                parts.append(f"{(tokens - 1) / (self.last_s - self.first_s):.1f} tokens/s")
        if self.finish_reason == "length":
            parts.append("cut at the longest answer")
        return " · ".join(parts)


def reply(client: APIClient, wishes: Wishes, history: Sequence[Message], text: str) -> Iterator[Reply]:
    """The answer to ``text``, as it grows: one object, changed between. Closing the iterator stops it.
    Raises APIError, and ValueError for a field that cannot be read."""
    further: Json = _seed(wishes.seed)
    answer = Reply()
    for event in client.chat_completions_v1(
        wishes.model,
        messages(wishes.system, history, text),
        temperature=wishes.temperature,
        top_p=wishes.top_p,
        max_tokens=int(wishes.max_tokens) or None,
        repetition_penalty=wishes.repetition_penalty,
        stream=True,
        stream_options={"include_usage": True},
        top_k=int(wishes.top_k),
        **further,
    ):
        answer.add(event)
        yield answer


def messages(system: str, history: Sequence[Message], text: str) -> list[Message]:
    """In OpenAI's form: what the model thought, which the page shows as messages of their own, is left out."""
    before = [{"role": "system", "content": system.strip()}] if system.strip() else []
    said = [
        {"role": message["role"], "content": _text(message["content"])}
        for message in history
        if not (message.get("metadata") or {}).get("title")
    ]
    return [*before, *said, {"role": "user", "content": text}]


def _seed(text: str) -> Json:
    if not text.strip():
        return {}
    try:
        return {"seed": int(text)}
    except ValueError as error:
        raise ValueError(f"Seed: {text!r} is no whole number") from error


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


def _cached(usage: Json) -> int:
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
