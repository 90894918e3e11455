"""The CUDA kernels as g++ compiles them, or on the chip where ``SHOAL_CUDA_LIBRARY`` names a library for it."""

import os
from pathlib import Path

import emulated
import pytest
import torch
from on_chip import OnChip

from shoal.cuda_ext.cuda_binding import CudaLibrary


@pytest.fixture(scope="session")
def cuda() -> CudaLibrary:
    named = os.environ.get("SHOAL_CUDA_LIBRARY")
    library = CudaLibrary(Path(named) if named else emulated.build())
    return library if library.is_emulated else OnChip(library.path, torch.device("cuda"))


@pytest.fixture(params=[80, 90])
def chip(cuda: CudaLibrary, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """For what differs between chips: the compute capability of each that is emulated, or of the one that is here."""
    if cuda.is_emulated:
        monkeypatch.setenv("SHOAL_EMULATED_CHIP", str(request.param))
        return int(request.param)
    if request.param != 80:
        pytest.skip("the chip that is here is itself")
    return int(next(iter(cuda.chips().values())).removeprefix("sm_"))


@pytest.fixture
def emulation(cuda: CudaLibrary) -> CudaLibrary:
    """For what only the emulation does."""
    if not cuda.is_emulated:
        pytest.skip("this is about the emulation")
    return cuda
