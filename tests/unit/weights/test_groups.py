"""GGUF's blocks as groups of integers: they stand for the same weights as the blocks dequantised."""

import numpy as np
import pytest
import torch

from shoal.checkpoint.gguf import BLOCK_SIZES, GgufType
from shoal.cuda_ext.quantised import QuantisedGroups
from shoal.workers.weights.dequantise import dequantise
from shoal.workers.weights.groups import FORMATS, read_blocks

K_TYPES = (GgufType.Q4_K, GgufType.Q5_K, GgufType.Q6_K)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("count", [1, 7, 333])
def test_groups_are_the_dequantised_blocks(kind: GgufType, count: int) -> None:
    elements, size = BLOCK_SIZES[kind]
    blocks = np.random.default_rng().integers(0, 256, (count, size), dtype=np.uint8)
    scale_places = {GgufType.Q6_K: [208], GgufType.Q4_K: [0, 2], GgufType.Q5_K: [0, 2]}.get(kind, [0])
    if FORMATS[kind].has_offset and kind not in K_TYPES:
        scale_places = [0, 2]
    for at in scale_places:  # ordinary scales: a product with a large one leaves half precision
        blocks[:, at : at + 2] = (
            np.random.default_rng().uniform(1e-3, 0.1, (count, 1)).astype(np.float16).view(np.uint8)
        )
    codes, scales, offsets = read_blocks(kind, blocks)
    form = FORMATS[kind]
    assert codes.shape == (count, elements // form.group, form.group)
    assert codes.max() < 1 << form.bits
    as_tensors = [torch.from_numpy(array) for array in (codes, scales)]
    groups = QuantisedGroups(*as_tensors, None if offsets is None else torch.from_numpy(offsets), form.bits)
    assert groups.format == form
    expected = np.empty((count, elements), np.float32)
    dequantise(kind, blocks, expected)
    found = groups.dequantise().numpy()
    if kind in K_TYPES:
        np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max(), rtol=0)
    else:
        assert np.array_equal(found, expected)
