"""Whole models out of fp8 checkpoints: on the host their weights' meaning, on a device the weights themselves."""

import random
from pathlib import Path

import pytest
import torch
from cuda_driver import LENGTH, PLAIN, CudaDriver
from decoding import Driver, MemorySource, Sequence, random_checkpoint
from fp8_checkpoints import FORMATS, Format, Tensors
from on_chip import open_device
from torch import Tensor

from shoal.checkpoint import ModelLocation, describe
from shoal.config import Quantization
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_weight import CudaWeight
from shoal.workers.layers import HostWeight, Parameters
from shoal.workers.load import load_parameters
from shoal.workers.parallel import split
from shoal.workers.weights.places import DevicePlace, HostPlace
from shoal.workers.weights.source import open_source

SEED = random.randrange(1 << 30)
CONFIG = {
    "model_type": "qwen3", "vocab_size": 149, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16, "intermediate_size": 80, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return open_device()


def located(folder: Path) -> ModelLocation:
    return ModelLocation(path=folder, kind="folder", default_name="tiny")


def write(form: Format, folder: Path, more: Tensors | None = None, keys: float = 1.0) -> MemorySource:
    """keys: a factor on them. Returns the plain model that is meant."""
    tensors = {name: t.bfloat16().float() for name, t in random_checkpoint(PLAIN, SEED).tensors.items()}
    for name in tensors:
        if name.endswith("k_norm.weight"):
            tensors[name] *= keys
        if name.endswith("q_norm.weight"):
            tensors[name] /= keys
    return MemorySource(form.write(folder, CONFIG, tensors, more or {}))


def on_host(
    source: object, tp: int = 1, rank: int = 0, quantization: Quantization = "auto"
) -> Parameters[HostWeight]:
    place = HostPlace(torch.bfloat16)
    return load_parameters(source, PLAIN, split(PLAIN, tp, rank), place, lambda *_: None, quantization)


def on_device(device: CudaDevice, source: object, tp: int = 1, rank: int = 0) -> Parameters[CudaWeight]:
    place = DevicePlace(device, torch.bfloat16)
    return load_parameters(source, PLAIN, split(PLAIN, tp, rank), place, lambda *_: None)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("quantization", ["auto", "none", "w8"])
def test_on_the_host_weights_are_what_is_meant(
    form: Format, quantization: Quantization, tmp_path: Path
) -> None:
    meant = write(form, tmp_path)
    assert describe(located(tmp_path)).hidden_size == 48
    source = open_source(located(tmp_path))
    for tp, rank in ((1, 0), (3, 1)):
        expected = on_host(meant, tp, rank, quantization)
        found = on_host(source, tp, rank, quantization)
        pairs = zip(found.tensors(), expected.tensors(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("rank", [0, 2])
def test_on_a_device_rows_with_a_scale_stay_fp8(
    device: CudaDevice, form: Format, rank: int, tmp_path: Path
) -> None:
    meant = write(form, tmp_path)
    found, expected = (on_device(device, source, 3, rank) for source in (open_source(located(tmp_path)), meant))
    device.wait()
    for ours, theirs in zip(found.weights(), expected.weights(), strict=True):
        is_table = ours is found.embedding or ours is found.head
        is_fp8 = ours.storage.dtype == torch.float8_e4m3fn
        assert is_fp8 == (not is_table and not form.block[0])
        whole = ours.storage.float() if ours.scales is None else ours.storage.float() * ours.scales[:, None]
        assert torch.equal(whole.bfloat16(), theirs.storage)
    assert found.nbytes < expected.nbytes or form.block[0]


def logits_of(driver: CudaDriver | Driver) -> Tensor:
    ids = torch.randint(0, 149, (LENGTH,), generator=torch.Generator().manual_seed(SEED)).tolist()
    logits = driver.step([(Sequence(ids), LENGTH)])
    assert logits is not None
    return logits


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_device_computes_what_the_meant_model_does(device: CudaDevice, form: Format, tmp_path: Path) -> None:
    truth = logits_of(Driver(PLAIN, on_host(write(form, tmp_path)), LENGTH))
    found = logits_of(CudaDriver(device, PLAIN, on_device(device, open_source(located(tmp_path)))))
    error = (found - truth).abs() / truth.std()
    assert error.mean() < 0.02
    assert error.max() < 0.15


@pytest.mark.parametrize("per_head", [False, True])
def test_scales_of_an_fp8_cache_are_the_files(device: CudaDevice, per_head: bool, tmp_path: Path) -> None:
    """Keys that are far beyond what e4m3 holds."""
    scale = torch.tensor([20.0, 30.0, 25.0]) if per_head else torch.tensor(25.0)
    scales = {f"model.layers.{layer}.self_attn.k_scale": scale.clone() for layer in range(3)}
    form = FORMATS["compressed per channel"]
    truth = logits_of(Driver(PLAIN, on_host(write(form, tmp_path, scales, keys=2000.0)), LENGTH))
    parameters = on_device(device, open_source(located(tmp_path)))
    cached = logits_of(CudaDriver(device, PLAIN, parameters, torch.float8_e4m3fn))
    assert ((cached - truth).abs() / truth.std()).mean() < 0.15
    assert parameters.layers[1].attention.cache_scales is not None
    keys, values = parameters.layers[1].attention.cache_scales
    assert torch.equal(device.fetch(keys), scale.expand(3))
    assert torch.equal(device.fetch(values), torch.ones(3))
    plain = logits_of(CudaDriver(device, PLAIN, parameters))
    assert ((plain - truth).abs() / truth.std()).mean() < 0.02

    write(form, tmp_path, keys=2000.0)
    without = on_device(device, open_source(located(tmp_path)))
    assert without.layers[0].attention.cache_scales is None
    saturated = logits_of(CudaDriver(device, PLAIN, without, torch.float8_e4m3fn))
    assert ((saturated - truth).abs() / truth.std()).mean() > 0.3


def test_a_rank_has_its_own_heads_scales(device: CudaDevice, tmp_path: Path) -> None:
    scales = {f"model.layers.{layer}.self_attn.v_scale": torch.tensor([1.0, 2, 3]) for layer in range(3)}
    write(FORMATS["fp8 per tensor"], tmp_path, scales)
    for rank in range(3):
        found = on_device(device, open_source(located(tmp_path)), 3, rank).layers[2].attention.cache_scales
        assert found is not None
        assert [part.tolist() for part in found] == [[1.0], [rank + 1.0]]
