from pathlib import Path

import pytest
import torch

from shoal.workers.dtype import resolve_dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512_vnni", torch.float32),
        ("fpu avx512f avx512_bf16", torch.bfloat16),
        ("fpu amx_bf16 amx_tile", torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_multiplies_it(
    tmp_path: Path, flags: str, expected: torch.dtype
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    assert resolve_dtype("auto", cpuinfo) == expected
    assert resolve_dtype("bfloat16", cpuinfo) == torch.bfloat16
    assert resolve_dtype("float32", cpuinfo) == torch.float32


def test_auto_is_float32_where_nothing_is_known(tmp_path: Path) -> None:
    assert resolve_dtype("auto", tmp_path / "missing") == torch.float32
