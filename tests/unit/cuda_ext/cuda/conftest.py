"""The CUDA kernels as g++ compiles them."""

import os
from pathlib import Path

import emulated
import pytest

from shoal.cuda_ext.cuda_binding import CudaLibrary


@pytest.fixture(scope="session")
def cuda() -> CudaLibrary:
    named = os.environ.get("SHOAL_CUDA_LIBRARY")
    return CudaLibrary(Path(named) if named else emulated.build())
