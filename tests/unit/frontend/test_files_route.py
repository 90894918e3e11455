"""/v1/files and /v1/batches: what is taken in, what is refused, who sees what."""

from typing import Any

import pytest
from falcon import testing
from frontend_kit import Kit

BOUNDARY = "xxBOUNDARYxx"


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    body = b""
    for name, filename, content in parts:
        shown = f'name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
        body += f"--{BOUNDARY}\r\nContent-Disposition: form-data; {shown}\r\n\r\n".encode() + content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def upload(kit: Kit, *parts: tuple[str, str | None, bytes]) -> testing.Result:
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return kit.request("POST", "/v1/files", form(*parts), Content_Type=headers["Content-Type"])


def get(kit: Kit, path: str, **options: Any) -> testing.Result:
    return kit.client.simulate_get(path, host="127.0.0.1", **options)


def post(kit: Kit, path: str, **options: Any) -> testing.Result:
    return kit.client.simulate_post(path, host="127.0.0.1", **options)


def delete(kit: Kit, path: str) -> testing.Result:
    return kit.client.simulate_delete(path, host="127.0.0.1")


def uploaded(kit: Kit, content: bytes = b"{}", purpose: bytes = b"batch") -> dict[str, Any]:
    result = upload(kit, ("purpose", None, purpose), ("file", "in.jsonl", content))
    assert result.status_code == 200, result.text
    answer: dict[str, Any] = result.json
    return answer


def test_a_file_comes_back_as_it_was_sent() -> None:
    kit, content = Kit(), bytes(range(256)) * 3000
    file = uploaded(kit, content)
    assert (file["bytes"], file["filename"], file["purpose"]) == (len(content), "in.jsonl", "batch")
    back = get(kit, f"/v1/files/{file['id']}/content")
    assert back.content == content
    assert get(kit, f"/v1/files/{file['id']}").json == file
    assert get(kit, "/v1/files").json["data"] == [file]
    assert delete(kit, f"/v1/files/{file['id']}").json["deleted"] is True
    for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content"):
        gone = get(kit, path)
        assert (gone.status_code, gone.json["error"]["code"]) == (404, "file_not_found")


@pytest.mark.parametrize(
    ("parts", "status", "param"),
    [
        ((("purpose", None, b"batch"),), 400, "file"),
        ((("file", "x", b"{}"),), 400, "purpose"),
        ((("file", "x", b"{}"), ("purpose", None, b"fine-tune")), 400, "purpose"),
        ((("file", "x", b"{}"), ("purpose", None, b"batch"), ("color", None, b"red")), 400, "color"),
        ((("file", "x", b"1"), ("file", "y", b"2"), ("purpose", None, b"batch")), 400, "file"),
        ((("file", "x", b"{}"), ("purpose", None, b"\xff")), 400, "purpose"),
        ((("file", "x", b"{}"), ("purpose", None, b"b" * 9999)), 400, "purpose"),
        ((("file", "x", b"a" * 2001), ("purpose", None, b"batch")), 413, "file"),
        (
            (("file", "x", b"{}"), ("purpose", None, b"batch"), ("expires_after[seconds]", None, b"9000")),
            400,
            "expires_after",
        ),
    ],
)
def test_uploads_that_are_refused(parts: Any, status: int, param: str) -> None:
    kit = Kit(file_limit_bytes=2000)
    result = upload(kit, *parts)
    assert (result.status_code, result.json["error"]["param"]) == (status, param)
    assert get(kit, "/v1/files").json["data"] == []


def test_a_body_that_is_no_form() -> None:
    kit = Kit()
    assert post(kit, "/v1/files", json={"file": "x"}).status_code == 415
    headers = {"Content-Type": "multipart/form-data; boundary=none"}
    assert post(kit, "/v1/files", headers=headers, body=b"garbage").status_code == 400
    assert post(kit, "/v1/files", headers={"Content-Type": "multipart/form-data"}).status_code == 400


def test_pages_of_files() -> None:
    kit = Kit()
    ids = [uploaded(kit)["id"] for _ in range(5)]
    first = get(kit, "/v1/files", params={"limit": 2, "order": "asc"}).json
    assert ([file["id"] for file in first["data"]], first["has_more"]) == (ids[:2], True)
    params = {"limit": 3, "order": "asc", "after": first["last_id"]}
    rest = get(kit, "/v1/files", params=params).json
    assert ([file["id"] for file in rest["data"]], rest["has_more"]) == (ids[2:], False)
    for wrong in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}):
        assert get(kit, "/v1/files", params=wrong).status_code == 400


def batch_of(kit: Kit, **changes: Any) -> testing.Result:
    body = {"input_file_id": uploaded(kit)["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    return post(kit, "/v1/batches", json=body | changes)


def test_a_batch_is_taken_in_and_cancelled() -> None:
    kit = Kit()
    batch = batch_of(kit, metadata={"a": "b"}).json
    assert (batch["status"], batch["metadata"]) == ("validating", {"a": "b"})
    assert get(kit, f"/v1/batches/{batch['id']}").json == batch
    assert get(kit, "/v1/batches").json["data"] == [batch]
    cancelled = post(kit, f"/v1/batches/{batch['id']}/cancel").json
    assert cancelled["status"] == "cancelling"


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"endpoint": "/v1/moderations"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"input_file_id": "file-nope"}, 404, "input_file_id"),
        ({"metadata": {"k": "v" * 513}}, 400, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, 400, "output_expires_after.seconds"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_batches_that_are_refused(changes: dict[str, Any], status: int, param: str) -> None:
    result = batch_of(Kit(), **changes)
    assert (result.status_code, result.json["error"]["param"]) == (status, param)


def test_only_files_for_batches() -> None:
    kit = Kit()
    file = uploaded(kit, purpose=b"user_data")
    assert batch_of(kit, input_file_id=file["id"]).status_code == 400
