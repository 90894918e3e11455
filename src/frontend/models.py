"""GET /v1/models and /v1/models/{id}: OpenAI's list with LMDeploy's extra keys."""

from typing import Annotated, Final

import falcon
import falcon.asgi
import msgspec

from shoal.frontend.routes import Operation, Parameter, Route
from shoal.frontend.schemas.base import doc
from shoal.frontend.schemas.models import ModelCard, ModelList, ModelPermission
from shoal.frontend.service import Service

_ENCODER: Final = msgspec.json.Encoder()
_MODEL_ID: Final = Parameter(
    name="model_id",
    place="path",
    type=Annotated[str, doc("The model's id; it may hold slashes.", "SmolLM2-135M-Instruct")],
)


def routes(service: Service) -> list[Route]:
    """The list and its entries."""
    return [
        Route(
            path="/v1/models",
            resource=Models(service),
            operations={"GET": Operation(summary="List the models", answer=ModelList)},
            stateless=True,
        ),
        Route(
            path="/v1/models/{model_id:path}",
            resource=Model(service),
            operations={
                "GET": Operation(
                    summary="Describe one model", parameters=(_MODEL_ID,), answer=ModelCard, errors=(404,)
                )
            },
            stateless=True,
        ),
    ]


class Models:
    """The list."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Every model that is served: one."""
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode(ModelList([_card(self._service)]))

    on_head = on_get


class Model:
    """One of them; ids may hold slashes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, model_id: str) -> None:
        """The model, or 404 with the names that are served."""
        self._service.check_model(model_id)
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode(_card(self._service))

    on_head = on_get


def _card(service: Service) -> ModelCard:
    name = service.settings.model_name
    limits = service.switchboard.limits
    return ModelCard(
        id=name,
        created=service.created,
        root=name,
        max_model_len=limits.session_len if limits is not None else service.settings.session_len or None,
        permission=[ModelPermission(id=f"modelperm-{service.created}", created=service.created)],
    )
