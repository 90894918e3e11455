"""What every request passes before its route: its id, the Host header, CORS, the API key. A Falcon middleware."""

import hmac
import ipaddress
from typing import Any, Final

import falcon.asgi

from shoal.config import Settings
from shoal.errors import RequestError
from shoal.frontend.exchange import exchange_of

_OPEN_PATHS: Final = frozenset({"/", "/health", "/ready", "/version"})
"""Need no key."""
_ANY_ORIGIN_PATHS: Final = ("/v1/models", "/v1/chat/completions", "/v1/completions")
"""The stateless inference routes: with no --allow_origins a page of any origin may call them."""
_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Gate:
    """The middleware."""

    def __init__(self, settings: Settings) -> None:
        self._server_name = settings.server_name.strip("[]").lower()
        self._local_only = _is_loopback(self._server_name)
        self._origins = frozenset(settings.allow_origins)
        self._keys = tuple(key.encode() for key in settings.api_keys)

    async def process_request(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Raises RequestError for what may not pass; answers a preflight itself."""
        exchange = exchange_of(req)
        resp.set_header("X-Request-Id", exchange.request_id)
        exchange.adopt_request_id(req.get_header("X-Request-Id"))
        resp.set_header("X-Request-Id", exchange.request_id)
        self._check_host(req)
        if self._allow_origin(req, resp) and _is_preflight(req):
            _answer_preflight(req, resp)
            return
        self._check_key(req)

    async def process_response(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, _resource: Any, _succeeded: bool
    ) -> None:
        """Notes the status for the log."""
        exchange_of(req).status = resp.status_code

    def _check_host(self, req: falcon.asgi.Request) -> None:
        """A page whose name was rebound to our loopback address sends its own name as Host."""
        header = req.get_header("Host")
        if not self._local_only or header is None:
            return
        name = _host_name(header)
        if name not in _LOCAL_NAMES and name != self._server_name and not name.endswith(".localhost"):
            message = f"this server is not {header[:100]!r}; it answers to localhost and {self._server_name}"
            raise RequestError(403, message, param="Host", code="unknown_host")

    def _allow_origin(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> bool:
        origin = req.get_header("Origin")
        if origin is None:
            return False
        if "*" in self._origins or (not self._origins and req.path.startswith(_ANY_ORIGIN_PATHS)):
            resp.set_header("Access-Control-Allow-Origin", "*")
        elif origin in self._origins:
            resp.set_header("Access-Control-Allow-Origin", origin)
            resp.set_header("Vary", "Origin")
        else:
            return False
        resp.set_header("Access-Control-Expose-Headers", "X-Request-Id, Retry-After")
        return True

    def _check_key(self, req: falcon.asgi.Request) -> None:
        if not self._keys or req.path in _OPEN_PATHS:
            return
        given = _key(req).encode()
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if not any(matches):
            message = "missing or wrong API key; send it as Authorization: Bearer KEY, or as x-api-key"
            raise RequestError(401, message, code="invalid_api_key")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _host_name(header: str) -> str:
    """Without the port, and without the brackets of an IPv6 address."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_preflight(req: falcon.asgi.Request) -> bool:
    return req.method == "OPTIONS" and req.get_header("Access-Control-Request-Method") is not None


def _answer_preflight(req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
    resp.set_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
    resp.set_header("Access-Control-Allow-Headers", req.get_header("Access-Control-Request-Headers") or "*")
    resp.set_header("Access-Control-Max-Age", "600")
    resp.status = 204
    resp.complete = True


def _key(req: falcon.asgi.Request) -> str:
    scheme, _, token = (req.get_header("Authorization") or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else req.get_header("x-api-key") or ""
