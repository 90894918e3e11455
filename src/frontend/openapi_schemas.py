"""JSON schemas of the API's structs, in the form that documentation pages and client generators read without trouble.

``openapi.py`` calls ``components``. msgspec says what the decoders accept; what is added here is for readers: numbers
that stand for integers are integers, null is a type and not a branch, every property has an example.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from shoal.frontend.schemas.base import RequestBody, neutral_values

Schema = dict[str, Any]
_TEMPLATE: Final = "#/components/schemas/{name}"
_PREFIX: Final = _TEMPLATE.format(name="")
_DEEPEST_EXAMPLE: Final = 6
_VALUES: Final = ("default", "examples", "enum", "const")
"""Keywords whose values are no schemas."""
_NULL: Final[Schema] = {"type": "null"}
_INTEGER: Final[Schema] = {"type": "integer"}
_TITLES: Final = {
    "string": "Text",
    "array": "List",
    "object": "Fields",
    "boolean": "Flag",
    "integer": "Integer",
    "number": "Number",
}
_UNION_NAMES: Final = {
    ("ChatCompletionRequest", "messages"): "Messages",
    ("CompletionRequest", "prompt"): "Prompt",
    ("EmbeddingsRequest", "input"): "Input",
}
"""Unions that have had a name of their own in generated clients since LMDeploy's first API."""


def components(types: Sequence[Any]) -> tuple[list[Schema], dict[str, Schema]]:
    """The schema of each of ``types``, and the named ones that they refer to."""
    schemas, named = msgspec.json.schema_components(types, ref_template=_TEMPLATE)
    tidy = {name: _tidied(schema) for name, schema in named.items()}
    for body in types:
        if isinstance(body, type) and issubclass(body, RequestBody):
            _mark_neutral(body, tidy)
    for schema in (*tidy.values(), *(rest := [_tidied(schema) for schema in schemas])):
        _size(schema)
    for (owner, name), union in _UNION_NAMES.items():
        if owner in tidy:
            _name_union(tidy, tidy[owner]["properties"], name, union)
    for schema in tidy.values():
        for field in schema.get("properties", {}).values():
            if "examples" not in field:
                field["examples"] = [example(field, tidy)]
    for body in types:
        if isinstance(body, type) and issubclass(body, RequestBody):
            tidy[body.__name__]["examples"] = [example(tidy[body.__name__], tidy)]
    return rest, tidy


def example(schema: Schema, named: Mapping[str, Schema], depth: int = 0) -> Any:
    """A value of ``schema``: its own example, else one made of its required parts."""
    if schema.get("examples"):
        return schema["examples"][0]
    if "default" in schema and schema["default"] is not None:
        return schema["default"]
    if depth > _DEEPEST_EXAMPLE:
        return None
    if "$ref" in schema:
        return example(named[schema["$ref"].removeprefix(_PREFIX)], named, depth + 1)
    if schema.get("enum"):
        return schema["enum"][0]
    if "const" in schema:
        return schema["const"]
    for branch in ("anyOf", "oneOf", "allOf"):
        if branch in schema:
            return example(schema[branch][0], named, depth + 1)
    if "items" in schema:
        return [example(schema["items"], named, depth + 1)]
    if "properties" in schema:
        return {
            name: example(schema["properties"][name], named, depth + 1) for name in schema.get("required", ())
        }
    return None


def _mark_neutral(body: type[RequestBody], named: Mapping[str, Schema]) -> None:
    """Says of fields that are accepted only where they ask for nothing which values those are."""
    properties = named[body.__name__]["properties"]
    for name, values in neutral_values(body).items():
        accepted = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in (None, *values))
        told = properties[name].get("description")
        remark = f"Not available: only {accepted} is accepted."
        properties[name]["description"] = f"{told} {remark}" if told else remark
        properties[name].setdefault("examples", [values[0] if values else None])


def _name_union(named: dict[str, Schema], properties: dict[str, Schema], field: str, name: str) -> None:
    whole = properties[field]
    told: Schema = {key: whole[key] for key in ("description", "examples", "default") if key in whole}
    named[name] = {"title": name, **whole}
    properties[field] = {"$ref": _PREFIX + name, **told}


def _tidied(schema: Any) -> Any:
    """A copy in which unions are as plain as they can be."""
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tidy = {key: value if key in _VALUES else _tidied(value) for key, value in schema.items()}
    if tidy.get("contentEncoding") == "base64":
        del tidy["contentEncoding"]
        tidy["format"] = "binary"
    for field in tidy.get("properties", {}).values():
        _complete(field)
    if tidy.get("type") == "object" and "properties" not in tidy:
        tidy.setdefault("additionalProperties", True)
    return _plain_union(tidy) if "anyOf" in tidy else tidy


def _complete(field: Schema) -> None:
    """What msgspec leaves out, or generators have no type for."""
    if len(field.get("enum", ())) == 1 and "description" not in field:
        value = field["enum"][
            0
        ]  # of the field that tells the structs of a union apart, which has no annotation
        field |= {"type": "string", "description": f"Always `{value}`.", "examples": [value]}
    if field.get("type") == "null":
        field["type"] = ["string", "null"]
    if "oneOf" in field and field.get("default") is not None:
        told = msgspec.json.encode(field.pop("default")).decode()  # generated Go would not compile
        field["description"] = f"{field.get('description', '')} Default: `{told}`.".strip()


def _size(schema: Any) -> None:
    """Without a format generators take 32 bits, which hold neither a seed nor the time, and round a temperature."""
    if isinstance(schema, list):
        for item in schema:
            _size(item)
    elif isinstance(schema, dict):
        types = schema.get("type", ())
        for kind, size in (("integer", "int64"), ("number", "double")):
            if kind == types or (isinstance(types, list) and kind in types):
                schema.setdefault("format", size)
        for key, value in schema.items():
            if key not in _VALUES:
                _size(value)


def _plain_union(schema: Schema) -> Schema:
    """Of whole numbers and of null no branches are left where a type can tell. No value fits two branches, since a
    decoder could not tell them apart: so it is ``oneOf``, of which every generator makes a type that keeps the value.
    """
    branches: list[Schema] = list(_distinct(schema.pop("anyOf")))
    if "discriminator" in schema:
        return schema | {"oneOf": branches}
    if _INTEGER in branches:
        branches = [branch for branch in branches if branch != {"type": "number"}]
    solid = [branch for branch in branches if branch != _NULL]
    nullable = len(solid) < len(branches)
    if len(solid) == 1 and isinstance(solid[0].get("type"), str):
        return _nullable(solid[0] | schema) if nullable else solid[0] | schema
    if len(solid) == 1 and not nullable:
        return solid[0] | schema
    return schema | {"oneOf": [*map(_titled, solid), *([_NULL] if nullable else ())]}


def _nullable(schema: Schema) -> Schema:
    merged = schema | {"type": [schema["type"], "null"]}
    return merged | ({"enum": [*schema["enum"], None]} if "enum" in schema else {})


def _titled(branch: Schema) -> Schema:
    """Generators name the branch's member by its title."""
    title = _TITLES.get(str(branch.get("type")))
    names_items = "oneOf" in branch.get("items", {})
    return branch if title is None or "title" in branch or names_items else {"title": title, **branch}


def _distinct(branches: Iterable[Schema]) -> Iterable[Schema]:
    seen: list[Schema] = []
    for branch in branches:
        if branch not in seen:
            seen.append(branch)
            yield branch
