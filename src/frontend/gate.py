"""What every request passes before its route: its id, the Host header, the page it comes from, the API key, its query.

A Falcon middleware: what concerns any request is seen to before routing, what depends on the route after it. Who may
pass is said by the routes themselves (``Route.scope``, ``Route.stateless``).
"""

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Sequence
from typing import Any, Final, NoReturn, cast
from urllib.parse import urlsplit

import falcon
import falcon.asgi

from shoal.access import digest_of
from shoal.config import ApiKey, Settings
from shoal.errors import RequestError
from shoal.frontend.exchange import exchange_of, header_text
from shoal.frontend.routes import Method, Route

_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_EXPOSED_HEADERS: Final = "X-Request-Id, Retry-After, X-Session-State, Warning"
_PREFLIGHT_AGE_S: Final = 600
_ASK_A_PERSON: Final = 'Basic realm="Shoal: a key as the password", charset="UTF-8"'
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing: where a page's origin is not allowed, its browser keeps the answer from it."""


class Gate:
    """The middleware."""

    def __init__(self, settings: Settings, routes: Sequence[Route]) -> None:
        self._settings = settings
        self._server_name = settings.server_name.strip("[]").lower()
        self._local_only = _is_loopback(self._server_name)
        self._origins = frozenset(settings.allow_origins)
        self._keys = settings.api_keys
        self._routes = {route.path: route for route in routes}

    async def process_request(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Before routing. Raises RequestError for what may not pass."""
        exchange = exchange_of(req)
        exchange.body_limit_bytes = self._settings.body_limit_bytes
        exchange.drops_unknown_fields = self._settings.unknown_fields == "warn"
        resp.set_header("X-Request-Id", exchange.request_id)
        exchange.adopt_request_id(req.get_header("X-Request-Id"))
        resp.set_header("X-Request-Id", exchange.request_id)
        if exchange.insider is not None:
            return
        self._check_host(req)
        if self._keys:
            key = self._find_key(req)
            exchange.tenant = key.name if key else ""
            exchange.scopes = key.scopes if key else ()

    async def process_resource(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, _resource: Any, _params: dict[str, Any]
    ) -> None:
        """For a known route. Raises RequestError for what may not pass; answers a preflight itself."""
        route = self._routes[req.uri_template or ""]
        origin = req.get_header("Origin")
        if origin is not None and not _is_same_origin(req, origin):
            self._meet_foreign_page(req, resp, route, origin)
        if not resp.complete:
            self._check_scope(req, route)
            _check_query(req, route)

    async def process_response(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, _resource: Any, _succeeded: bool
    ) -> None:
        """Notes the status for the log, and passes warnings on."""
        exchange = exchange_of(req)
        exchange.status = resp.status_code
        for warning in exchange.warnings:
            resp.append_header("Warning", f'299 shoal "{header_text(warning)}"')

    async def refuse_unknown(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response | None, **kwargs: Any
    ) -> NoReturn:
        """A Falcon sink, for paths that no route has: without a key nobody learns which ones there are."""
        if not exchange_of(req).scopes:
            raise _missing_key()
        raise falcon.HTTPRouteNotFound()

    def _check_host(self, req: falcon.asgi.Request) -> None:
        """A page whose name was rebound to our loopback address sends its own name as Host."""
        header = req.get_header("Host")
        if not self._local_only or header is None:
            return
        name = _host_name(header)
        if name not in _LOCAL_NAMES and name != self._server_name and not name.endswith(".localhost"):
            message = f"this server is not {header[:100]!r}; it answers to localhost and {self._server_name}"
            raise RequestError(403, message, param="Host", code="unknown_host")

    def _find_key(self, req: falcon.asgi.Request) -> ApiKey | None:
        """Compares with every key, so that the time it takes tells nothing."""
        given = digest_of(_key(req))
        matches = [key for key in self._keys if hmac.compare_digest(given, key.digest)]
        return matches[0] if matches else None

    def _check_scope(self, req: falcon.asgi.Request, route: Route) -> None:
        scopes = exchange_of(req).scopes
        if route.scope == "open":
            return
        if not scopes:
            raise _missing_key("Bearer" if route.operations else _ASK_A_PERSON)
        if route.scope != "any" and route.scope not in scopes:
            message = f"this key has no {route.scope} scope, which {req.path} needs; it has {', '.join(scopes)}"
            raise RequestError(403, message, code="insufficient_scope")

    def _meet_foreign_page(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, route: Route, origin: str
    ) -> None:
        """A page of another server calls, through the browser of somebody who may reach this one."""
        allowed = self._allow_origin(resp, route, origin)
        if allowed and _is_preflight(req):
            self._answer_preflight(req, resp, route)
        elif not allowed and (_is_preflight(req) or req.method not in _READING):
            message = f"pages of {origin[:100]} may not call {req.path}; --allow_origins {origin[:100]} would let them"
            raise RequestError(403, message, param="Origin", code="origin_not_allowed")

    def _allow_origin(self, resp: falcon.asgi.Response, route: Route, origin: str) -> bool:
        """Says so to the browser. With no --allow_origins what holds nobody's data is open to any page."""
        if self._origins:
            resp.append_header("Vary", "Origin")
        if "*" in self._origins or (not self._origins and route.stateless):
            resp.set_header("Access-Control-Allow-Origin", "*")
        elif origin in self._origins:
            resp.set_header("Access-Control-Allow-Origin", origin)
            if self._settings.allow_credentials:
                resp.set_header("Access-Control-Allow-Credentials", "true")
        else:
            return False
        resp.set_header("Access-Control-Expose-Headers", _EXPOSED_HEADERS)
        return True

    def _answer_preflight(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, route: Route) -> None:
        methods, headers = self._settings.allow_methods, self._settings.allow_headers
        known = methods if "*" not in methods else (*route.operations, "OPTIONS")
        asked = req.get_header("Access-Control-Request-Headers") or "*"
        resp.set_header("Access-Control-Allow-Methods", ", ".join(known))
        resp.set_header("Access-Control-Allow-Headers", asked if "*" in headers else ", ".join(headers))
        resp.set_header("Access-Control-Max-Age", str(_PREFLIGHT_AGE_S))
        resp.status = 204
        resp.complete = True


def _check_query(req: falcon.asgi.Request, route: Route) -> None:
    """Where a query is read, it says nothing that would be ignored."""
    operation = route.operations.get(cast("Method", req.method))
    parameters = () if operation is None else operation.parameters
    known = [parameter.name for parameter in parameters if parameter.place == "query"]
    unknown = [name[:100] for name in req.params if name not in known] if known else []
    if not unknown:
        return
    exchange = exchange_of(req)
    if not exchange.drops_unknown_fields:
        message = f"unknown query parameter: {unknown[0]}; {req.path} takes {', '.join(known)}"
        raise RequestError(400, message, param=unknown[0], code="unknown_field")
    exchange.warnings += [f"unknown query parameter dropped: {name}" for name in unknown]


def _missing_key(challenge: str = "Bearer") -> RequestError:
    message = "missing or wrong API key; send it as Authorization: Bearer KEY, or as x-api-key"
    return RequestError(401, message, code="invalid_api_key", challenge=challenge)


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


def _is_same_origin(req: falcon.asgi.Request, origin: str) -> bool:
    """One of our own pages; a browser says so by Sec-Fetch-Site, which pages cannot set."""
    if req.get_header("Sec-Fetch-Site") == "same-origin":
        return True
    try:
        return urlsplit(origin).netloc.lower() == (req.get_header("Host") or "").lower()
    except ValueError:
        return False


def _is_preflight(req: falcon.asgi.Request) -> bool:
    return req.method == "OPTIONS" and req.get_header("Access-Control-Request-Method") is not None


def _key(req: falcon.asgi.Request) -> str:
    scheme, _, token = (req.get_header("Authorization") or "").partition(" ")
    if scheme.lower() == "basic":
        return _password(req, token.strip())
    return token.strip() if scheme.lower() == "bearer" else req.get_header("x-api-key") or ""


def _password(req: falcon.asgi.Request, token: str) -> str:
    """What a person typed into the browser for a page. The browser then sends it along with whatever any page asks of
    this server, so it counts for pages of this server alone."""
    origin = req.get_header("Origin")
    if origin is not None and not _is_same_origin(req, origin):
        return ""
    try:
        return base64.b64decode(token, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
