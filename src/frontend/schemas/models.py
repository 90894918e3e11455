"""The answers of /v1/models."""

from typing import Annotated

from msgspec import Struct

from shoal.frontend.schemas.base import doc


class ModelPermission(Struct, kw_only=True):
    """What LMDeploy and early OpenAI said that a key may do with a model."""

    id: Annotated[str, doc("Names the permission.", "modelperm-1700000000")]
    object: Annotated[str, doc("Always model_permission.", "model_permission")] = "model_permission"
    created: Annotated[int, doc("Unix time in seconds.", 1700000000)]
    allow_create_engine: Annotated[bool, doc("Never.", False)] = False
    allow_sampling: Annotated[bool, doc("Always.", True)] = True
    allow_logprobs: Annotated[bool, doc("Always.", True)] = True
    allow_search_indices: Annotated[bool, doc("Never.", False)] = False
    allow_view: Annotated[bool, doc("Always.", True)] = True
    allow_fine_tuning: Annotated[bool, doc("Never.", False)] = False
    organization: Annotated[str, doc("Whom it is for.", "*")] = "*"
    group: Annotated[str | None, doc("Always null.", None)] = None
    is_blocking: Annotated[bool, doc("Never.", False)] = False


class ModelCard(Struct, kw_only=True):
    """A model that is served."""

    id: Annotated[str, doc("The name to send as `model`.", "SmolLM2-135M-Instruct")]
    object: Annotated[str, doc("Always model.", "model")] = "model"
    created: Annotated[int, doc("When the server started, Unix time in seconds.", 1700000000)]
    owned_by: Annotated[str, doc("Who serves it.", "shoal")] = "shoal"
    root: Annotated[str, doc("The model that this one is based on.", "SmolLM2-135M-Instruct")]
    parent: Annotated[str | None, doc("Always null.", None)] = None
    max_model_len: Annotated[int | None, doc("Most tokens of prompt and answer together.", 8192)]
    permission: Annotated[list[ModelPermission], doc("What may be done with it.")]


class ModelList(Struct):
    """Every model that is served."""

    data: Annotated[list[ModelCard], doc("The models.")]
    object: Annotated[str, doc("Always list.", "list")] = "list"
