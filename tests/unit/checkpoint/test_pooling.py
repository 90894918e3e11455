"""What a model's files say of pooling, and what of it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from unit.checkpoint.gguf_bytes import STRING, UINT32, Gguf

from shoal.checkpoint import ModelLocation, declared_pooling
from shoal.errors import ModelError


def folder(path: Path, pooling: Any = None, modules: Any = None, name: str = "1_Pooling") -> ModelLocation:
    if pooling is not None:
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(pooling))
    if modules is not None:
        (path / "modules.json").write_text(json.dumps(modules))
    return ModelLocation(path=path, kind="folder", default_name="m")


def module(kind: str, path: str) -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


def test_a_folder_that_says_nothing(tmp_path: Path) -> None:
    assert declared_pooling(folder(tmp_path)) is None


@pytest.mark.parametrize(
    ("mode", "kind"), [("pooling_mode_mean_tokens", "mean"), ("pooling_mode_lasttoken", "last")]
)
def test_the_mode_that_is_on(tmp_path: Path, mode: str, kind: str) -> None:
    modes = {"pooling_mode_cls_token": False, "word_embedding_dimension": 8, "include_prompt": True, mode: True}
    assert declared_pooling(folder(tmp_path, modes)) == kind


def test_the_pooling_module_may_lie_elsewhere(tmp_path: Path) -> None:
    modules = [module("Transformer", ""), module("Pooling", "2_Pool"), module("Normalize", "3_Normalize")]
    where = folder(tmp_path, {"pooling_mode_lasttoken": True}, modules, name="2_Pool")
    assert declared_pooling(where) == "last"


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True},
        {"pooling_mode_mean_tokens": False},
        {},
        [],
    ],
)
def test_other_modes_are_refused_by_the_files_name(tmp_path: Path, pooling: Any) -> None:
    with pytest.raises(ModelError, match=r"1_Pooling/config\.json"):
        declared_pooling(folder(tmp_path, pooling))


@pytest.mark.parametrize(
    "modules",
    [
        [module("Transformer", ""), module("Dense", "2_Dense")],
        [module("Pooling", "../elsewhere")],
        [module("Pooling", "/etc")],
        [{"path": ""}],
        {},
        "x",
    ],
)
def test_modules_that_cannot_be_honoured_are_refused(tmp_path: Path, modules: Any) -> None:
    with pytest.raises(ModelError, match=r"modules\.json"):
        declared_pooling(folder(tmp_path, {"pooling_mode_mean_tokens": True}, modules))


def gguf(path: Path, pooling: int | None) -> ModelLocation:
    metadata: list[tuple[str | bytes, int, object]] = [("general.architecture", STRING, "qwen3")]
    if pooling is not None:
        metadata.append(("qwen3.pooling_type", UINT32, pooling))
    file = path / "m.gguf"
    file.write_bytes(Gguf(metadata).build())
    return ModelLocation(path=file, kind="gguf", default_name="m")


@pytest.mark.parametrize(("pooling", "kind"), [(None, None), (0, None), (1, "mean"), (3, "last")])
def test_a_gguf_files_pooling_type(tmp_path: Path, pooling: int | None, kind: str | None) -> None:
    assert declared_pooling(gguf(tmp_path, pooling)) == kind


@pytest.mark.parametrize("pooling", [2, 4, 77])
def test_a_gguf_files_other_types_are_refused(tmp_path: Path, pooling: int) -> None:
    with pytest.raises(ModelError, match=r"qwen3\.pooling_type"):
        declared_pooling(gguf(tmp_path, pooling))
