"""``APIClient``: LMDeploy's client of 2023, name for name, over a connection that reports what goes wrong.

Its methods are generators, also when they do not stream: a call is sent when the first object is asked for. What
differs from LMDeploy's is named in docs; where a name is odd (``chat_intractive_v1_url``), scripts use it.
"""

import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final, Self

from shoal.client.connection import Connection

Message = dict[str, Any]
Json = dict[str, Any]

_HEALTH_TIMEOUT_S: Final = 5.0


class SessionFullWarning(UserWarning):
    """A session has reached the longest conversation that the server holds: end it, or start another."""


class APIClient:
    """A server's API. Threads may share one; ``with APIClient(...) as client`` closes its sockets.

    Args:
        api_server_url: where the server is, ``http://127.0.0.1:23333``.
        api_key: sent as ``Authorization: Bearer``.
        timeout: seconds without a byte from the server after which a call fails.
        max_retries: how often a call is repeated after a lost connection, 429 or 503.
        verify: whether an https server's certificate is checked; a path names the authority to check it against.

    Every failure is an ``APIError``; what it says is the server's own message.
    """

    def __init__(
        self,
        api_server_url: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        verify: bool | str = True,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            warnings.warn(f"APIClient has no argument {name!r}; it changes nothing", stacklevel=2)
        self.api_server_url = api_server_url
        self.api_key = api_key
        self._connection = Connection(
            api_server_url, api_key, timeout=timeout, max_retries=max_retries, verify=verify
        )
        root = self._connection.url
        self.chat_intractive_v1_url = f"{root}/v1/chat/interactive"
        self.chat_completions_v1_url = f"{root}/v1/chat/completions"
        self.completions_v1_url = f"{root}/v1/completions"
        self.models_v1_url = f"{root}/v1/models"
        self.encode_v1_url = f"{root}/v1/encode"
        self._available_models: list[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes idle connections; a later call opens new ones."""
        self._connection.close()

    @property
    def available_models(self) -> list[str]:
        """The names that the server serves, its base model first; asked for once."""
        if self._available_models is None:
            answer = self._connection.call("GET", "/v1/models")
            self._available_models = [str(model["id"]) for model in answer["data"]]
        return self._available_models

    def health_check(self) -> bool:
        """Whether the server is there and alive. False, not an error, where nobody answers."""
        return self._connection.try_once("/health", _HEALTH_TIMEOUT_S) == 200

    def is_ready(self) -> bool:
        """Whether a request would be served now: not while the server loads, drains or restarts."""
        return self._connection.try_once("/ready", _HEALTH_TIMEOUT_S) == 200

    def encode(
        self,
        input: str | list[str],  # noqa: A002
        do_preprocess: bool | None = False,
        add_bos: bool | None = True,
    ) -> tuple[Any, Any]:
        """Token ids and how many they are; for a list of texts, a list of each.

        Args:
            do_preprocess: puts the text through the chat template first.
            add_bos: begins with the model's begin-of-text token, where it has one.
        """
        body = {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos}
        answer = self._connection.call("POST", "/v1/encode", body)
        return answer["input_ids"], answer["length"]

    def chat_completions_v1(
        self,
        model: str,
        messages: str | list[Message],
        temperature: float | None = 0.7,
        top_p: float | None = 1.0,
        n: int | None = 1,
        max_tokens: int | None = 512,
        stop: bool | str | list[str] | None = False,
        stream: bool | None = False,
        presence_penalty: float | None = 0.0,
        frequency_penalty: float | None = 0.0,
        user: str | None = None,
        repetition_penalty: float | None = 1.0,
        session_id: int | None = -1,
        ignore_eos: bool | None = False,
        **kwargs: Any,
    ) -> Iterator[Json]:
        """OpenAI's chat completions: one object, or with ``stream`` one for each chunk.

        Args:
            model: one of ``available_models``.
            messages: a history in OpenAI's form; a text is completed raw, without the chat template.
            temperature, top_p: how free the choice of tokens is.
            n: how many answers.
            max_tokens: most tokens of an answer.
            stop: texts that end an answer.
            presence_penalty, frequency_penalty, repetition_penalty: against repetitions.
            user: who asks, for the server's log.
            session_id: a hint for the server's cache; -1 for none.
            ignore_eos: goes on after the model's end token.
            kwargs: sent as further fields of the request: ``top_k``, ``seed``, ``tools``, ``response_format``…
        """
        yield from self._generate("/v1/chat/completions", _fields(locals()), stream)

    def completions_v1(
        self,
        model: str,
        prompt: str | list[Any],
        suffix: str | None = None,
        temperature: float | None = 0.7,
        n: int | None = 1,
        max_tokens: int | None = 16,
        stream: bool | None = False,
        top_p: float | None = 1.0,
        user: str | None = None,
        repetition_penalty: float | None = 1.0,
        session_id: int | None = -1,
        ignore_eos: bool | None = False,
        **kwargs: Any,
    ) -> Iterator[Json]:
        """OpenAI's completions of a text, or of several: one object, or with ``stream`` one for each chunk.

        Args:
            prompt: a text, texts, token ids, or lists of those.
            suffix: what follows the inserted text, for models with infill.
            others: as in ``chat_completions_v1``.
        """
        yield from self._generate("/v1/completions", _fields(locals()), stream)

    def chat_interactive_v1(
        self,
        prompt: str | list[Message],
        session_id: int = -1,
        interactive_mode: bool = False,
        stream: bool = False,
        stop: bool | str | list[str] = False,
        request_output_len: int | None = 512,
        top_p: float | None = 0.8,
        top_k: int | None = 40,
        temperature: float | None = 0.8,
        repetition_penalty: float | None = 1.0,
        ignore_eos: bool = False,
        **kwargs: Any,
    ) -> Iterator[Json]:
        """A turn of a conversation: objects with text, tokens, input_tokens, history_tokens, finish_reason.

        Args:
            prompt: the next turn, put through the chat template; a list is a history in OpenAI's form.
            session_id: which conversation; -1 has the server choose a new one and say which.
            interactive_mode: keeps the conversation on the server. False ends it with this turn.
            stream: many objects, whose ``text`` is what has been added.
            stop: texts that end the answer. True cancels the session's running answer.
            request_output_len: most tokens of the answer; None for what fits.
            top_p, top_k, temperature, repetition_penalty: how tokens are chosen; None: as the server has it.
            ignore_eos: goes on after the model's end token.
            kwargs: sent as further fields of the request: ``seed``, ``min_p``, ``cancel``…
        """
        yield from self._generate("/v1/chat/interactive", _fields(locals()), stream)

    def chat(
        self,
        prompt: str,
        session_id: int,
        request_output_len: int | None = 512,
        stream: bool = False,
        top_p: float | None = 0.8,
        top_k: int | None = 40,
        temperature: float | None = 0.8,
        repetition_penalty: float | None = 1.0,
        ignore_eos: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[str, int, str | None]]:
        """The next turn of a conversation that the server keeps: (text, tokens, finish_reason), once or, with
        ``stream``, for each piece. A full session answers ``("", 0, "length")`` and warns."""
        if session_id == -1:
            raise ValueError("session_id: a conversation needs a number other than -1")
        fields = _fields(locals()) | {"session_id": session_id, "interactive_mode": True}
        for event in self._generate("/v1/chat/interactive", fields, stream):
            if event["finish_reason"] == "length" and event["tokens"] == 0:
                message = f"session {session_id} is as long as the server allows; end it to go on"
                warnings.warn(message, SessionFullWarning, stacklevel=2)
            yield event["text"], event["tokens"], event["finish_reason"]

    def end_session(self, session_id: int) -> None:
        """Forgets a conversation. One that is not there is no error."""
        for _ in self.chat_interactive_v1("", session_id, request_output_len=0, interactive_mode=False):
            pass

    def cancel(self, session_id: int) -> None:
        """Stops the answer that a session is giving; what has been said stays in its history."""
        for _ in self.chat_interactive_v1("", session_id, interactive_mode=True, cancel=True):
            pass

    def sessions(self) -> list[Json]:
        """The conversations that the server keeps for this key."""
        answer = self._connection.call("GET", "/v1/sessions")
        return list(answer["data"])

    def session(self, session_id: int) -> Json:
        """One conversation with its messages. Raises NotFoundError where there is none."""
        return dict(self._connection.call("GET", f"/v1/sessions/{session_id}"))

    def _generate(self, path: str, fields: Json, stream: bool | None) -> Iterator[Json]:
        if stream:
            yield from self._connection.stream(path, fields)
        else:
            yield self._connection.call("POST", path, fields)


def _fields(arguments: Json) -> Json:
    """The request's body, of a method's arguments: those of ``kwargs`` beside the named ones, and without values
    that ask for nothing, so that other servers of the API understand it too."""
    named = {name: value for name, value in arguments.items() if name not in ("self", "kwargs")}
    fields = {name: value for name, value in named.items() if value is not None}
    if fields.get("stop") is False:
        del fields["stop"]
    if fields.get("session_id") == -1:
        del fields["session_id"]
    further: Json = arguments["kwargs"]
    return fields | further
