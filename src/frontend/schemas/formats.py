"""What an answer must match: OpenAI's ``response_format``, and vLLM's ``structured_outputs``."""

from typing import Annotated, Any

from shoal.frontend.schemas.fields import RequestBody, doc

_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


class JsonSchema(RequestBody):
    """A JSON schema with OpenAI's wrapping."""

    name: Annotated[str | None, doc("What the answer is, in a word; changes nothing.", "address")] = None
    description: Annotated[str | None, doc("What it is for; changes nothing.", "Where a person lives.")] = None
    schema: Annotated[
        dict[str, Any] | None,
        doc(
            "The schema (draft 2020-12 or older). The answer is a JSON text that it accepts, its properties in the "
            "schema's order. Keywords that cannot be held are a 400 that names them. Default: any object.",
            _SCHEMA,
        ),
    ] = None
    strict: Annotated[
        bool | None, doc("Every schema is held strictly here, so true and false give the same.", True)
    ] = None


class ResponseFormat(RequestBody):
    """The form of an answer."""

    type: Annotated[
        str,
        doc(
            "`text`: any; `json_object`: a JSON object; `json_schema`: what `json_schema` describes; "
            "`regex_schema`: LMDeploy's name for a regular expression.",
            "json_schema",
        ),
    ]
    json_schema: Annotated[
        JsonSchema | None, doc("Of type `json_schema`: the schema.", {"name": "address", "schema": _SCHEMA})
    ] = None
    regex_schema: Annotated[
        str | None,
        doc("Of type `regex_schema`: the regular expression (Rust's syntax, no look-around).", "[0-9]{4}"),
    ] = None
    schema: Annotated[
        dict[str, Any] | None, doc("Of type `json_object`: a schema, as llama.cpp's server takes it.", _SCHEMA)
    ] = None


class StructuredOutputs(RequestBody):
    """vLLM's form: exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`."""

    json: Annotated[
        str | dict[str, Any] | None, doc("A JSON schema, also as JSON text, that the answer matches.", _SCHEMA)
    ] = None
    regex: Annotated[str | None, doc("A regular expression that the whole answer matches.", "[0-9]{4}")] = None
    choice: Annotated[list[str] | None, doc("The answer is one of these.", ["yes", "no"])] = None
    grammar: Annotated[
        str | None, doc("A grammar (Lark's syntax, or GBNF) that the answer matches.", 'start: "yes" | "no"')
    ] = None
    json_object: Annotated[bool | None, doc("true: the answer is a JSON object.", True)] = None
    disable_any_whitespace: Annotated[
        bool | None, doc("White space in JSON is bounded anyway: true and false give the same.", True)
    ] = None
    disable_fallback: Annotated[
        bool | None, doc("There is one way to hold a grammar: true and false give the same.", True)
    ] = None
    disable_additional_properties: Annotated[
        Any,
        doc("Say `additionalProperties: false` in the schema instead.", False, neutral=(False,)),
    ] = None
    whitespace_pattern: Annotated[
        Any, doc("JSON has at most one space after a comma and a colon.", None, neutral=())
    ] = None
    structural_tag: Annotated[Any, doc("Forms within free text; see `tools`.", None, neutral=())] = None
