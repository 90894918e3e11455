"""Tensors of safetensors files, whole and in parts, of one file and of several, and of broken ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoal.checkpoint import ModelLocation
from shoal.errors import ModelError
from shoal.workers.weights.safetensors import SafetensorsSource
from shoal.workers.weights.source import open_source

INDEX = "model.safetensors.index.json"


def random_tensors() -> dict[str, torch.Tensor]:
    return {
        "w": torch.randn(33, 17),
        "half": torch.randn(7, 9).half(),
        "brain": torch.randn(5, 3).bfloat16(),
        "bias": torch.randn(13),
        "scalar": torch.tensor(2.5),
    }


def sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensor for at, (name, tensor) in enumerate(tensors.items()) if at % shards == number}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_whole_and_parts(shards: int, tmp_path: Path) -> None:
    tensors = random_tensors()
    if shards:
        sharded(tmp_path, tensors, shards)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = open_source(ModelLocation(path=tmp_path, kind="folder", default_name="x"))
    assert isinstance(source, SafetensorsSource)
    assert source.names() == set(tensors)
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert read.equal(tensor)
        assert source.shape(name) == tuple(tensor.shape)
        assert source.nbytes(name) == tensor.nbytes
    for rows in (slice(None), slice(3, 20), slice(32, None), slice(0, 0)):
        for columns in (None, slice(0, 5), slice(16, None), slice(4, 4)):
            part = source.read("w", rows, columns)
            assert part.equal(tensors["w"][rows, columns or slice(None)])
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.nbytes
    assert source.read("w", columns=slice(2, 9)).equal(tensors["w"][:, 2:9])
    assert source.read("bias", slice(4, 6)).equal(tensors["bias"][4:6])


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    weights = torch.randn(64, 64)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    read = source.read("w")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert read.equal(weights)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        source.read("w")


def test_wrong_requests(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(4), "bias": torch.randn(4)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    for ask in (source.read, source.shape, source.nbytes):
        with pytest.raises(ModelError, match=r"'lm_head\.weight' is missing"):
            ask("lm_head.weight")
    for ask in (source.read, source.nbytes):
        with pytest.raises(ModelError, match="'ids' is I64, not supported"):
            ask("ids")
    with pytest.raises(ModelError, match="'bias' has the shape"):
        source.read("bias", columns=slice(0, 2))


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has neither model\.safetensors"):
        SafetensorsSource(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="convert the model to safetensors"):
        SafetensorsSource(tmp_path)


ESCAPES = [
    "../model.safetensors",
    "/etc/passwd",
    "..",
    "",
    "a/b.safetensors",
    "a\\b.safetensors",
    "x.bin",
    "a\n.safetensors",
]


@pytest.mark.parametrize("file", ESCAPES)
def test_an_index_cannot_lead_out_of_its_folder(file: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    write_index(tmp_path / "model", {"w": file})
    with pytest.raises(ModelError, match="weight_map names") as caught:
        SafetensorsSource(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, {}, [], "w", {"w": 3}, {"w": ["a.safetensors"]}], ids=str)
def test_a_broken_index(weight_map: object, tmp_path: Path) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(ModelError, match=r"index\.json: weight_map"):
        SafetensorsSource(tmp_path)


def test_missing_shards_and_tensors(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path, random_tensors(), 3)
    write_index(tmp_path, weight_map | {"ghost": weight_map["w"]})
    with pytest.raises(ModelError, match="'ghost'"):
        SafetensorsSource(tmp_path)
    write_index(tmp_path, weight_map)
    (tmp_path / weight_map["half"]).unlink()
    with pytest.raises(ModelError, match=r"1 of 3 weight files missing \(model-00002"):
        SafetensorsSource(tmp_path)


def test_random_damage_gives_model_errors_only(tmp_path: Path) -> None:
    generator = torch.Generator()
    seed = generator.seed()
    path = tmp_path / "model.safetensors"
    save_file(random_tensors(), path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    messages: list[str] = []
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(1 + draw(3)):
            damaged[draw(header)] = draw(256)
        path.write_bytes(damaged[: draw(len(whole))] if draw(5) == 0 else damaged)
        try:
            source = SafetensorsSource(tmp_path)
            for name in source.names():
                source.read(name)
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) > 100, f"seed {seed}"
    assert not any("\n" in message for message in messages), f"seed {seed}"
