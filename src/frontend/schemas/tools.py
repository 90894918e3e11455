"""Functions that a model may call, and calls that it made."""

from typing import Annotated, Any

from msgspec import Struct

from shoal.frontend.schemas.fields import RequestBody, doc

_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_FUNCTION = {"name": "get_weather", "description": "The weather in a city.", "parameters": _PARAMETERS}


class FunctionDefinition(RequestBody):
    """A function."""

    name: Annotated[str, doc("1 to 128 letters, digits or _ - . : /", "get_weather")]
    description: Annotated[
        str | None, doc("What it does, for the model to read.", "The weather in a city.")
    ] = None
    parameters: Annotated[
        dict[str, Any] | None,
        doc("JSON schema of its arguments, an object. Default: it takes none.", _PARAMETERS),
    ] = None
    strict: Annotated[
        bool | None,
        doc(
            "true: every call of it has arguments that match `parameters`, held while they are generated. Calls "
            "that `tool_choice` forces always do. Default false.",
            True,
        ),
    ] = None


class Tool(RequestBody):
    """A tool."""

    type: Annotated[str, doc("`function`: the server has no tools of its own.", "function")]
    function: Annotated[FunctionDefinition | None, doc("The function.", _FUNCTION)] = None
    custom: Annotated[
        Any, doc("OpenAI's tools with free-form input; declare a function.", None, neutral=())
    ] = None


class FunctionName(RequestBody):
    """One of the functions."""

    name: Annotated[str, doc("Its name.", "get_weather")]


class NamedTool(RequestBody):
    """One of the tools."""

    type: Annotated[str, doc("`function`.", "function")]
    function: Annotated[FunctionName, doc("Which one.", {"name": "get_weather"})]


class AllowedTools(RequestBody):
    """Some of the tools."""

    mode: Annotated[str, doc("`auto`: it may call them; `required`: it calls at least one.", "auto")]
    tools: Annotated[
        list[NamedTool], doc("Which ones.", [{"type": "function", "function": {"name": "get_weather"}}])
    ]


class ToolChoice(RequestBody):
    """A tool that must be called, or tools of which only some may be."""

    type: Annotated[str, doc("`function` or `allowed_tools`.", "function")]
    function: Annotated[
        FunctionName | None, doc("Of type `function`: the one that is called.", {"name": "get_weather"})
    ] = None
    allowed_tools: Annotated[AllowedTools | None, doc("Of type `allowed_tools`: those.", None)] = None


class AnswerFunction(Struct):
    """What a call of the answer names."""

    name: Annotated[str, doc("The function.", "get_weather")]
    arguments: Annotated[
        str, doc("Its arguments as JSON text; broken off where the answer was.", '{"city": "Paris"}')
    ]


class AnswerCall(Struct):
    """A call in the answer."""

    id: Annotated[str, doc("Names the call: its result comes back with this `tool_call_id`.", "call_5f2c")]
    function: Annotated[AnswerFunction, doc("What is called.", {"name": "get_weather", "arguments": "{}"})]
    type: Annotated[str, doc("`function`.", "function")] = "function"


class FunctionDelta(Struct, omit_defaults=True):
    """What a chunk adds to a call's function."""

    name: Annotated[str | None, doc("In the call's first chunk.", "get_weather")] = None
    arguments: Annotated[str | None, doc("More of the arguments' JSON text.", '{"ci')] = None


class CallChunk(Struct, omit_defaults=True):
    """What a chunk adds to a call."""

    index: Annotated[int, doc("Of the call, from 0.", 0)]
    id: Annotated[str | None, doc("In the call's first chunk.", "call_5f2c")] = None
    type: Annotated[str | None, doc("In the call's first chunk: `function`.", "function")] = None
    function: Annotated[FunctionDelta | None, doc("What is new.", {"arguments": '{"ci'})] = None
