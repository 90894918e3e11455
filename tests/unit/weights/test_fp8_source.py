"""fp8 weights out of small random files in every format, and files that are not to be believed."""

import json
import random
from pathlib import Path

import pytest
import torch
from fp8_checkpoints import E4M3, FORMATS, Format, Tensors, per_channel, per_tensor
from safetensors.torch import save_file
from torch import Tensor

from shoal.checkpoint import ModelLocation
from shoal.errors import ModelError
from shoal.workers.weights.source import WeightSource, open_source

SEED = random.randrange(1 << 30)
NAME = "layer.self_attn.k_proj.weight"
SHAPE = (50, 70)


def opened(folder: Path) -> WeightSource:
    return open_source(ModelLocation(path=folder, kind="folder", default_name="tiny"))


def random_weight() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_parts_of_a_weight_are_what_codes_and_scales_mean(form: Format, tmp_path: Path) -> None:
    plain = {NAME: random_weight(), "norm.weight": torch.ones(3)}
    expected = form.write(tmp_path, {}, plain, {"layer.self_attn.k_proj.input_scale": torch.ones(1)})
    source = opened(tmp_path)
    assert source.names() == plain.keys()
    assert source.shape(NAME) == SHAPE
    assert source.nbytes(NAME) == 50 * 70
    assert torch.equal(source.read("norm.weight"), torch.ones(3))
    assert source.format_of(NAME) == (None if form.block[0] else "fp8")
    assert source.format_of("norm.weight") is None
    for rows, columns in (
        (None, None),
        (slice(17, 49), None),
        (slice(3, 4), slice(31, 66)),
        (None, slice(0, 70)),
    ):
        part = expected[NAME][rows or slice(None), columns or slice(None)]
        assert torch.equal(source.read(NAME, rows, columns), part)
        if not form.block[0]:
            fp8 = source.read_fp8(NAME, rows, columns)
            assert fp8.codes.dtype == E4M3
            assert fp8.scales.shape == (len(part),)
            assert torch.equal(fp8.codes.float() * fp8.scales[:, None], part)


def test_plain_folders_have_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({NAME: random_weight()}, tmp_path / "model.safetensors")
    source = opened(tmp_path)
    assert source.format_of(NAME) is None
    assert source.cache_scale("layer.self_attn", "k", 3) is None
    with pytest.raises(ModelError, match="has no scales beside it"):
        source.read_fp8(NAME)


def written(folder: Path, tensors: Tensors, form: str = "compressed per channel") -> WeightSource:
    (folder / "config.json").write_text(json.dumps({"quantization_config": FORMATS[form].quantization}))
    save_file(tensors, folder / "model.safetensors")
    return opened(folder)


def test_scales_of_the_cache_are_one_for_all_heads_or_one_each(tmp_path: Path) -> None:
    weight = per_tensor(random_weight())
    whole: Tensors = {NAME: weight.codes, NAME + "_scale": weight.scales}
    whole |= {
        "layer.self_attn.k_scale": torch.tensor(0.25),
        "layer.self_attn.v_scale": torch.tensor([1.0, 2, 3]),
    }
    source = written(tmp_path, whole)
    assert source.names() == {NAME}
    assert source.cache_scale("layer.self_attn", "k", 3).tolist() == [0.25] * 3
    assert source.cache_scale("layer.self_attn", "v", 3).tolist() == [1, 2, 3]
    assert source.cache_scale("other.self_attn", "v", 3) is None
    with pytest.raises(ModelError, match="v_scale' has 3 scales, not one or one for each of 4 KV heads"):
        source.cache_scale("layer.self_attn", "v", 4)


@pytest.mark.parametrize("name", ["k_proj.k_scale", "k_proj.output_scale"])
def test_scales_of_the_cache_under_older_names(name: str, tmp_path: Path) -> None:
    weight = per_tensor(random_weight())
    source = written(
        tmp_path,
        {
            NAME: weight.codes,
            NAME + "_scale": weight.scales,
            f"layer.self_attn.{name}": torch.tensor([0.5]).bfloat16(),
        },
    )
    assert source.names() == {NAME}
    assert source.cache_scale("layer.self_attn", "k", 2).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_of_the_cache_that_are_no_positive_numbers(scale: float, tmp_path: Path) -> None:
    weight = per_tensor(random_weight())
    tensors: Tensors = {NAME: weight.codes, NAME + "_scale": weight.scales}
    source = written(tmp_path, tensors | {"layer.self_attn.k_scale": torch.tensor(scale)})
    with pytest.raises(ModelError, match=r"k_scale' has scales that are no positive numbers: download"):
        source.cache_scale("layer.self_attn", "k", 2)


CODES, SCALES = per_channel(torch.randn(SHAPE)).codes, torch.ones(50, 1)
AT_OPENING: dict[str, tuple[Tensors, str]] = {
    "no scales": ({NAME: CODES}, f"{NAME}' is fp8 and has no '{NAME}_scale'"),
    "other rows": (
        {NAME: CODES, NAME + "_scale": torch.ones(49)},
        r"has the shape \(49,\), which does not fit",
    ),
    "blocks": ({NAME: CODES, NAME + "_scale": torch.ones(4, 3)}, r"has the shape \(4, 3\), which does not fit"),
    "a vector": ({NAME: CODES[0].clone(), NAME + "_scale": SCALES}, r"the shape \(70,\), not two dimensions"),
}
AT_READING: dict[str, tuple[Tensors, str]] = {
    "codes that are no numbers": (
        {NAME: torch.full(SHAPE, torch.nan).to(E4M3), NAME + "_scale": SCALES},
        "elements",
    ),
    "scales that are none": ({NAME: CODES, NAME + "_scale": SCALES * torch.nan}, "scales that are no numbers"),
    "endless scales": ({NAME: CODES, NAME + "_scale": SCALES * torch.inf}, "scales that are no numbers"),
    "negative scales": ({NAME: CODES, NAME + "_scale": -SCALES}, "scales that are no numbers"),
    "scales of integers": ({NAME: CODES, NAME + "_scale": SCALES.to(torch.int32)}, "is I32, not supported"),
    "another fp8": ({NAME: torch.zeros(SHAPE).to(torch.float8_e5m2)}, "is F8_E5M2, not supported"),
}


@pytest.mark.parametrize("case", AT_OPENING)
def test_files_that_cannot_be_meant(case: str, tmp_path: Path) -> None:
    tensors, said = AT_OPENING[case]
    with pytest.raises(ModelError, match=said):
        written(tmp_path, tensors)


@pytest.mark.parametrize("case", AT_READING)
@pytest.mark.parametrize("blocks", [False, True])
def test_tensors_that_cannot_be_meant(case: str, blocks: bool, tmp_path: Path) -> None:
    tensors, said = AT_READING[case]
    if blocks and NAME + "_scale" in tensors:
        tensors = {NAME: tensors[NAME], NAME + "_scale": tensors[NAME + "_scale"][:4].expand(4, 3).contiguous()}
    source = written(tmp_path, tensors, "compressed in blocks")
    with pytest.raises(ModelError, match=said):
        source.read(NAME)


def test_fp8_that_the_configuration_does_not_know_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({NAME: CODES, NAME + "_scale": SCALES}, tmp_path / "model.safetensors")
    source = opened(tmp_path)
    assert NAME + "_scale" in source.names()
    with pytest.raises(ModelError, match="is F8_E4M3, not supported"):
        source.read(NAME)
