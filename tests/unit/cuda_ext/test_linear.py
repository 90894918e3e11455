"""The seam that torch's products stand behind for now."""

import pytest
import torch

from shoal.cuda_ext import ops

exact_bf16 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    reason="bfloat16 products are known not to depend on the number of rows on AVX512-BF16 alone",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 9])
@pytest.mark.parametrize("inputs", [40, 1100])
def test_linear(dtype: torch.dtype, rows: int, inputs: int) -> None:
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(23, inputs).to(dtype)
    for bias in (None, torch.randn(23).to(dtype)):
        truth = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        result = ops.linear(x, weight, bias)
        assert result.dtype == dtype
        tolerance = 1e-3 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(result.double(), truth, rtol=1e-2, atol=tolerance)


@exact_bf16
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 33), (576, 960), (1088, 320), (1536, 576), (2048, 96)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_bfloat16_row_does_not_depend_on_the_number_of_rows(inputs: int, outputs: int, threads: int) -> None:
    ops.set_threads(threads)
    x, weight = torch.randn(70, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    whole = ops.linear(x, weight)
    for rows in (1, 2, 3, 5, 8, 17, 33, 64):
        for first in (0, 70 - rows):
            assert torch.equal(ops.linear(x[first : first + rows], weight), whole[first : first + rows])
