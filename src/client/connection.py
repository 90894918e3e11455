"""HTTP to one server: addresses, keys, time-outs, retries. Everything that fails is raised as an APIError."""

import contextlib
import ipaddress
import random
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final

import requests
import requests.adapters

from shoal import __version__
from shoal.client import errors, events
from shoal.client.errors import APIConnectionError, APIError, APITimeoutError

_CONNECT_TIMEOUT_S: Final = 10.0
_CONNECTIONS: Final = 64
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 60.0
_STREAM_MEDIA: Final = "text/event-stream, application/x-ndjson, application/json"
"""Naming server-sent events gets comment lines too: a silent server can be told from a slow one."""


class Connection:
    """Any number of threads may use one."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float,
        max_retries: int,
        verify: bool | str = True,
    ) -> None:
        self.url = root_of(url)
        self._timeouts = (min(_CONNECT_TIMEOUT_S, timeout), timeout)
        self._max_retries = max_retries
        self._verify = verify
        self._proxies = {"no_proxy": "*"} if _is_loopback(self.url) else None
        self._session = requests.Session()
        self._session.auth = _Key(api_key)
        self._session.headers["User-Agent"] = f"shoal-client/{__version__}"
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def close(self) -> None:
        """Gives the sockets back."""
        self._session.close()

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The decoded JSON of an answer."""
        with self._answer(method, path, body, "application/json", self._max_retries) as answer:
            return _json(answer)

    def try_once(self, path: str, timeout_s: float) -> int | None:
        """The status of a GET; None where nobody answers."""
        try:
            with self._send("GET", path, None, {}, (timeout_s, timeout_s)) as answer:
                return answer.status_code
        except APIConnectionError:
            return None

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. Closing the iterator ends the connection, and so the answer.

        Once the first event is there nothing is tried again.
        """
        with self._answer("POST", path, body, _STREAM_MEDIA, self._max_retries) as answer:
            request_id = answer.headers.get("X-Request-Id")
            ended = False
            for event in self._events(answer, request_id):
                if isinstance(event, events.End):
                    return
                error = errors.from_event(event, request_id)
                if error is not None:
                    raise error
                ended = ended or _finishes(event)
                yield event
            if not ended:
                raise APIConnectionError("the answer broke off before its end", request_id=request_id)

    @staticmethod
    def _events(answer: requests.Response, request_id: str | None) -> Iterator[dict[str, Any] | events.End]:
        try:
            yield from events.objects(_pieces(answer))
        except requests.exceptions.RequestException as error:
            if _is_timeout(error):
                raise APITimeoutError("the answer came to a standstill", request_id=request_id) from error
            raise APIConnectionError(f"the answer broke off: {error}", request_id=request_id) from error
        except ValueError as error:
            raise APIConnectionError(f"the answer cannot be read: {error}", request_id=request_id) from error

    @contextlib.contextmanager
    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, accept: str, retries: int
    ) -> Iterator[requests.Response]:
        """An answer with a 2xx status, tried more than once where that can help.

        All tries carry one X-Request-Id: a server that had begun with the first does not take the second for
        another turn of a session.
        """
        headers = {"Accept": accept, "X-Request-Id": uuid.uuid4().hex}
        for tries_left in reversed(range(retries + 1)):
            try:
                answer = self._send(method, path, body, headers, self._timeouts)
            except APIConnectionError as error:
                if not tries_left or isinstance(error, APITimeoutError):
                    raise
                time.sleep(_pause_s(None, retries - tries_left))
                continue
            with answer:
                if 200 <= answer.status_code < 300:
                    yield answer
                    return
                problem = _problem(answer)
            pause_s = _pause_s(problem.retry_after, retries - tries_left)
            if not tries_left or problem.status not in (429, 503) or pause_s > _LONGEST_PAUSE_S:
                raise problem
            time.sleep(pause_s)

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str],
        timeouts: tuple[float, float],
    ) -> requests.Response:
        """One try; returns when the status line is there."""
        try:
            return self._session.request(
                method,
                self.url + path,
                json=body,
                headers=dict(headers),
                timeout=timeouts,
                proxies=self._proxies,
                verify=self._verify,
                allow_redirects=False,
                stream=True,
            )
        except requests.exceptions.ConnectTimeout as error:
            raise APIConnectionError(f"{self.url} does not answer (waited {timeouts[0]:g} s)") from error
        except requests.exceptions.Timeout as error:
            raise APITimeoutError(f"{self.url} sent nothing for {timeouts[1]:g} s") from error
        except requests.exceptions.SSLError as error:
            raise APIError(f"{self.url}: {_reason(error)}") from error
        except requests.exceptions.ConnectionError as error:
            raise APIConnectionError(f"cannot reach {self.url}: {_reason(error)}") from error
        except requests.exceptions.InvalidJSONError as error:
            raise ValueError(f"the request is no JSON: {error}") from error


class _Key(requests.auth.AuthBase):
    """The API key, or nothing; being there, it keeps requests from looking for one in ~/.netrc."""

    def __init__(self, api_key: str | None) -> None:
        self._api_key = api_key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request


def root_of(url: str) -> str:
    """The address as a person may write it, without what its paths begin with.

    0.0.0.0 is where a server listens, not an address of anybody: servers on loopback refuse it as a Host.
    """
    text = url.strip()
    parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server; one looks like http://127.0.0.1:23333")
    if parts.hostname == "0.0.0.0":
        parts = parts._replace(netloc=parts.netloc.replace("0.0.0.0", "127.0.0.1"))
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{prefix}"


def _is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _pieces(answer: requests.Response) -> Iterator[bytes]:
    """As they arrive: a body without chunks would be collected to any larger size before it is shown."""
    chunked = answer.headers.get("Transfer-Encoding", "").lower() == "chunked"
    return answer.iter_content(chunk_size=None if chunked else 1)


def _finishes(event: Mapping[str, Any]) -> bool:
    """Whether the event says that an answer, or a choice of it, is complete."""
    if event.get("finish_reason") is not None:
        return True
    return any(choice.get("finish_reason") is not None for choice in event.get("choices") or ())


def _json(answer: requests.Response) -> Any:
    request_id = answer.headers.get("X-Request-Id")
    try:
        return answer.json()
    except requests.exceptions.JSONDecodeError as error:
        message = f"{answer.url} answered something that is no JSON: is this a Shoal server?"
        raise APIConnectionError(message, request_id=request_id) from error
    except requests.exceptions.RequestException as error:
        kind = APITimeoutError if _is_timeout(error) else APIConnectionError
        raise kind(f"the answer broke off: {error}", request_id=request_id) from error


def _problem(answer: requests.Response) -> APIError:
    try:
        content = answer.content
    except requests.exceptions.RequestException:
        content = b""
    return errors.from_answer(answer.status_code, content, answer.headers)


def _is_timeout(error: requests.exceptions.RequestException) -> bool:
    """While a body is read, requests reports a time-out as a lost connection."""
    return isinstance(error, requests.exceptions.Timeout) or "timed out" in str(error)


def _reason(error: Exception) -> str:
    """The innermost cause, which says what the wrapping layers repeat around it."""
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__


def _pause_s(retry_after_s: float | None, tries: int) -> float:
    """Longer from try to try, and never the same for two clients at once."""
    if retry_after_s is not None:
        return retry_after_s + random.uniform(0.0, 0.1)
    return float(_FIRST_PAUSE_S * 2**tries * random.uniform(0.75, 1.25))
