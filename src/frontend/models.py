"""GET /v1/models and /v1/models/{id}: OpenAI's list with LMDeploy's extra keys."""

from typing import Any, Final

import falcon
import falcon.asgi
import msgspec

from shoal.frontend.service import Service

_ENCODER: Final = msgspec.json.Encoder()


class Models:
    """The list."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Every model that is served: one."""
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode({"object": "list", "data": [_card(self._service)]})

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


def _card(service: Service) -> dict[str, Any]:
    name = service.settings.model_name
    limits = service.switchboard.limits
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "shoal",
        "root": name,
        "parent": None,
        "max_model_len": limits.session_len if limits is not None else service.settings.session_len or None,
        "permission": [_permission(service)],
    }


def _permission(service: Service) -> dict[str, Any]:
    return {
        "id": f"modelperm-{service.created}",
        "object": "model_permission",
        "created": service.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
