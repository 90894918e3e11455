"""Responses in the background, while the server ends: a drain finishes them, a death is told."""

import json
from pathlib import Path
from typing import Any

import models
from server import FAKE_SERVER, Server, running_server, stop


def begin(server: Server, tokens: int) -> str:
    body = {"input": "hi", "background": True, "max_output_tokens": tokens, "ignore_eos": True}
    status, response = server.post("/v1/responses", body)
    assert (status, response["status"]) == (200, "queued"), response
    identifier: str = response["id"]
    return identifier


def read(server: Server, response_id: str) -> dict[str, Any]:
    response: dict[str, Any] = json.loads(server.get(f"/v1/responses/{response_id}")[1])
    return response


def test_a_drain_finishes_them(tmp_path: Path) -> None:
    args = (str(models.default_model_path()), f"--data_dir={tmp_path}")
    with running_server(*args, command=FAKE_SERVER, ready_timeout_s=60) as server:
        identifiers = [begin(server, 300) for _ in range(4)]
        assert stop(server.process) == 0
    with running_server(*args, command=FAKE_SERVER, ready_timeout_s=60) as server:
        for identifier in identifiers:
            response = read(server, identifier)
            assert (response["status"], response["usage"]["output_tokens"]) == ("incomplete", 300), response


def test_a_death_is_told(tmp_path: Path) -> None:
    args = (str(models.default_model_path()), f"--data_dir={tmp_path}")
    with running_server(*args, command=FAKE_SERVER, ready_timeout_s=60) as server:
        identifier = begin(server, 4000)
        server.process.kill()
        server.process.wait()
    with running_server(*args, command=FAKE_SERVER, ready_timeout_s=60) as server:
        response = read(server, identifier)
    assert response["status"] == "failed"
    # a frontend that outlives the scheduler by a moment tells it itself
    told = {"server_error": "send the request again", "scheduler_restarted": "send it again"}
    assert told[response["error"]["code"]] in response["error"]["message"]


def test_what_the_scheduler_refuses_is_refused(tmp_path: Path) -> None:
    args = (str(models.default_model_path()), f"--data_dir={tmp_path}")
    with running_server(*args, command=FAKE_SERVER, ready_timeout_s=60) as server:
        body = {"input": "hi", "background": True, "max_output_tokens": 5000}
        status, refused = server.post("/v1/responses", body)
    assert (status, refused["error"]["code"]) == (400, "invalid_value"), "the fake's memory holds 4096 tokens"
