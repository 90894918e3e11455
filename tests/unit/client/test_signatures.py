"""Names, order and defaults, against the recorded table of LMDeploy's client: facts read off its 0.1.0 and 0.9.2."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal import client

TABLE = json.loads((Path(__file__).parent / "lmdeploy_signatures.json").read_text())


def ours(name: str) -> Callable[..., Any]:
    """The function of that name, ``APIClient.chat`` say."""
    owner, _, method = name.rpartition(".")
    found: Callable[..., Any] = getattr(getattr(client, owner) if owner else client, method)
    return found


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [one for one in inspect.signature(function).parameters.values() if one.name != "self"]


@pytest.mark.parametrize("name", sorted(TABLE["0.1.0"]))
def test_a_call_for_lmdeploy_0_1_means_the_same(name: str) -> None:
    recorded = TABLE["0.1.0"][name]
    found = parameters(ours(name))
    leading = [
        [one.name, *([] if one.default is one.empty else [one.default])]
        for one in found[: len(recorded["parameters"])]
    ]
    assert leading == recorded["parameters"]
    assert all(one.kind is one.POSITIONAL_OR_KEYWORD for one in found[: len(leading)])
    added = [one for one in found[len(leading) :] if one.kind is not one.VAR_KEYWORD]
    assert all(one.default is not one.empty for one in added), "what we add is optional"
    assert not recorded["further"] or found[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert inspect.isgeneratorfunction(ours(name)) is recorded["generator"]


@pytest.mark.parametrize("name", sorted(TABLE["0.9.2"]))
def test_every_keyword_of_lmdeploy_0_9_is_taken(name: str) -> None:
    signature = inspect.signature(ours(name))
    values = {parameter[0]: None for parameter in TABLE["0.9.2"][name]["parameters"]}
    owner = [object()] if "." in name else []
    assert signature.bind(*owner, **values)


def test_the_addresses_that_scripts_read() -> None:
    with client.APIClient("http://127.0.0.1:23333") as api:
        assert api.chat_intractive_v1_url == "http://127.0.0.1:23333/v1/chat/interactive"
        assert api.chat_completions_v1_url == "http://127.0.0.1:23333/v1/chat/completions"
        assert api.completions_v1_url == "http://127.0.0.1:23333/v1/completions"
        assert api.models_v1_url == "http://127.0.0.1:23333/v1/models"
        assert api.encode_v1_url == "http://127.0.0.1:23333/v1/encode"
        assert api.api_server_url == "http://127.0.0.1:23333"
