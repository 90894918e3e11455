"""Two hundred random schemas and the real model at temperature 1: no answer that ended breaks its schema."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
from hypothesis import HealthCheck, Phase, given, settings
from random_schemas import SCHEMAS
from server import Server, running_server

ASKED = 200
MOST_TOKENS = 200


def test_answers_validate(tmp_path: Path) -> None:
    with running_server(f"--data_dir={tmp_path / 'data'}", "--instance_num=32") as server:
        with ThreadPoolExecutor(32) as threads:
            answers = list(threads.map(lambda each: ask(server, *each), enumerate(random_schemas())))
        assert "grammar_failed" not in server.log()
    whole = [(schema, text) for schema, text, reason in answers if reason == "stop"]
    cut = sum(reason == "length" for _, _, reason in answers)
    assert len(whole) + cut == ASKED
    for schema, text in whole:
        jsonschema.validate(json.loads(text), schema)
    print(f"random schemas: {len(whole)} answers are valid, {cut} were cut at {MOST_TOKENS} tokens")
    assert cut < ASKED / 10


def random_schemas() -> list[dict[str, Any]]:
    """The same ones each time."""
    found: list[dict[str, Any]] = []

    @settings(
        max_examples=ASKED,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(SCHEMAS)
    def collect(schema: dict[str, Any]) -> None:
        found.append(schema)

    collect()
    while len(found) < ASKED:
        found += found[: ASKED - len(found)]
    return found[:ASKED]


def ask(server: Server, number: int, schema: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """The schema, the answer, and why it ended."""
    status, said = server.post(
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Answer in JSON: describe anything you like."}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            "temperature": 1,
            "seed": number,
            "max_tokens": MOST_TOKENS,
        },
    )
    assert status == 200, said
    choice = said["choices"][0]
    return schema, choice["message"]["content"], choice["finish_reason"]
