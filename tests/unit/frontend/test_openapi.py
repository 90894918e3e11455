"""/openapi.json: valid, complete, and true to the table of routes."""

import re
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import pytest
from frontend_kit import LMDEPLOY_SCHEMAS, Kit
from openapi_spec_validator import validate

from shoal.access import digest_of
from shoal.config import ApiKey
from shoal.frontend.app import all_routes
from shoal.frontend.routes import Operation
from shoal.frontend.schemas.base import RequestBody

LMDEPLOY_IDS = {
    ("/v1/models", "get"): "available_models_v1_models_get",
    ("/v1/chat/completions", "post"): "chat_completions_v1_v1_chat_completions_post",
    ("/v1/completions", "post"): "completions_v1_v1_completions_post",
    ("/v1/chat/interactive", "post"): "chat_interactive_v1_v1_chat_interactive_post",
    ("/v1/embeddings", "post"): "create_embeddings_v1_embeddings_post",
    ("/v1/encode", "post"): "encode_v1_encode_post",
    ("/generate", "post"): "chat_interactive_v1_generate_post",
}


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit()


@pytest.fixture(scope="module")
def document(kit: Kit) -> dict[str, Any]:
    answer = kit.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    written: dict[str, Any] = answer.json
    return written


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_it_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_every_served_operation_is_described_and_no_other(kit: Kit, document: dict[str, Any]) -> None:
    served = {
        (re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path), method.lower())
        for route in all_routes(kit.service)
        for method in route.operations
    }
    assert {(path, method) for path, method, _ in operations(document)} == served
    assert len(served) > 20


def test_fields_are_described_and_have_an_example(document: dict[str, Any]) -> None:
    lacking = [
        f"{name}.{field}: no {what}"
        for name, schema in document["components"]["schemas"].items()
        for field, written in schema.get("properties", {}).items()
        for what in ("description", "examples")
        if not written.get(what)
    ]
    assert lacking == []


def test_optional_fields_of_bodies_have_a_default(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    bodies = {struct.__name__ for struct in _descendants(RequestBody)} & set(schemas)
    lacking = [
        f"{name}.{field}"
        for name in sorted(bodies)
        for field, written in schemas[name]["properties"].items()
        if field not in schemas[name].get("required", ())
        and "default" not in written
        and "Default: `" not in written["description"]
    ]
    assert bodies
    assert lacking == []


def test_schemas_and_operations_are_described(document: dict[str, Any]) -> None:
    """The words are the struct's own: msgspec writes none where a struct has no docstring."""
    assert [
        name for name, schema in document["components"]["schemas"].items() if not schema.get("description")
    ] == []
    for path, method, operation in operations(document):
        assert operation["summary"], f"{method} {path}"
        assert "tags" not in operation, "generated classes are DefaultApi"
        for parameter in operation["parameters"]:
            assert parameter.get("description"), f"{method} {path}: {parameter['name']}"
            assert "example" in parameter, f"{method} {path}: {parameter['name']}"


def test_the_examples_of_bodies_are_what_the_decoder_takes(kit: Kit, document: dict[str, Any]) -> None:
    for route in all_routes(kit.service):
        for operation in route.operations.values():
            if operation.body is not None and not operation.upload:
                _check_example(operation, document)


def _check_example(operation: Operation, document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"][operation.body.__name__]
    if "examples" in schema:
        msgspec.convert(schema["examples"][0], operation.body)


def test_operation_ids_are_those_of_lmdeploy_and_all_differ(document: dict[str, Any]) -> None:
    ids = {(path, method): operation["operationId"] for path, method, operation in operations(document)}
    assert {key: ids[key] for key in LMDEPLOY_IDS if key in ids} == {
        key: value for key, value in LMDEPLOY_IDS.items() if key in ids
    }
    assert set(LMDEPLOY_IDS) - set(ids) == set()
    assert len(set(ids.values())) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9_]+", each) for each in ids.values())


def test_schema_names_of_2023_are_kept(document: dict[str, Any]) -> None:
    assert LMDEPLOY_SCHEMAS - set(document["components"]["schemas"]) == set()


def test_whole_numbers_are_integers_and_null_is_a_type(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert fields["max_tokens"]["type"] == ["integer", "null"]
    assert fields["max_tokens"]["format"] == "int64"
    assert fields["temperature"]["type"] == ["number", "null"]
    assert {"type": "null"} in fields["stop"]["oneOf"]


def test_no_union_has_branches_that_overlap(document: dict[str, Any]) -> None:
    """What ``oneOf`` promises: a value fits one branch."""
    for name, union in _unions(document["components"]["schemas"]):
        if "discriminator" not in union:
            types = [branch.get("type", branch.get("$ref")) for branch in union["oneOf"]]
            assert len(types) == len(set(map(str, types))), f"{name}: {types}"
            assert not {"integer", "number"} <= set(map(str, types)), name


def test_errors_are_described_on_every_operation(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        assert {"400", "403", "429", "500", "503"} <= set(operation["responses"]), f"{method} {path}"
        is_open = operation["security"] == []
        assert ("401" in operation["responses"]) != is_open, f"{method} {path}"
    detail = document["components"]["responses"]["Error429"]
    assert "Retry-After" in detail["headers"]


def test_a_key_is_optional_only_where_there_is_none(document: dict[str, Any]) -> None:
    assert {} in document["paths"]["/v1/models"]["get"]["security"]
    key = ApiKey(name="one", digest=digest_of("k"))
    guarded = Kit(api_keys=(key,)).get("/openapi.json", x_api_key="k")
    assert guarded.status_code == 200
    assert guarded.json["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}, {"key": []}]
    assert guarded.json["paths"]["/health"]["get"]["security"] == []


def test_every_frontend_writes_the_same_document(kit: Kit) -> None:
    assert kit.get("/openapi.json").content == Kit().get("/openapi.json").content


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/ui"])
def test_pages_are_html_with_a_policy_and_answer_head(kit: Kit, path: str) -> None:
    page = kit.get(path, Accept="text/html,*/*")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|https?://", page.text), "only files of this server"
    head = kit.request("HEAD", path)
    assert (head.status_code, head.content) == (200, b"")


def test_all_that_pages_name_is_served(kit: Kit) -> None:
    for path in ("/", "/redoc", "/ui"):
        for name in re.findall(r'(?:src|href)="(/[^"#]+)"', kit.get(path).text):
            assert kit.get(name).status_code == 200, f"{path} names {name}"


def test_an_asset_is_sent_once_and_zipped_to_who_can_read_that(kit: Kit) -> None:
    import gzip

    plain = kit.get("/ui/app.js")
    assert plain.headers["content-type"].startswith("text/javascript")
    zipped = kit.get("/ui/app.js", Accept_Encoding="gzip")
    assert gzip.decompress(zipped.content) == plain.content
    again = kit.get("/ui/app.js", If_None_Match=plain.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    assert kit.get("/ui/app.js", If_None_Match='"other"').status_code == 200


def test_the_entrance_answers_json_only_to_who_wants_no_page(kit: Kit) -> None:
    assert "swagger" in kit.get("/", Accept="*/*").text
    assert kit.get("/", Accept="application/json").json["docs"] == "/docs"


def test_docs_can_be_turned_off(kit: Kit) -> None:
    hidden = Kit(docs=False)
    for path in ("/", "/docs", "/redoc", "/openapi.json", "/docs/docs.js"):
        assert hidden.get(path).status_code == 404, path
    assert hidden.get("/ui").status_code == 200


def _descendants(struct: type[RequestBody]) -> Iterator[type[RequestBody]]:
    for child in struct.__subclasses__():
        yield child
        yield from _descendants(child)


def _unions(schema: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if "oneOf" in schema:
            yield name, schema
        for key, value in schema.items():
            if key not in ("examples", "default"):
                yield from _unions(value, f"{name}.{key}")
    elif isinstance(schema, list):
        for value in schema:
            yield from _unions(value, name)


def test_parameters_are_annotated(kit: Kit) -> None:
    for route in all_routes(kit.service):
        for operation in route.operations.values():
            for parameter in operation.parameters:
                assert any(isinstance(meta, msgspec.Meta) for meta in get_args(parameter.type)), parameter.name
