"""/openapi.json: OpenAPI 3.1, written from the table of routes and the structs that they read and answer.

``document`` is called once at start by ``pages.py``. Nothing in here knows a single route but for the names that
operations had in LMDeploy, which generated clients call to this day.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, get_args

from msgspec import Struct

from shoal import __version__
from shoal.config import Settings
from shoal.frontend.openapi_schemas import Schema, components
from shoal.frontend.problems import ANTHROPIC_PREFIX
from shoal.frontend.routes import Method, Operation, Parameter, Route
from shoal.frontend.schemas.anthropic import AnthropicError
from shoal.frontend.schemas.errors import ErrorAnswer, HTTPValidationError, ValidationError

_JSON: Final = "application/json"
_SSE: Final = "text/event-stream"
_LMDEPLOY_NAMES: Final = {
    ("GET", "/v1/models"): "available_models",
    ("POST", "/v1/chat/completions"): "chat_completions_v1",
    ("POST", "/v1/completions"): "completions_v1",
    ("POST", "/v1/embeddings"): "create_embeddings",
    ("POST", "/v1/encode"): "encode",
    ("POST", "/v1/chat/interactive"): "chat_interactive_v1",
    ("POST", "/generate"): "chat_interactive_v1",
}
_PLACEHOLDER: Final = re.compile(r"\{(\w+)(?::[^}]*)?\}")
_STATUSES: Final = {
    400: "The request is malformed, or a field is wrong; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The key, the page's origin or the Host header may not do this.",
    404: "There is no such thing.",
    405: "The route does not answer this method.",
    408: "The request was not answered within its time-out.",
    409: "Something else is under way; `Retry-After` says when to try again.",
    413: "The body is too large.",
    415: "The body is not of this media type.",
    429: "Too many requests; `Retry-After` says when to try again.",
    500: "The server made a mistake.",
    503: "The server cannot serve now; `Retry-After` says when to try again.",
}
_ALWAYS: Final = (400, 401, 403, 429, 500, 503)
_WITH_BODY: Final = (408, 413, 415)
_WITH_RETRY: Final = (409, 429, 503)
_ABOUT: Final = """\
Shoal serves one language model over HTTP: OpenAI's API, Anthropic's Messages, and LMDeploy's interactive sessions.

**Keys.** Where the server was started with API keys, send one as `Authorization: Bearer KEY` or as `x-api-key: KEY`
(*Authorize* on this page).

**Errors.** A field is honoured, or the request is refused with 400 and the field's name. Errors carry the true HTTP
status; once a stream has begun, an error is its last event.

**Every request** may carry `X-Request-Id`, which is returned and logged, and `X-Request-Timeout` in seconds.
"""


def document(routes: Sequence[Route], settings: Settings) -> dict[str, Any]:
    """The whole document."""
    shown = [(route, method, operation) for route in routes for method, operation in route.operations.items()]
    schemas, named = components(
        [*_types(shown), ErrorAnswer, AnthropicError, HTTPValidationError, ValidationError]
    )
    writer = _Writer(dict(zip(map(_key, _types(shown)), schemas, strict=False)), bool(settings.api_keys))
    paths: dict[str, dict[str, Any]] = {}
    for route, method, operation in shown:
        paths.setdefault(_path(route), {})[method.lower()] = writer.operation(route, method, operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Shoal",
            "version": __version__,
            "summary": "An LLM inference server",
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "This server"}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(named.items())),
            "responses": dict(_error_responses()),
            "headers": {
                "X-Request-Id": {"description": "Names the request in the log.", "schema": {"type": "string"}},
                "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}},
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "x-api-key: KEY"},
            },
        },
    }


def operation_id(route: Route, method: Method) -> str:
    """As FastAPI made them: the name, the path, the method; without a name where LMDeploy had no such route."""
    name = _LMDEPLOY_NAMES.get((method, route.path), "")
    return re.sub(r"\W+", "_", f"{name}{_path(route)}").strip("_") + f"_{method.lower()}"


class _Writer:
    """Writes operations; holds what they have in common."""

    def __init__(self, schemas: dict[int, Schema], needs_key: bool) -> None:
        self._schemas = schemas
        self._needs_key = needs_key

    def operation(self, route: Route, method: Method, operation: Operation) -> dict[str, Any]:
        """One entry of ``paths``."""
        written: dict[str, Any] = {
            "summary": operation.summary,
            "description": _description(route, operation),
            "operationId": operation_id(route, method),
            "parameters": [*map(self._parameter, operation.parameters), *_undeclared(route, operation)],
            "responses": self._responses(route, operation),
            "security": self._security(route),
        }
        if operation.body is not None:
            written["requestBody"] = self._body(operation)
        return written

    def _security(self, route: Route) -> list[dict[str, list[str]]]:
        if route.scope == "open":
            return []
        keys: list[dict[str, list[str]]] = [{"bearer": []}, {"key": []}]
        return keys if self._needs_key else [*keys, {}]

    def _parameter(self, parameter: Parameter) -> dict[str, Any]:
        schema = dict(self._schemas[_key(parameter.type)])
        description = schema.pop("description", "")
        examples = schema.pop("examples", [])
        written = {
            "name": parameter.name,
            "in": parameter.place,
            "description": description,
            "required": parameter.required or parameter.place == "path",
            "schema": schema,
        }
        return written | ({"example": examples[0]} if examples else {})

    def _body(self, operation: Operation) -> dict[str, Any]:
        media = "multipart/form-data" if operation.upload else _JSON
        return {
            "required": not operation.body_optional,
            "content": {media: {"schema": self._schemas[_key(operation.body)]}},
        }

    def _responses(self, route: Route, operation: Operation) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if operation.answer is not None:
            content[_JSON] = {"schema": self._schemas[_key(operation.answer)]}
        elif operation.answer_media != _JSON:
            is_text = operation.answer_media.startswith("text/")
            content[operation.answer_media] = {
                "schema": {"type": "string"} | ({} if is_text else {"format": "binary"})
            }
        if operation.event is not None:
            event = self._event(operation)
            content[operation.event_media] = {
                "schema": _sent(event, operation.event_end) if operation.event_media == _SSE else event
            }
        good: dict[str, Any] = {"description": _told(operation), "headers": _headers("X-Request-Id")}
        written: dict[str, Any] = {"200": good | ({"content": content} if content else {})}
        for status, answer in operation.other_answers.items():
            schema = self._schemas[_key(answer)]
            written[str(status)] = {
                "description": _STATUSES.get(status, "Another answer."),
                "headers": _headers("X-Request-Id"),
                "content": {_JSON: {"schema": schema}},
            }
        errors = {*_ALWAYS, *operation.errors, *(_WITH_BODY if operation.body is not None else ())}
        if "model" in getattr(operation.body, "__struct_fields__", ()):
            errors.add(404)
        for status in errors:
            if status != 401 or route.scope != "open":
                written.setdefault(
                    str(status), {"$ref": f"#/components/responses/{_error_name(route, status)}"}
                )
        return dict(sorted(written.items()))

    def _event(self, operation: Operation) -> Schema:
        """An event, or the error that may come instead of the rest."""
        kinds = (operation.event, operation.event_error)
        schemas = [self._schemas[_key(kind)] for kind in kinds if kind is not None]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _types(shown: Sequence[tuple[Route, Method, Operation]]) -> list[Any]:
    found: dict[int, Any] = {}
    for _, _, operation in shown:
        parameters = (parameter.type for parameter in operation.parameters)
        kinds = (
            operation.body,
            operation.answer,
            operation.event,
            operation.event_error,
            *operation.other_answers.values(),
            *parameters,
        )
        found |= {_key(kind): kind for kind in kinds if kind is not None}
    return list(found.values())


def _key(kind: Any) -> int:
    """Types with metadata do not hash; the table of routes keeps them alive."""
    return id(kind)


def _path(route: Route) -> str:
    return _PLACEHOLDER.sub(r"{\1}", route.path)


def _undeclared(route: Route, operation: Operation) -> Iterator[dict[str, Any]]:
    """Every placeholder of the path has a parameter, also one that the operation does not describe."""
    declared = {parameter.name for parameter in operation.parameters}
    for name in _PLACEHOLDER.findall(route.path):
        if name not in declared:
            yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _description(route: Route, operation: Operation) -> str:
    needs = f"Needs a key with the {route.scope} scope." if route.scope in ("metrics", "admin") else ""
    return "\n\n".join(part for part in (operation.description, needs) if part) or f"{operation.summary}."


def _told(operation: Operation) -> str:
    """What the answer is, from the struct's own words."""
    kinds = [kind for kind in (operation.answer, operation.event) if _is_struct(kind)]
    first = next((kind.__doc__ for kind in kinds if kind.__doc__), None)
    told = (first or "The answer.").strip().partition("\n\n")[0].replace("\n", " ")
    return (
        f"{told} As a stream: one event." if operation.event is not None and operation.answer is None else told
    )


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct) and not get_args(kind)


def _sent(event: Schema, end: str) -> Schema:
    """A server-sent event, as OpenAPI describes one: an object of its lines, the JSON being text in ``data``."""
    holds = {"contentMediaType": _JSON, "contentSchema": event}
    # Generators pass over conditions; of a union of texts they make types that do not compile.
    data: Schema = {"if": {"const": end}, "else": holds} if end else holds
    return {
        "type": "object",
        "title": "ServerSentEvent",
        "properties": {
            "event": {"type": "string", "description": "The kind of event, where the API names one."},
            "data": {
                "type": "string",
                "description": "One JSON object; in OpenAI's older routes the last one is `[DONE]`.",
                **data,
            },
        },
        "required": ["data"],
    }


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error_name(route: Route, status: int) -> str:
    return f"Anthropic{status}" if route.path.startswith(ANTHROPIC_PREFIX) else f"Error{status}"


def _error_responses() -> Iterator[tuple[str, dict[str, Any]]]:
    for prefix, schema in (("Error", "ErrorAnswer"), ("Anthropic", "AnthropicError")):
        for status, description in _STATUSES.items():
            names = ("X-Request-Id", "Retry-After") if status in _WITH_RETRY else ("X-Request-Id",)
            yield (
                f"{prefix}{status}",
                {
                    "description": description,
                    "headers": _headers(*names),
                    "content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
                },
            )
