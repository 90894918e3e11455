"""What every route answers when it refuses, and the two error schemas that generated clients of 2023 know."""

from typing import Annotated

from msgspec import UNSET, Struct, UnsetType

from shoal.frontend.schemas.base import doc


class ErrorDetail(Struct, kw_only=True):
    """What is wrong, and with what."""

    message: Annotated[str, doc("For people: what is wrong and what to do.", "temperature: must be at most 2")]
    type: Annotated[str, doc("The kind of error.", "invalid_request_error")]
    param: Annotated[str | None, doc("The field or header that is wrong.", "temperature")] = None
    code: Annotated[str | None, doc("For programs: a short, stable name.", "invalid_value")] = None


class ErrorAnswer(Struct, kw_only=True):
    """An error. The HTTP status is the true one; routes that LMDeploy had repeat the message beside ``error``."""

    error: Annotated[ErrorDetail, doc("The error.")]
    object: Annotated[str | UnsetType, doc("Always error, where present.", "error")] = UNSET
    message: Annotated[str | UnsetType, doc("The same as in `error`.", "temperature: must be at most 2")] = (
        UNSET
    )
    code: Annotated[int | UnsetType, doc("The HTTP status.", 400)] = UNSET


class ValidationError(Struct, kw_only=True):
    """One mistake in a body, as FastAPI's servers told it."""

    loc: Annotated[list[str | int], doc("Where it is.", ["body", "temperature"])]
    msg: Annotated[str, doc("What is wrong.", "must be at most 2")]
    type: Annotated[str, doc("The kind of mistake.", "value_error")]


class HTTPValidationError(Struct, kw_only=True):
    """Body of the 422 that older servers sent. Shoal answers 400 with ``ErrorAnswer`` instead; the schema stays for
    programs that name the generated class."""

    detail: Annotated[list[ValidationError], doc("The mistakes.")] = []
