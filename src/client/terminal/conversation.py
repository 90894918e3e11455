"""One conversation, whose history the server keeps. The copy here is for showing and saving."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final

from shoal.client.api_client import APIClient, Message
from shoal.client.errors import ConflictError, NotFoundError
from shoal.client.terminal.show import Piece

_BUSY_TRIES: Final = 20
_BUSY_PAUSE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are chosen; None: as the model's authors or the server have it."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_tokens: int | None


@dataclass(slots=True)
class Answer:
    """What is known of an answer; it grows while the text comes."""

    started_s: float
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0
    input_tokens: int = 0
    history_tokens: int = 0
    finish_reason: str | None = None

    @property
    def is_full(self) -> bool:
        """Whether there was no answer, since the session is as long as it may be."""
        return self.finish_reason == "length" and self.tokens == 0

    @property
    def ttft_s(self) -> float | None:
        """Seconds until the first text."""
        return None if self.first_s is None else self.first_s - self.started_s

    @property
    def tokens_per_s(self) -> float | None:
        """After the first text."""
        if self.first_s is None or self.last_s is None or self.last_s <= self.first_s or self.tokens < 2:
            return None
        return (self.tokens - 1) / (self.last_s - self.first_s)

    def add(self, event: dict[str, Any]) -> None:
        """Takes the counts of an event."""
        now_s = time.monotonic()
        if event["text"] or event.get("reasoning_content"):
            self.first_s = self.first_s or now_s
            self.last_s = now_s
        self.tokens = event["tokens"]
        self.input_tokens = event.get("input_tokens", 0)
        self.history_tokens = event.get("history_tokens", 0)
        self.finish_reason = event["finish_reason"]


def text_of(message: Message) -> str:
    """What a message says; its content may be a text, parts, or nothing."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Conversation:
    """A session and what has been said in it."""

    def __init__(
        self, client: APIClient, session_id: int, model: str, system: str | None, sampling: Sampling
    ) -> None:
        self._client = client
        self.session_id = session_id
        self.model = model
        self.system = system
        self.sampling = sampling
        self.messages: list[Message] = []
        self.last: Answer | None = None
        self.is_known = False
        """Whether the server has the session."""

    @property
    def models(self) -> list[str]:
        """What could be chosen as ``model``."""
        return self._client.available_models

    def resume(self, messages: list[Message]) -> None:
        """Takes over what the server has of this session."""
        self.messages = list(messages)
        self.is_known = True
        system = [text_of(message) for message in messages if message["role"] == "system"]
        self.system = system[0] if system else self.system

    def turn(self, text: str) -> Generator[Piece, None, None]:
        """Says ``text``; yields the answer's pieces. Closed early, it keeps what was said so far."""
        self.last = answer = Answer(time.monotonic())
        pieces: list[str] = []
        begun = False
        try:
            for event in self._events(text):
                begun = True
                answer.add(event)
                if thought := event.get("reasoning_content"):
                    yield Piece(thought, is_thought=True)
                if event["text"]:
                    pieces.append(event["text"])
                    yield Piece(event["text"])
        finally:
            if begun and not answer.is_full:
                self._remember(text, "".join(pieces))

    def stop(self) -> None:
        """Ends an answer that may be running."""
        try:
            self._client.cancel(self.session_id)
        except (ConflictError, NotFoundError):
            return

    def end(self) -> None:
        """Has the server forget the conversation; the next turn begins another under the same number."""
        self._client.end_session(self.session_id)
        self.messages = []
        self.last = None
        self.is_known = False

    def _events(self, text: str) -> Iterator[dict[str, Any]]:
        """The answer's events. A turn that was stopped a moment ago may still be ending: 409 is waited out."""
        for tries_left in reversed(range(_BUSY_TRIES)):
            try:
                yield from self._client.chat_interactive_v1(
                    self._prompt(text),
                    session_id=self.session_id,
                    interactive_mode=True,
                    stream=True,
                    request_output_len=self.sampling.max_tokens,
                    top_p=self.sampling.top_p,
                    top_k=self.sampling.top_k,
                    temperature=self.sampling.temperature,
                    model=self.model,
                )
                return
            except ConflictError:
                if not tries_left:
                    raise
                time.sleep(_BUSY_PAUSE_S)

    def _prompt(self, text: str) -> str | list[Message]:
        if self.system is None or self.messages:
            return text
        return [{"role": "system", "content": self.system}, {"role": "user", "content": text}]

    def _remember(self, text: str, answer: str) -> None:
        said = self._prompt(text)
        self.messages += [{"role": "user", "content": said}] if isinstance(said, str) else said
        self.messages.append({"role": "assistant", "content": answer})
        self.is_known = True
