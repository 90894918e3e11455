"""Bodies and answers of the administration's routes."""

from typing import Annotated, Any

from msgspec import Struct

from shoal.frontend.schemas.base import RequestBody, doc


class AbortRequest(RequestBody):
    """What is to be ended; in the forms of LMDeploy (`session_id`, `abort_all`), SGLang (`rid`) and vLLM
    (`request_ids`)."""

    abort_all: Annotated[
        bool | None,
        doc("End every running request: with the admin scope everybody's, else those of the own key.", False),
    ] = None
    rid: Annotated[
        str | list[str] | None,
        doc(
            "Ids of requests: `X-Request-Id`, or the `id` of their answers.",
            "chatcmpl-1f2e3d4c5b6a79880f1e2d3c",
        ),
    ] = None
    request_ids: Annotated[
        list[str] | None, doc("The same as `rid`.", ["chatcmpl-1f2e3d4c5b6a79880f1e2d3c"])
    ] = None
    session_id: Annotated[
        int | None, doc("An interactive session whose running answer ends; -1: none.", -1)
    ] = None
    finished_reason: Annotated[
        Any, doc("Not available: the reason is `abort`. Only null is taken.", None, neutral=())
    ] = None
    abort_message: Annotated[Any, doc("Not available. Only null is taken.", None, neutral=("",))] = None


class AbortAnswer(Struct):
    """What was ended."""

    aborted: Annotated[int, doc("Requests that were ended; 0 where they had ended already, or never were.", 1)]


class SleepState(Struct):
    """Whether the model sleeps."""

    is_sleeping: Annotated[bool, doc("Whether the model's memory is given up.", True)]
    level: Annotated[int, doc("0: awake; 1: the cache's memory is given up; 2: the weights' too.", 1)]


class Load(Struct, kw_only=True):
    """How busy the server is."""

    server_load: Annotated[int, doc("HTTP requests that wait for the model or are answered by it.", 3)]
    running: Annotated[int, doc("Sequences that are computed.", 2)]
    waiting: Annotated[int, doc("Sequences that wait for a place.", 1)]
    waiting_tokens: Annotated[int, doc("Tokens of those.", 512)]
    cache_usage: Annotated[float, doc("Share of the cache's blocks that are in use, from 0 to 1.", 0.25)]
    tokens_per_second: Annotated[float, doc("Computed of late, prompts included.", 180.5)]
    is_ready: Annotated[bool, doc("Whether a new request would be served now.", True)]


class OpenRequestCard(Struct, kw_only=True):
    """A request that waits or is being answered."""

    id: Annotated[str, doc("Its `X-Request-Id`; /abort_request takes it.", "1f2e3d4c5b6a79880f1e2d3c")]
    tenant: Annotated[str, doc("Name of the key that it came with; empty without keys.", "team-a")]
    priority: Annotated[int, doc("Lower goes first.", 0)]
    running: Annotated[int, doc("Sequences that are computed.", 1)]
    waiting: Annotated[int, doc("Sequences that wait for a place.", 0)]
    prompt_tokens: Annotated[int, doc("Of all its sequences.", 42)]
    generated_tokens: Annotated[int, doc("Of all its sequences, so far.", 17)]
    age_s: Annotated[float, doc("Seconds since it arrived.", 1.25)]


class OpenRequestList(Struct):
    """Every request that is open."""

    data: Annotated[list[OpenRequestCard], doc("The oldest first.")]
    object: Annotated[str, doc("Always list.", "list")] = "list"


class DrainAnswer(Struct):
    """The server ends."""

    status: Annotated[str, doc("Always draining.", "draining")] = "draining"
