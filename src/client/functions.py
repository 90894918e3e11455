"""LMDeploy's functions beside the class: one call each, given the address of a route."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing
from typing import Any, Final

from shoal.client.connection import Connection

_TIMEOUT_S: Final = 600.0
_RETRIES: Final = 2


def get_model_list(api_url: str, headers: Mapping[str, str] | None = None) -> list[str]:
    """The names that a server serves. ``api_url`` ends in ``/v1/models``; ``headers`` may hold the key."""
    authorization = {name.lower(): value for name, value in (headers or {}).items()}.get("authorization", "")
    api_key = authorization.removeprefix("Bearer ") or None
    root, path = _split(api_url, "/v1/models")
    with _connection(root, api_key) as connection:
        answer = connection.call("GET", path)
    return [str(model["id"]) for model in answer["data"]]


def get_streaming_response(
    prompt: str | list[dict[str, Any]],
    api_url: str,
    session_id: int,
    request_output_len: int = 512,
    stream: bool = True,
    interactive_mode: bool = False,
    ignore_eos: bool = False,
    stop: bool | str | list[str] = False,
    *,
    cancel: bool = False,
    top_p: float | None = None,
    temperature: float | None = None,
    api_key: str | None = None,
) -> Iterator[tuple[str, int, str | None]]:
    """A turn of a conversation: (text, tokens, finish_reason). ``api_url`` ends in ``/v1/chat/interactive``."""
    fields: dict[str, Any] = {
        "prompt": prompt,
        "stream": stream,
        "session_id": session_id,
        "request_output_len": request_output_len,
        "interactive_mode": interactive_mode,
        "ignore_eos": ignore_eos,
        "stop": stop,
    }
    optional = {"cancel": cancel or None, "top_p": top_p, "temperature": temperature}
    fields |= {name: value for name, value in optional.items() if value is not None}
    root, path = _split(api_url, "/v1/chat/interactive")
    with _connection(root, api_key) as connection:
        answers = connection.stream(path, fields) if stream else iter([connection.call("POST", path, fields)])
        for answer in answers:
            yield answer.get("text", ""), answer.get("tokens", 0), answer.get("finish_reason")


def input_prompt() -> str:
    """A person's text of several lines, which an empty one ends. Raises EOFError at the end of input."""
    sys.stdout.write("\ndouble enter to end input >>> ")
    sys.stdout.flush()
    return "\n".join(iter(input, ""))


def _connection(root: str, api_key: str | None) -> AbstractContextManager[Connection]:
    return closing(Connection(root, api_key, timeout=_TIMEOUT_S, max_retries=_RETRIES))


def _split(api_url: str, path: str) -> tuple[str, str]:
    """The server's address and the route's path; the route may stand below a prefix."""
    root = api_url.rstrip("/")
    if not root.endswith(path):
        raise ValueError(f"api_url: {api_url!r} does not end in {path}")
    return root.removesuffix(path), path
