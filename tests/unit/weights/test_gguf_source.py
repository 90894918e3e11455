"""Tensors of a GGUF file, whole and in parts."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from models import default_model_path, gemma_path
from unit.checkpoint.gguf_bytes import Gguf, Tensor, random_tensor

from shoal.checkpoint import ModelLocation
from shoal.checkpoint.gguf import BLOCK_SIZES, GgufFile, GgufType
from shoal.errors import ModelError
from shoal.workers.weights import gguf as gguf_source
from shoal.workers.weights.source import open_source


def opened(folder: Path, *tensors: Tensor) -> gguf_source.GgufSource:
    path = folder / "model.gguf"
    path.write_bytes(Gguf([], list(tensors)).build())
    source = open_source(ModelLocation(path=path, kind="gguf", default_name="x"))
    assert isinstance(source, gguf_source.GgufSource)
    return source


def same(part: torch.Tensor, whole: torch.Tensor) -> bool:
    return part.is_contiguous() and part.shape == whole.shape and part.equal(whole.contiguous())


@pytest.mark.parametrize("kind", GgufType, ids=lambda kind: kind.name)
def test_parts_equal_the_whole(kind: GgufType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "_CHUNK_ELEMENTS", 3000)
    rng = np.random.default_rng()
    rows, columns = 37, 3 * max(BLOCK_SIZES[kind][0], 5)
    tensor = random_tensor(rng, "w", kind, (rows, columns))
    source = opened(tmp_path, random_tensor(rng, "first", GgufType.F32, (3,)), tensor)
    whole = source.read("w").nan_to_num(nan=123.0)
    blocks = np.frombuffer(tensor.data, np.uint8).reshape(rows, -1)
    with np.errstate(all="ignore"):
        reference = gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    assert np.array_equal(whole.numpy(), np.nan_to_num(reference, nan=123.0, posinf=None, neginf=None))
    assert (source.shape("w"), source.nbytes("w")) == ((rows, columns), len(tensor.data))
    elements = BLOCK_SIZES[kind][0]
    cuts = [
        slice(None),
        slice(0, 0),
        slice(0, 1),
        slice(5, 36),
        slice(36, None),
        slice(-3, None),
        slice(30, 99),
    ]
    sides = [
        slice(None),
        slice(0, elements),
        slice(elements, 3 * elements),
        slice(elements + elements // 2, columns - 1),
        slice(1, columns - 1),
        slice(4, 5),
        slice(3, 3),
    ]
    for row_cut in cuts:
        for column_cut in sides:
            part = source.read("w", row_cut, column_cut).nan_to_num(nan=123.0)
            assert same(part, whole[row_cut, column_cut]), (row_cut, column_cut)


def test_vectors_are_cut_by_rows(tmp_path: Path) -> None:
    source = opened(tmp_path, random_tensor(np.random.default_rng(), "b", GgufType.BF16, (11,)))
    whole = source.read("b").nan_to_num(nan=123.0)
    assert whole.shape == (11,)
    for cut in (slice(2, 7), slice(9, None), slice(0, 0)):
        assert source.read("b", cut).nan_to_num(nan=123.0).equal(whole[cut])


def test_wrong_requests(tmp_path: Path) -> None:
    source = opened(tmp_path, random_tensor(np.random.default_rng(), "cube", GgufType.F32, (2, 2, 2)))
    assert source.names() == {"cube"}
    with pytest.raises(ModelError, match="'cube' has 3 dimensions"):
        source.read("cube")
    for ask in (source.read, source.shape, source.nbytes):
        with pytest.raises(ModelError, match="'w' is missing"):
            ask("w")


def test_memory_stays_near_the_part_asked_for(tmp_path: Path) -> None:
    source = opened(tmp_path, random_tensor(np.random.default_rng(), "w", GgufType.Q8_0, (8192, 1024)))
    tracemalloc.start()
    part = source.read("w", slice(100, 612))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert part.nbytes == 512 * 1024 * 4
    assert peak < part.nbytes * 1.5 + (1 << 20)


@pytest.mark.parametrize("path", [default_model_path, gemma_path], ids=["smollm2", "gemma"])
def test_the_real_models_equal_the_reference(path: Callable[[], Path]) -> None:
    """Some rows of every type of tensor that they have."""
    file = GgufFile(path())
    source = gguf_source.GgufSource(file.path)
    assert source.names() == set(file.tensors)
    for tensor in {tensor.type: tensor for tensor in file.tensors.values()}.values():
        count = min(tensor.rows, 50)
        part = source.read(tensor.name, slice(0, count if len(tensor.shape) > 1 else None)).numpy()
        reference = gguf.dequantize(file.raw(tensor.name, 0, count), gguf.GGMLQuantizationType(tensor.type))
        assert np.array_equal(part, reference.reshape(part.shape)), tensor.name
        assert np.isfinite(part).all()
        assert part.any()
