"""Request ids, Host headers, pages of other origins, keys and their scopes."""

import base64
import logging

import pytest
from falcon import testing
from frontend_kit import Kit

from shoal.access import digest_of
from shoal.config import ApiKey, Scope
from shoal.frontend.app import all_routes

PAGE = "https://page.example"
OURS = "https://ours.example"
CHAT = "/v1/chat/completions"
BODY = {"messages": "hi"}


def key(name: str, *scopes: Scope) -> ApiKey:
    """A key whose text is its name."""
    return ApiKey(name=name, digest=digest_of(name), scopes=scopes) if scopes else ApiKey(
        name=name, digest=digest_of(name)
    )  # fmt: skip


def preflight(kit: Kit, path: str, method: str = "POST", origin: str = PAGE) -> testing.Result:
    return kit.request(
        "OPTIONS",
        path,
        Origin=origin,
        Access_Control_Request_Method=method,
        Access_Control_Request_Headers="authorization, content-type",
    )


def test_request_ids_are_taken_or_made() -> None:
    kit = Kit()
    given = kit.post("/v1/completions", {"prompt": "a"}, X_Request_Id="abc-1.2")
    assert given.headers["x-request-id"] == "abc-1.2"
    assert given.json["id"] == "cmpl-abc-1.2"
    assert kit.scheduler.submits[-1].label == "abc-1.2"
    made = {kit.get("/version").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert kit.post("/v1/completions", b"{").headers["x-request-id"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "app.localhost", "localhost."])
def test_own_names_are_answered(host: str) -> None:
    assert Kit().request("GET", "/v1/models", host=host).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1"])
def test_foreign_names_are_refused_on_loopback(host: str) -> None:
    kit = Kit()
    result = kit.request("GET", "/v1/models", host=host)
    assert result.status_code == 403
    assert result.json["error"]["code"] == "unknown_host"
    assert Kit(server_name="0.0.0.0").request("GET", "/v1/models", host=host).status_code == 200


# --- pages of other origins ------------------------------------------------------------------------------


def test_any_page_may_infer_but_not_read_metrics() -> None:
    kit = Kit()
    assert kit.get("/v1/models", Origin=PAGE).headers["access-control-allow-origin"] == "*"
    refused = kit.post("/v1/completions", b"{", Origin=PAGE)
    assert refused.status_code == 400
    assert refused.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-origin" not in kit.get("/metrics", Origin=PAGE).headers


@pytest.mark.parametrize("path", ["/abort_request", "/sleep", "/wakeup", "/admin/drain", "/v1/files"])
def test_no_page_may_change_anything_unasked(path: str) -> None:
    """A browser sends a plain form's POST without asking: it must not be carried out."""
    kit = Kit()
    result = kit.post(path, b"{}", Origin=PAGE, Content_Type="text/plain")
    assert result.status_code == 403
    assert result.json["error"]["code"] == "origin_not_allowed"
    assert "--allow_origins https://page.example" in result.json["error"]["message"]
    assert kit.scheduler.rests == []
    assert preflight(kit, path).status_code == 403


def test_our_own_pages_may_whatever_the_route() -> None:
    kit = Kit()
    body = {"rid": "x"}
    assert kit.post("/abort_request", body, Origin="http://127.0.0.1").status_code == 200
    assert kit.post("/abort_request", body, Origin=PAGE, Sec_Fetch_Site="same-origin").status_code == 200
    assert kit.post("/abort_request", body, Origin="http://127.0.0.1:8").status_code == 403
    assert kit.post("/abort_request", body, Origin="null").status_code == 403


def test_named_origins_alone_where_the_flag_is_given() -> None:
    kit = Kit(allow_origins=(OURS,))
    ours = kit.get("/metrics", Origin=OURS)
    assert ours.headers["access-control-allow-origin"] == OURS
    assert ours.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in ours.headers
    theirs = kit.get("/v1/models", Origin=PAGE)
    assert "access-control-allow-origin" not in theirs.headers
    assert theirs.headers["vary"] == "Origin"
    assert kit.post(CHAT, BODY, Origin=PAGE).status_code == 403
    assert kit.post(CHAT, BODY, Origin=OURS).status_code == 200


def test_credentials_are_allowed_where_the_flag_says_so() -> None:
    kit = Kit(allow_origins=(OURS,), allow_credentials=True)
    assert kit.get("/v1/models", Origin=OURS).headers["access-control-allow-credentials"] == "true"
    assert preflight(kit, CHAT, origin=OURS).headers["access-control-allow-credentials"] == "true"


def test_a_preflight_needs_no_key_and_names_the_methods_of_its_route() -> None:
    kit = Kit(api_keys=(key("k"),), allow_origins=("*",))
    result = preflight(kit, CHAT)
    assert result.status_code == 204
    assert result.headers["access-control-allow-origin"] == "*"
    assert result.headers["access-control-allow-headers"] == "authorization, content-type"
    assert result.headers["access-control-allow-methods"] == "POST, OPTIONS"
    deleting = preflight(kit, "/v1/files/file-1", "DELETE")
    assert "DELETE" in deleting.headers["access-control-allow-methods"]


def test_methods_and_headers_are_those_of_the_flags() -> None:
    kit = Kit(allow_methods=("GET",), allow_headers=("X-Mine", "Content-Type"))
    result = preflight(kit, CHAT)
    assert result.headers["access-control-allow-methods"] == "GET"
    assert result.headers["access-control-allow-headers"] == "X-Mine, Content-Type"


# --- keys ------------------------------------------------------------------------------------------------


def test_keys() -> None:
    kit = Kit(api_keys=(key("first"), key("second")))
    wrong: tuple[dict[str, str], ...] = (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "second"},
        {"Authorization": "Bearer sécond"},
        {"x_api_key": ""},
    )
    for headers in wrong:
        result = kit.get("/v1/models", **headers)
        assert result.status_code == 401
        assert result.json["error"]["type"] == "authentication_error"
        assert result.headers["www-authenticate"] == "Bearer"
    for headers in (
        {"Authorization": "Bearer second"},
        {"authorization": "bearer first"},
        {"x_api_key": "first"},
    ):
        assert kit.get("/v1/models", **headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_what_is_open_to_everybody(path: str) -> None:
    assert Kit(api_keys=(key("k"),)).get(path).status_code == 200


def test_every_described_route_but_those_is_behind_a_key() -> None:
    kit = Kit(api_keys=(key("k", "metrics"),))
    described = [route for route in all_routes(kit.service) if route.operations]
    assert {route.path for route in described if route.scope == "open"} == {"/health", "/ready"}
    assert not [
        route.path for route in all_routes(kit.service) if not route.operations and route.scope == "open"
    ]
    assert kit.get("/version").status_code == 401
    assert kit.get("/version", x_api_key="k").status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/openapi.json", "/ui", "/ui/app.js"])
def test_a_page_asks_for_the_key_as_browsers_do(path: str) -> None:
    kit = Kit(api_keys=(key("sécond"),))
    asked = kit.get(path)
    assert asked.status_code == 401
    assert asked.headers["www-authenticate"].startswith("Basic realm=")
    assert kit.get(path, Authorization=basic("anybody", "sécond")).status_code == 200
    for wrong in (
        basic("sécond", ""),
        basic("", "other"),
        "Basic !",
        "Basic " + base64.b64encode(b"\xff:k").decode(),
    ):
        assert kit.get(path, Authorization=wrong).status_code == 401


def test_a_key_that_the_browser_adds_counts_for_pages_of_this_server_alone() -> None:
    kit = Kit(api_keys=(key("k"),))
    typed = {"Authorization": basic("", "k")}
    assert kit.get("/v1/models", **typed).status_code == 200
    assert kit.get("/v1/models", Origin="http://127.0.0.1", **typed).status_code == 200
    assert kit.get("/v1/models", Origin="http://elsewhere.example", **typed).status_code == 401
    assert kit.request("POST", CHAT, b"{}", Origin="http://elsewhere.example", **typed).status_code == 401


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_a_query_says_nothing_that_is_not_listened_to() -> None:
    kit = Kit()
    refused = kit.get("/v1/sessions?limit=2&sort=up")
    assert (refused.status_code, refused.json["error"]["param"]) == (400, "sort")
    assert (
        refused.json["error"]["message"]
        == "unknown query parameter: sort; /v1/sessions takes limit, order, after"
    )
    assert kit.get("/v1/files?purpose=batch&limit=2").status_code == 200
    assert kit.get("/v1/models?limit=1000").status_code == 200, (
        "where nothing is read from a query, nobody looks at it"
    )
    warned = Kit(unknown_fields="warn").get("/v1/sessions?sort=up")
    assert warned.status_code == 200
    assert warned.headers["warning"] == '299 shoal "unknown query parameter dropped: sort"'


def test_a_stranger_does_not_learn_which_routes_there_are() -> None:
    kit = Kit(api_keys=(key("k"),))
    for method, path in (("GET", "/nothing"), ("GET", "/v1/chat/completions"), ("DELETE", "/metrics")):
        assert kit.request(method, path).status_code == 401
    assert kit.get("/nothing", x_api_key="k").status_code == 404
    assert kit.get(CHAT, x_api_key="k").status_code == 405
    assert Kit().get("/nothing").status_code == 404


@pytest.mark.parametrize(
    ("path", "scope"),
    [("/v1/models", "inference"), ("/metrics", "metrics"), ("/load", "metrics"), ("/is_sleeping", "admin")],
)
def test_a_key_opens_what_its_scopes_say(path: str, scope: Scope) -> None:
    kit = Kit(
        api_keys=(key("inference", "inference"), key("metrics", "metrics"), key("admin", "admin"), key("all"))
    )
    for name in ("inference", "metrics", "admin", "all"):
        result = kit.get(path, x_api_key=name)
        if name in (scope, "all"):
            assert result.status_code == 200
        else:
            assert result.status_code == 403
            assert result.json["error"]["code"] == "insufficient_scope"
            assert f"no {scope} scope" in result.json["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, BODY),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
        (
            "/v1/messages",
            {"model": "served/model", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]},
        ),
        ("/v1/chat/interactive", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
def test_the_scheduler_learns_whose_request_it_is_and_what_belongs_together(
    path: str, body: dict[str, object]
) -> None:
    kit = Kit(api_keys=(key("team"),))
    kit.get("/version")
    assert kit.post(path, body, x_api_key="team").status_code == 200
    assert kit.post(path, body, x_api_key="team").status_code == 200
    assert {submit.tenant for submit in kit.scheduler.submits} == {"team"}
    assert len({submit.group for submit in kit.scheduler.submits}) == 2
    assert {submit.group for submit in kit.scheduler.submits} <= {
        each.request_no for each in kit.scheduler.submits
    }


def test_keys_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    kit = Kit(api_keys=(key("sk-secret"),))
    logging.getLogger("shoal").propagate = True
    with caplog.at_level(logging.DEBUG):
        kit.get("/v1/models", Authorization="Bearer sk-wrong")
        kit.post(CHAT, BODY, Authorization="Bearer sk-right")
    assert "/v1/models" in caplog.text
    assert "sk-wrong" not in caplog.text
    assert "sk-right" not in caplog.text
    assert digest_of("sk-secret") not in caplog.text


def test_the_body_limit_is_the_flags() -> None:
    kit = Kit(body_limit_bytes=1000)
    assert kit.post("/v1/completions", {"prompt": "a" * 100}).status_code == 200
    result = kit.post("/v1/completions", {"prompt": "a" * 1000})
    assert result.status_code == 413
    assert "larger than 1000 bytes (--body_limit)" in result.json["error"]["message"]
