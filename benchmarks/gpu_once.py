"""Starts every operator once on small data: what compute-sanitizer watches. Called by ``gpu_check.py``.

SHOAL_CUDA_LIBRARY=… python benchmarks/gpu_once.py
"""

import sys
from pathlib import Path

import torch

from shoal.cuda_ext.cuda_binding import CudaLibrary, library_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import cuda_calls
from on_chip import OnChip


def main() -> int:
    """Those that wait for other ranks are left out: a sanitizer runs one kernel after the other."""
    library = CudaLibrary(library_path())
    if not library.is_emulated:
        library = OnChip(library.path, torch.device("cuda"))
    for operator, example in cuda_calls.EXAMPLES.items():
        if operator not in cuda_calls.TOGETHER:
            library.run(example(torch.Generator().manual_seed(1)))
            print(operator, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
