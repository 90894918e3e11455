"""POST /v1/embeddings and /pooling: a text's hidden states as one vector, where the server was started with
--task embed."""

import base64
from typing import Final

import falcon
import falcon.asgi
import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal.errors import RequestError
from shoal.frontend import body
from shoal.frontend.exchange import exchange_of
from shoal.frontend.inputs import characters, input_ids
from shoal.frontend.readings import read_prompts
from shoal.frontend.routes import Operation, Route
from shoal.frontend.schemas.embeddings import (
    Embedding,
    Embeddings,
    EmbeddingsRequest,
    EmbeddingsUsage,
    PooledData,
    PoolingAnswer,
    PoolingRequest,
)
from shoal.frontend.service import Service, now, off_loop
from shoal.frontend.values import invalid, whole

_ENCODER: Final = msgspec.json.Encoder()
Vector = NDArray[np.float32]


def routes(service: Service) -> list[Route]:
    """Both of them."""
    errors = (404, 408, 413)
    return [
        Route(
            path="/v1/embeddings",
            resource=EmbeddingsRoute(service),
            operations={
                "POST": Operation(
                    summary="Texts to vectors", description="Needs a server with `--task embed`.",
                    body=EmbeddingsRequest, answer=Embeddings, errors=errors,
                )
            },
            stateless=True,
        ),
        Route(
            path="/pooling",
            resource=PoolingRoute(service),
            operations={
                "POST": Operation(
                    summary="Texts to vectors, in vLLM's form", description="Needs a server with `--task embed`.",
                    body=PoolingRequest, answer=PoolingAnswer, errors=errors,
                )
            },
            stateless=True,
        ),
    ]  # fmt: skip


class EmbeddingsRoute:
    """OpenAI's form."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """One vector for each input."""
        request = await body.read(req, EmbeddingsRequest)
        vectors, usage = await _embed(self._service, req, request)
        shown = await off_loop(_work(vectors), lambda: [_shown(vector, request) for vector in vectors])
        data = [Embedding(index, vector) for index, vector in enumerate(shown)]
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode(Embeddings(self._service.settings.model_name, data, usage))


class PoolingRoute:
    """vLLM's form."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """One vector for each input."""
        request = await body.read(req, PoolingRequest)
        if request.use_activation is not None:
            if request.normalize not in (None, request.use_activation):
                raise invalid("use_activation", "contradicts normalize; give one of them")
            request.normalize = request.use_activation
        vectors, usage = await _embed(self._service, req, request)
        shown = await off_loop(_work(vectors), lambda: [_shown(vector, request) for vector in vectors])
        data = [PooledData(index, vector) for index, vector in enumerate(shown)]
        name = f"pool-{exchange_of(req).request_id}"
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode(PoolingAnswer(name, now(), self._service.settings.model_name, data, usage))


async def _embed(
    service: Service, req: falcon.asgi.Request, request: EmbeddingsRequest
) -> tuple[list[Vector], EmbeddingsUsage]:
    """Each input's vector, cut and normalised as the request wants it."""
    exchange = exchange_of(req)
    service.check_model(request.model)
    if service.settings.task != "embed":
        message = (
            f"{service.settings.model_name} is served to generate; for its vectors start a server with "
            "--task embed (an embedding model gives better ones)"
        )
        raise RequestError(400, message, param="model", code="wrong_task")
    exchange.user = request.user or ""
    limits = await service.switchboard.wait_ready()
    add_special = request.add_special_tokens is not False
    prompts = await off_loop(
        characters(request.input), lambda: input_ids(service, limits, request.input, add_special=add_special)
    )
    choices = await read_prompts(
        service, exchange, req, prompts,
        pooling=request.pooling or service.settings.pooling,
        timeout_s=request.timeout, priority=request.priority,
    )  # fmt: skip
    tokens = sum(map(len, prompts))
    vectors = [np.frombuffer(choice.vector, "<f4") for choice in choices]
    size = whole("dimensions", request.dimensions, len(vectors[0]), 1, len(vectors[0]))
    return [_fitted(vector, size, request.normalize is not False) for vector in vectors], EmbeddingsUsage(
        tokens, tokens
    )


def _fitted(vector: Vector, size: int, normalize: bool) -> Vector:
    """The leading numbers, of length 1 again (Matryoshka)."""
    cut = vector[:size].astype(np.float64)
    length = np.sqrt(np.square(cut).sum()) if normalize else 0.0
    return (cut / length if length else cut).astype(np.float32)


def _shown(vector: Vector, request: EmbeddingsRequest) -> list[float] | str:
    if request.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    # The shortest decimals that are this float32: half of what its float64 would take.
    return [float(str(number)) for number in vector]


def _work(vectors: list[Vector]) -> int:
    return sum(map(len, vectors))
