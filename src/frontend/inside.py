"""The routes, called from within a process that serves no HTTP: the batches' one."""

import asyncio
from typing import Any, Final

from msgspec import Struct

from shoal.config import Settings
from shoal.frontend.app import AsgiApp, load_service, make_app
from shoal.frontend.exchange import INSIDER_KEY, Insider
from shoal.frontend.link import Link

_MOST_AT_ONCE: Final = 64
_BUSY: Final = 429
_UNAVAILABLE: Final = 503


class Answer(Struct, frozen=True):
    """What the route answered."""

    status: int
    headers: dict[str, str]
    body: bytes


class Caller:
    """The frontends' routes, called in this process."""

    def __init__(self, settings: Settings, priority: int) -> None:
        link = Link(settings.run_dir)
        self._link = link
        self._priority = priority
        self._app: AsgiApp = make_app(load_service(settings)(switchboard=link.switchboard))
        self.places = asyncio.Semaphore(min(_MOST_AT_ONCE, settings.instance_num))
        link.start()

    async def stop(self) -> None:
        """Takes leave of the scheduler."""
        await self._link.stop()

    async def post(self, path: str, body: bytes, request_id: str, tenant: str) -> Answer:
        """One call; waits for as long as the server is busy or comes back."""
        while True:
            answer = await self._call(path, body, request_id, tenant)
            if answer.status not in (_BUSY, _UNAVAILABLE):
                return answer
            await asyncio.sleep(float(answer.headers.get("retry-after", "1")))

    async def _call(self, path: str, body: bytes, request_id: str, tenant: str) -> Answer:
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": request_id,
        }
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.1"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
            INSIDER_KEY: Insider(tenant, self._priority),
        }
        requests = iter([{"type": "http.request", "body": body, "more_body": False}])
        status, answered, chunks = 0, {}, []
        never = asyncio.Event()

        async def receive() -> dict[str, Any]:
            request = next(requests, None)
            if request is None:
                await never.wait()
                return {"type": "http.disconnect"}
            return request

        async def send(message: dict[str, Any]) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            elif message["type"] == "http.response.body":
                chunks.append(message.get("body", b""))

        await self._app(scope, receive, send)
        return Answer(status, answered, b"".join(chunks))
