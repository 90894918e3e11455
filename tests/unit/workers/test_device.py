"""What ``--device`` comes to, and what is said where it cannot be had."""

from pathlib import Path

import emulated
import pytest
import torch

from shoal.config import Settings
from shoal.cuda_ext import binding, cuda_binding
from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.errors import StartError
from shoal.workers.device import choose_device, describe_device


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Path:
    path = emulated.build()
    monkeypatch.setenv("SHOAL_CUDA_LIBRARY", str(path))
    return path


def choose(device: str, tp: int = 1, rank: int = 0) -> CudaDevice | None:
    return choose_device(Settings(model="m", model_name="m", run_dir="/r", device=device, tp=tp), rank)  # type: ignore[arg-type]


def refusal(tp: int = 1, rank: int = 0) -> str:
    with pytest.raises(StartError) as caught:
        choose("cuda", tp, rank)
    return str(caught.value)


@pytest.mark.usefixtures("emulation")
def test_the_emulation_is_only_taken_where_it_is_asked_for() -> None:
    assert choose("cpu") is None
    assert choose("auto") is None
    device = choose("cuda")
    assert device is not None
    assert device.library.is_emulated


@pytest.mark.usefixtures("emulation")
def test_what_a_rank_computes_on_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_device(choose("cuda")) == ("cuda 0: emulated chip", "sm_80")
    compiled = binding.library()
    assert describe_device(None) == ("cpu", "reference" if compiled is None else compiled.level)
    monkeypatch.setattr(binding, "library", lambda: None)
    assert describe_device(None) == ("cpu", "reference")


@pytest.mark.usefixtures("emulation")
def test_each_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tp=2) == (
        "--device cuda: --tp 2 takes a GPU a rank, and 1 are seen: take --tp 1, or take --device cpu"
    )
    monkeypatch.setenv("SHOAL_EMULATED_DEVICES", "2")
    device = choose("cuda", tp=2, rank=1)
    assert device is not None
    assert device.index == 1


@pytest.mark.usefixtures("emulation")
def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EMULATED_DEVICES", "0")
    assert refusal().startswith(
        "--device cuda: no GPU is seen (cudaGetDeviceProperties: invalid device ordinal)"
    )


def test_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_CUDA_LIBRARY", str(tmp_path / "missing.so"))
    assert choose("auto") is None
    assert "build it where nvcc is" in refusal()


@pytest.mark.usefixtures("emulation")
def test_a_library_of_other_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = tmp_path / "shoal_cuda.h"
    changed.write_text("")
    monkeypatch.setattr(cuda_binding, "INTERFACE", changed)
    assert choose("auto") is None
    assert "was built from older sources; run `python setup.py build_ext --inplace`" in refusal()


@pytest.mark.usefixtures("emulation")
def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaLibrary, "is_emulated", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "`pip install 'shoal[gpu]'`" in refusal()
    assert choose("auto") is None


@pytest.mark.usefixtures("emulation")
def test_auto_takes_a_chip_that_all_of_it_is_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cuda_binding.library()
    assert library is not None
    monkeypatch.setattr(cuda_binding, "library", lambda: library)
    monkeypatch.setattr(CudaLibrary, "is_emulated", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    device = choose("auto")
    assert device is not None
    assert device.torch_device == torch.device("cuda", 0)
    assert choose("auto", tp=2) is None
