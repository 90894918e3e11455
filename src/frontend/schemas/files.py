"""The body and answers of /v1/files."""

from typing import Annotated

from msgspec import UNSET, Struct, UnsetType

from shoal.frontend.schemas.base import doc

_EXAMPLE_ID = "file-0123456789abcdef01234567"


class FileUpload(Struct, kw_only=True):
    """The form of POST /v1/files."""

    file: Annotated[bytes, doc("The file; for a batch, one JSON object a line.")]
    purpose: Annotated[str, doc("What it is for: `batch` or `user_data`.", "batch")]
    expires_after_anchor: Annotated[
        str | None,
        doc("From when it is kept: only `created_at`. Sent as `expires_after[anchor]`.", "created_at"),
    ] = None
    expires_after_seconds: Annotated[
        int | None,
        doc("For how many seconds it is kept, an hour to 30 days. Sent as `expires_after[seconds]`.", 86400),
    ] = None


class FileObject(Struct, kw_only=True):
    """A file that is kept."""

    id: Annotated[str, doc("Names the file.", _EXAMPLE_ID)]
    object: Annotated[str, doc("Always file.", "file")] = "file"
    bytes: Annotated[int, doc("Its size.", 1024)]
    created_at: Annotated[int, doc("Unix time in seconds.", 1700000000)]
    expires_at: Annotated[int | UnsetType, doc("When it will be removed; absent: never.", 1700086400)] = UNSET
    filename: Annotated[str, doc("The name it was sent with.", "requests.jsonl")]
    purpose: Annotated[str, doc("`batch`, `batch_output` or `user_data`.", "batch")]
    status: Annotated[str, doc("Always processed.", "processed")] = "processed"


class FileList(Struct, kw_only=True):
    """A page of files."""

    object: Annotated[str, doc("Always list.", "list")] = "list"
    data: Annotated[list[FileObject], doc("The files.")]
    first_id: Annotated[str | None, doc("The first one's id.", _EXAMPLE_ID)] = None
    last_id: Annotated[
        str | None, doc("The last one's id: send it as `after` for the next page.", _EXAMPLE_ID)
    ] = None
    has_more: Annotated[bool, doc("Whether there is a next page.", False)] = False


class FileDeleted(Struct, kw_only=True):
    """Answer of DELETE /v1/files/{id}."""

    id: Annotated[str, doc("Which file.", _EXAMPLE_ID)]
    object: Annotated[str, doc("Always file.", "file")] = "file"
    deleted: Annotated[bool, doc("Always true.", True)] = True
