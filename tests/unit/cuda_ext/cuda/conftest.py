"""The CUDA kernels as g++ compiles them, or on the chip where ``SHOAL_CUDA_LIBRARY`` names a library for it."""

import pytest
import torch
from on_chip import OnChip, library_path, need_emulation

from shoal.cuda_ext.cuda_binding import CudaLibrary


@pytest.fixture(scope="session")
def cuda() -> CudaLibrary:
    library = CudaLibrary(library_path())
    return library if library.is_emulated else OnChip(library.path, torch.device("cuda"))


@pytest.fixture(params=["80", "90", "90:1"])
def chip(cuda: CudaLibrary, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that is emulated, where kernels differ; 90:1 has one processor, so that small matrices fill it."""
    if cuda.is_emulated:
        monkeypatch.setenv("SHOAL_EMULATED_CHIP", request.param)
    elif request.param != "80":
        pytest.skip("the chip that is here is itself")


@pytest.fixture
def emulation(cuda: CudaLibrary) -> CudaLibrary:
    """For what only the emulation does."""
    need_emulation()
    return cuda
