"""What a program needs to talk to a server: ``from shoal.client import APIClient``.

Has LMDeploy's names and signatures, and imports nothing of the server: requests and the standard library do.
"""

from shoal.client.api_client import APIClient, SessionFullWarning
from shoal.client.errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    ContextLengthError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServiceUnavailableError,
)
from shoal.client.functions import get_model_list, get_streaming_response, input_prompt

__all__ = [
    "APIClient",
    "APIConnectionError",
    "APIError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "ConflictError",
    "ContextLengthError",
    "InternalServerError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "ServiceUnavailableError",
    "SessionFullWarning",
    "get_model_list",
    "get_streaming_response",
    "input_prompt",
]
