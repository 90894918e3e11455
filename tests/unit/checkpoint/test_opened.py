"""Descriptions and defaults whatever the format, and the flag that stretches a model's context."""

import json
from pathlib import Path

import pytest
from models import default_model_path
from msgspec.structs import replace

from shoal.checkpoint import ModelLocation, describe, generation_defaults, with_rope_scaling
from shoal.checkpoint.description import ModelDescription, Rope
from shoal.checkpoint.locate import DEFAULT_FILE
from shoal.errors import FlagError, ModelError

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip


def folder_with(folder: Path, generation: object = None) -> ModelLocation:
    (folder / "config.json").write_text(json.dumps(LLAMA))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelLocation(path=folder, kind="folder", default_name="x")


@pytest.fixture
def llama(tmp_path: Path) -> ModelDescription:
    return describe(folder_with(tmp_path))


def test_describes_either_kind(llama: ModelDescription) -> None:
    assert llama.num_layers == 2
    location = ModelLocation(path=default_model_path(), kind="gguf", default_name="x")
    assert describe(location).num_layers == 30


def test_the_default_model_is_greedy(tmp_path: Path) -> None:
    location = ModelLocation(path=tmp_path / DEFAULT_FILE, kind="gguf", default_name="m")
    assert generation_defaults(location) == {"temperature": 0.0}
    other = ModelLocation(path=tmp_path / "other.gguf", kind="gguf", default_name="m")
    assert generation_defaults(other) == {}


def test_generation_defaults(tmp_path: Path) -> None:
    assert generation_defaults(folder_with(tmp_path)) == {}
    given = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    assert generation_defaults(folder_with(tmp_path, given | {"do_sample": True, "eos_token_id": 2})) == given
    assert generation_defaults(folder_with(tmp_path, {"top_k": -1, "top_p": None})) == {"top_k": 0}


@pytest.mark.parametrize(
    "generation",
    [{"temperature": "hot"}, {"temperature": -1}, {"top_p": 1.5}, {"top_k": 2.5}, {"repetition_penalty": 0}],
    ids=str,
)
def test_bad_generation_defaults(generation: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json: {next(iter(generation))} is "):
        generation_defaults(folder_with(tmp_path, generation))


def test_rope_scaling_flag(llama: ModelDescription) -> None:
    assert with_rope_scaling(llama, 0.0) == llama
    stretched = with_rope_scaling(llama, 2.5)
    assert stretched.rope == Rope(dim=16, scaling="dynamic", factor=2.5, original_max_position=512)
    assert stretched.max_position == 1280
    assert with_rope_scaling(stretched, 4.0).max_position == 2048


@pytest.mark.parametrize("factor", [-1.0, 0.5, 1e9, float("nan"), float("inf")])
def test_rope_scaling_flag_out_of_range(factor: float, llama: ModelDescription) -> None:
    with pytest.raises(FlagError, match="--rope_scaling_factor"):
        with_rope_scaling(llama, factor)


def test_rope_scaling_flag_on_a_model_with_its_own(llama: ModelDescription) -> None:
    for rope in (replace(llama.rope, scaling="yarn", factor=2.0), replace(llama.rope, freq_factors=(1.0,) * 8)):
        with pytest.raises(FlagError, match=r"--rope_scaling_factor: the model has (yarn|llama3) rope scaling"):
            with_rope_scaling(replace(llama, rope=rope), 2.0)
