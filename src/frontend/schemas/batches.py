"""The body and answers of /v1/batches."""

from typing import Annotated

from msgspec import Struct

from shoal.frontend.schemas.base import RequestBody, Whole, doc

_EXAMPLE_ID = "batch_0123456789abcdef01234567"
_FILE_ID = "file-0123456789abcdef01234567"
_TIME = "Unix time in seconds; null before."


class OutputExpiry(RequestBody):
    """How long the output files are kept."""

    anchor: Annotated[str, doc("Only `created_at`: of the output file.", "created_at")]
    seconds: Annotated[Whole, doc("From an hour to 30 days.", 86400)]


class CreateBatchRequest(RequestBody):
    """POST /v1/batches."""

    input_file_id: Annotated[str, doc("A file uploaded with purpose `batch`, one request a line.", _FILE_ID)]
    endpoint: Annotated[
        str,
        doc(
            "Where every line's request goes: /v1/chat/completions, /v1/completions, /v1/embeddings or /v1/responses.",
            "/v1/chat/completions",
        ),
    ]
    completion_window: Annotated[str, doc("Within which time; `24h`.", "24h")] = "24h"
    metadata: Annotated[
        dict[str, str] | None,
        doc(
            "Up to 16 pairs, keys up to 64 and values up to 512 characters; returned as given.",
            {"job": "nightly"},
        ),
    ] = None
    output_expires_after: Annotated[
        OutputExpiry | None, doc("How long the output files are kept; null: until deleted.")
    ] = None


class BatchError(Struct, kw_only=True):
    """What is wrong with the input file."""

    code: Annotated[str, doc("A short name.", "invalid_json_line")]
    message: Annotated[str, doc("What and where.", "line 3 is not a JSON object")]
    line: Annotated[int | None, doc("Counted from 1.", 3)] = None
    param: Annotated[str | None, doc("The field.", "custom_id")] = None


class BatchErrors(Struct, kw_only=True):
    """All that is wrong with the input file, up to a hundred."""

    object: Annotated[str, doc("Always list.", "list")] = "list"
    data: Annotated[list[BatchError], doc("The errors.")]


class BatchCounts(Struct, kw_only=True):
    """How far a batch is."""

    total: Annotated[int, doc("Lines of the input.", 100)]
    completed: Annotated[int, doc("Lines answered.", 98)]
    failed: Annotated[int, doc("Lines that ended in an error.", 2)]


class BatchObject(Struct, kw_only=True):
    """A batch."""

    id: Annotated[str, doc("Names the batch.", _EXAMPLE_ID)]
    object: Annotated[str, doc("Always batch.", "batch")] = "batch"
    endpoint: Annotated[str, doc("Where every line's request goes.", "/v1/chat/completions")]
    errors: Annotated[BatchErrors | None, doc("Why the input file was refused.")] = None
    input_file_id: Annotated[str, doc("The input.", _FILE_ID)]
    completion_window: Annotated[str, doc("Within which time.", "24h")]
    status: Annotated[
        str,
        doc(
            "validating, failed, in_progress, finalizing, completed, expired, cancelling or cancelled.",
            "completed",
        ),
    ]
    output_file_id: Annotated[str | None, doc("The answers, one a line.", _FILE_ID)] = None
    error_file_id: Annotated[str | None, doc("The lines that failed, one a line.", _FILE_ID)] = None
    created_at: Annotated[int, doc("Unix time in seconds.", 1700000000)]
    in_progress_at: Annotated[int | None, doc(_TIME, 1700000001)] = None
    expires_at: Annotated[int | None, doc("When what is left of it is given up.", 1700086400)] = None
    finalizing_at: Annotated[int | None, doc(_TIME, 1700000050)] = None
    completed_at: Annotated[int | None, doc(_TIME, 1700000051)] = None
    failed_at: Annotated[int | None, doc(_TIME, None)] = None
    expired_at: Annotated[int | None, doc(_TIME, None)] = None
    cancelling_at: Annotated[int | None, doc(_TIME, None)] = None
    cancelled_at: Annotated[int | None, doc(_TIME, None)] = None
    request_counts: Annotated[BatchCounts, doc("How far it is.")]
    metadata: Annotated[dict[str, str] | None, doc("As given.", {"job": "nightly"})] = None


class BatchList(Struct, kw_only=True):
    """A page of batches, the newest first."""

    object: Annotated[str, doc("Always list.", "list")] = "list"
    data: Annotated[list[BatchObject], doc("The batches.")]
    first_id: Annotated[str | None, doc("The first one's id.", _EXAMPLE_ID)] = None
    last_id: Annotated[
        str | None, doc("The last one's id: send it as `after` for the next page.", _EXAMPLE_ID)
    ] = None
    has_more: Annotated[bool, doc("Whether there is a next page.", False)] = False
