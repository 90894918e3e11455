"""What a route is: its path, who may call it, and what its operations take and answer.

Each family of routes has a module with ``routes(service)``; ``app.py`` adds them to Falcon, ``gate.py`` reads who may
pass, and ``openapi.py`` writes /openapi.json from them: so what is served, guarded and described is one list.
"""

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

from shoal.config import Scope

Method = Literal["GET", "POST", "DELETE"]


class Parameter(Struct, frozen=True, kw_only=True):
    """A value in the query, the path or a header."""

    name: str
    place: Literal["query", "path", "header"]
    type: Any
    """As a struct's field would be annotated, with ``doc``."""
    required: bool = False


class Operation(Struct, frozen=True, kw_only=True):
    """One method of a route."""

    summary: str
    """A few words."""
    description: str = ""
    """Markdown."""
    parameters: tuple[Parameter, ...] = ()
    body: Any = None
    """The struct that the JSON body is read as."""
    body_optional: bool = False
    upload: bool = False
    """The body is multipart/form-data; ``body`` names its fields."""
    answer: Any = None
    """The struct that is answered as JSON; None: ``answer_media`` says what comes instead."""
    answer_media: str = "application/json"
    event: Any = None
    """The struct of one event, where the answer can be a stream."""
    event_media: str = "text/event-stream"
    event_error: Any = None
    """The struct of an event that is an error, where it is no ``event``."""
    event_end: str = ""
    """The data of a server-sent event that is no JSON and tells the end."""
    other_answers: Mapping[int, Any] = {}
    """The structs of other statuses that are answers and no errors."""
    errors: tuple[int, ...] = ()
    """Statuses besides 400, 401, 403, 429, 500 and 503; with a body also 408, 413 and 415."""


class Route(Struct, frozen=True, kw_only=True):
    """A path and the Falcon resource that answers it."""

    path: str
    """Falcon's URI template."""
    resource: object
    operations: dict[Method, Operation]
    """Empty: a page for people, not described in /openapi.json; their browser is asked for the key."""
    scope: Scope | Literal["open", "any"] = "inference"
    """What a key must allow; ``open`` needs no key, ``any`` leaves to the route what a key may do."""
    stateless: bool = False
    """Holds nobody's data: with no --allow_origins a page of any origin may call it."""
