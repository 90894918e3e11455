"""Request ids, Host headers, origins and keys."""

import pytest
from frontend_kit import Kit


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


def test_any_origin_may_infer_but_not_read_metrics() -> None:
    kit = Kit()
    origin = "https://page.example"
    assert kit.get("/v1/models", Origin=origin).headers["access-control-allow-origin"] == "*"
    refused = kit.post("/v1/completions", b"{", Origin=origin)
    assert refused.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-origin" not in kit.get("/metrics", Origin=origin).headers


def test_named_origins_alone_where_the_flag_is_given() -> None:
    kit = Kit(allow_origins=("https://ours.example",))
    ours = kit.get("/metrics", Origin="https://ours.example")
    assert ours.headers["access-control-allow-origin"] == "https://ours.example"
    assert ours.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in kit.get("/v1/models", Origin="https://page.example").headers


def test_a_preflight() -> None:
    kit = Kit(api_keys=("k",))
    result = kit.request(
        "OPTIONS",
        "/v1/chat/completions",
        Origin="https://page.example",
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="authorization, content-type",
    )
    assert result.status_code == 204
    assert result.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in result.headers["access-control-allow-methods"]


def test_keys() -> None:
    kit = Kit(api_keys=("first", "second"))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "second"}, {"x_api_key": ""}):
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
    assert kit.get("/metrics").status_code == 401
    assert kit.get("/health").status_code == 200
