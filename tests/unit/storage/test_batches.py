"""What is kept of batches, and what their input files may hold."""

import json
from pathlib import Path

import pytest

from shoal.batches import validate
from shoal.storage import batches as store
from shoal.storage.batches import Batch, Result
from shoal.storage.files import FileStore

ENDPOINT = "/v1/completions"


def line(custom_id: str = "a", **changes: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": {}} | changes)


@pytest.mark.parametrize(
    ("content", "code", "number"),
    [
        ("", "empty_file", None),
        ("\n\n", "empty_file", None),
        ("{", "invalid_json_line", 1),
        (f"{line()}\n[1]", "invalid_json_line", 2),
        (f"{line()}\n\n{line()}", "duplicate_custom_id", 3),
        (line(method="GET"), "invalid_method", 1),
        (line(url="/v1/chat/completions"), "mismatched_endpoint", 1),
        (line(body={"stream": True}), "stream_not_allowed", 1),
        (line(body={"background": True}), "background_not_allowed", 1),
        (line(body=3), "invalid_json_line", 1),
        ("[" * 100_000, "invalid_json_line", 1),
        ('{"custom_id": "\\ud800", "method": "POST", "url": "x", "body": {}}', "invalid_json_line", 1),
    ],
)
def test_input_files_that_are_refused(tmp_path: Path, content: str, code: str, number: int | None) -> None:
    path = tmp_path / "input.jsonl"
    path.write_text(content)
    _, errors = validate(path, ENDPOINT)
    assert [(error.code, error.line) for error in errors] == [(code, number)]


def test_an_input_file_that_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_text("\n".join(line(f"r{number}") for number in range(30)) + "\n")
    assert validate(path, ENDPOINT) == (30, [])


def test_at_most_a_hundred_errors_are_told(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_text("{\n" * 500)
    total, errors = validate(path, ENDPOINT)
    assert (total, len(errors)) == (500, 100)


def test_an_outcome_counts_once(tmp_path: Path) -> None:
    database = store.open_database(str(tmp_path))
    batch = Batch(
        id="batch_1", tenant="t", endpoint=ENDPOINT, input_file_id="file-1", completion_window="24h",
        created_at=1, expires_at=2, status="in_progress",
    )  # fmt: skip
    database.run_here(lambda connection: store.insert(connection, batch))
    for result in (Result(2, False, b"two"), Result(1, True, b"one"), Result(2, False, b"again")):
        last = database.run_here(lambda connection, result=result: store.record(connection, "batch_1", result))
    assert (last.completed, last.failed) == (1, 1)
    path = tmp_path / "out"
    assert database.run_here(lambda connection: store.write_outputs(connection, "batch_1", False, path)) == 1
    assert path.read_bytes() == b"two\n"
    assert database.run_here(lambda connection: store.find(connection, "other", "batch_1")) is None
    database.close()


def test_bytes_without_a_row_are_swept(tmp_path: Path) -> None:
    database, files = store.open_database(str(tmp_path)), FileStore(tmp_path / "files")
    partial = files.begin()
    partial.write_bytes(b"half")
    kept = files.begin()
    kept.write_bytes(b"whole")
    file = database.run_here(
        lambda connection: files.keep(connection, kept, tenant="", filename="x", purpose="batch")
    )
    database.run_here(lambda connection: files.sweep(connection, partial_age_s=-1))
    database.close()
    assert [path.name for path in (tmp_path / "files").iterdir()] == [file.id]
    assert files.path(file.id).read_bytes() == b"whole"
