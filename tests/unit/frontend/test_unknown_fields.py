"""``--unknown_fields warn``: what no struct knows is dropped and named, at any depth; all else is checked as ever."""

from typing import Annotated, Any

import pytest
from frontend_kit import Kit

from shoal.frontend.body import decode
from shoal.frontend.schemas.base import RequestBody, doc
from shoal.frontend.schemas.completions import CompletionRequest
from shoal.frontend.unknown_fields import drop_unknown

CHAT = "/v1/chat/completions"


class Leaf(RequestBody, tag_field="type", tag="leaf"):
    """One of two."""

    name: str = ""


class Branch(RequestBody, tag_field="type", tag="branch"):
    """The other one."""

    children: "list[Leaf | Branch] | None" = None


class Tree(RequestBody, kw_only=True):
    """All kinds of places where an object can stand."""

    root: Annotated[Leaf | Branch | str | None, doc("A node.", None)] = None
    named: dict[str, Leaf] | None = None
    free: Any = None


@pytest.mark.parametrize(
    ("given", "left", "named"),
    [
        ({"a": 1, "root": "x"}, {"root": "x"}, ["a"]),
        ({"free": {"a": 1}}, {"free": {"a": 1}}, []),
        ({"root": {"type": "leaf", "b": 1}}, {"root": {"type": "leaf"}}, ["root.b"]),
        (
            {
                "root": {
                    "type": "branch",
                    "children": [{"type": "leaf", "c": 1}, {"type": "branch", "name": "x"}],
                }
            },
            {"root": {"type": "branch", "children": [{"type": "leaf"}, {"type": "branch"}]}},
            ["root.children[0].c", "root.children[1].name"],
        ),
        ({"named": {"k": {"type": "leaf", "d": 1}}}, {"named": {"k": {"type": "leaf"}}}, ["named.k.d"]),
    ],
)
def test_places(given: dict[str, Any], left: dict[str, Any], named: list[str]) -> None:
    assert drop_unknown(given, Tree) == named
    assert given == left


def test_only_the_first_are_named() -> None:
    tree = {str(n) * 99: n for n in range(100)}
    named = drop_unknown(tree, Tree)
    assert tree == {}
    assert len(named) == 20
    assert max(map(len, named)) == 64


def test_numbers_stay_what_they_were() -> None:
    warnings: list[str] = []
    raw = b'{"prompt": "a", "seed": 18446744073709551615, "max_tokens": 5.0, "x": 1}'
    request = decode(raw, CompletionRequest, warnings)
    assert (request.seed, request.max_tokens) == (2**64 - 1, 5.0)
    assert warnings == ["unknown field dropped: x"]


def test_a_gateways_fields_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    kit = Kit(unknown_fields="warn")
    body = {"messages": [{"role": "user", "content": "a", "tr\u00e4ce": 1}], "gateway": {"id": 7}}
    with caplog.at_level("INFO", "shoal.frontend"):
        result = kit.post(CHAT, body)
    assert result.status_code == 200, result.text
    warning = result.headers["warning"]
    assert "gateway" in warning
    assert "messages[0].tr?ce" in warning
    assert warning.startswith("299 ")
    assert "gateway" in caplog.text
    assert "warning" not in kit.post(CHAT, {"messages": body["messages"][:0] or "a"}).headers


def test_a_stream_has_the_warning_too() -> None:
    result = Kit(unknown_fields="warn").complete(stream=True, trace_id="x")
    assert "trace_id" in result.headers["warning"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": "a", "x": 1, "temperature": "hot"}, "temperature", "invalid_type"),
        ({"x": 1}, "messages", "missing_field"),
        ({"messages": "a", "x": 1, "kwargs": {"a": 1}}, "kwargs", "not_available"),
    ],
)
def test_the_other_rules_hold(body: dict[str, Any], param: str, code: str) -> None:
    result = Kit(unknown_fields="warn").post(CHAT, body)
    assert result.status_code == 400
    assert (result.json["error"]["param"], result.json["error"]["code"]) == (param, code)
    assert "x" in result.headers["warning"]


def test_by_default_they_are_refused() -> None:
    assert Kit().chat(gateway=1).json["error"]["code"] == "unknown_field"
