"""Batches from the upload to the output file, across the deaths of the processes that carry them out."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import openai
import pytest
import server as servers
from server import FAKE_SERVER, Server, descendants, running_server

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = str(tmp_path_factory.mktemp("data"))
    model = str(models.default_model_path())
    with running_server(model, f"--data_dir={data_dir}", command=FAKE_SERVER, ready_timeout_s=60) as running:
        yield running


@pytest.fixture
def client(shared: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=5)


def lines(count: int, max_tokens: int = 4, prompt: str = "one two") -> str:
    bodies = ({"prompt": f"{prompt} {n}", "max_tokens": max_tokens, "seed": n} for n in range(count))
    return "\n".join(
        json.dumps({"custom_id": f"line-{n}", "method": "POST", "url": "/v1/completions", "body": body})
        for n, body in enumerate(bodies)
    )


def begin(client: openai.OpenAI, content: str) -> Any:
    file = client.files.create(file=("input.jsonl", content.encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"k": "v"}
    )


def wait_for(client: openai.OpenAI, batch_id: str, holds: Callable[[Any], bool]) -> Any:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds(batch := client.batches.retrieve(batch_id)):
        assert time.monotonic() < deadline_s, batch
        time.sleep(0.05)
    return batch


def ended(batch: Any) -> bool:
    return batch.status in ("completed", "failed", "cancelled", "expired")


def records(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return (
        []
        if file_id is None
        else [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    )


def pids(server: Server, mark: str) -> list[int]:
    return [pid for pid, command in descendants(server.pid).items() if mark in command]


def test_a_batch_is_answered(client: openai.OpenAI) -> None:
    wrong = {
        "custom_id": "wrong",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "x", "top_p": 7},
    }
    batch = begin(client, lines(20) + "\n" + json.dumps(wrong))
    assert batch.status == "validating"
    batch = wait_for(client, batch.id, ended)
    assert (batch.status, batch.metadata) == ("completed", {"k": "v"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (21, 20, 1)
    answers = records(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{n}" for n in range(20)]
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["usage"]["completion_tokens"] == 4
    (failure,) = records(client, batch.error_file_id)
    assert (failure["custom_id"], failure["response"]["status_code"]) == ("wrong", 400)
    assert failure["response"]["body"]["error"]["param"] == "top_p"


def test_lines_are_answered_as_over_http(shared: Server, client: openai.OpenAI) -> None:
    batch = wait_for(client, begin(client, lines(3)).id, ended)
    for number, answer in enumerate(records(client, batch.output_file_id)):
        body = {"prompt": f"one two {number}", "max_tokens": 4, "seed": number}
        _, alone = shared.post("/v1/completions", body)
        assert answer["response"]["body"]["choices"] == alone["choices"]


def test_a_bad_file_fails_whole(client: openai.OpenAI) -> None:
    batch = wait_for(client, begin(client, lines(2) + "\nnonsense").id, ended)
    assert (batch.status, batch.errors.data[0].line, batch.output_file_id) == ("failed", 3, None)


def test_a_cancelled_batch_keeps_what_is_done(client: openai.OpenAI) -> None:
    batch = begin(client, lines(3000, 50))
    wait_for(client, batch.id, lambda each: each.request_counts.completed > 0)
    client.batches.cancel(batch.id)
    batch = wait_for(client, batch.id, ended)
    assert batch.status == "cancelled"
    assert len(records(client, batch.output_file_id)) == batch.request_counts.completed < 3000


@pytest.mark.parametrize("mark", ["shoal.batches", "shoal.scheduler", "fake_worker"])
def test_a_death_loses_and_repeats_no_line(shared: Server, client: openai.OpenAI, mark: str) -> None:
    batch = begin(client, lines(400, 20))
    wait_for(client, batch.id, lambda each: each.request_counts.completed > 20)
    for pid in pids(shared, mark):
        os.kill(pid, signal.SIGKILL)
    batch = wait_for(client, batch.id, ended)
    assert (batch.status, batch.request_counts.completed) == ("completed", 400)
    answers = records(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{n}" for n in range(400)]


def test_a_batch_goes_on_after_a_restart_of_everything(tmp_path: Path) -> None:
    args = (str(models.default_model_path()), f"--data_dir={tmp_path}")
    with running_server(*args, command=FAKE_SERVER, ready_timeout_s=60) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5)
        batch = begin(client, lines(1500, 40))
        wait_for(client, batch.id, lambda each: each.request_counts.completed > 5)
        server.process.kill()
        server.process.wait()
    with running_server(*args, command=FAKE_SERVER, ready_timeout_s=60) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5)
        before = client.batches.retrieve(batch.id).request_counts.completed
        assert before > 5
        batch = wait_for(client, batch.id, ended)
        ids = [answer["custom_id"] for answer in records(client, batch.output_file_id)]
        assert ids == [f"line-{n}" for n in range(1500)]
        assert servers.metrics(server)['shoal:request_success_total{finished_reason="length"}'] < 1500
