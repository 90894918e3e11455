"""What a rank computes on: the processor, or the GPU with the rank's own number. Called once by ``loop``."""

import logging

import torch

from shoal import logs
from shoal.config import Settings
from shoal.cuda_ext import binding, cuda_binding
from shoal.cuda_ext.cuda_binding import CudaError, CudaLibrary
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.errors import StartError

_LOG = logging.getLogger(__name__)
_MOST_RANKS = 8
"""As shoal_cuda.h has it."""


def choose_device(settings: Settings, rank: int) -> CudaDevice | None:
    """None: the processor. Raises StartError where ``--device cuda`` cannot be had; ``auto`` then takes the processor,
    and never takes the emulation."""
    if settings.device == "cpu":
        return None
    library = None
    try:
        library = cuda_binding.library()
        missing = _what_is_missing(library, settings.tp)
    except StartError as error:
        missing = str(error)
    if settings.device == "cuda":
        if library is None or missing:
            raise StartError(f"--device cuda: {missing}, or take --device cpu")
        return _open(library, settings, rank)
    if library is None or library.is_emulated or missing:
        logs.event(_LOG, "no_gpu", reason=missing or "the CUDA library is an emulation")
        return None
    return _open(library, settings, rank)


def _what_is_missing(library: CudaLibrary | None, tp: int) -> str:
    """And what to do about it; empty where nothing is."""
    if library is None:
        return (
            f"there is no CUDA library at {cuda_binding.library_path()}: build it where nvcc is (`python setup.py "
            "build_ext --inplace`)"
        )
    if not library.is_emulated and not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA: `pip install 'shoal[gpu]'`"
    count = library.count_devices()
    if count == 0:
        return f"no GPU is seen ({library.error}): look at the driver and at CUDA_VISIBLE_DEVICES"
    if tp > _MOST_RANKS:
        return f"--tp {tp}: GPUs of one host, at most {_MOST_RANKS}"
    if count < tp:
        return f"--tp {tp} takes a GPU a rank, and {count} are seen: take --tp {count}"
    return ""


def _open(library: CudaLibrary, settings: Settings, rank: int) -> CudaDevice:
    try:
        device = CudaDevice(library, rank, is_deterministic=settings.deterministic)
    except CudaError as error:
        raise StartError(f"--device cuda: GPU {rank} cannot be used ({error}), or take --device cpu") from error
    if not library.is_emulated:
        torch.cuda.set_device(device.torch_device)
    logs.event(
        _LOG,
        "gpu",
        free_bytes=device.free_bytes(),
        total_bytes=device.total_bytes(),
        cublas=device.has_product_library,
    )
    return device


def describe_device(device: CudaDevice | None) -> tuple[str, str]:
    """What a rank computes on and which kernels it takes, as ``messages.RankHello`` tells them."""
    if device is None:
        library = binding.library()
        return "cpu", binding.REFERENCE if library is None else library.level
    return f"cuda {device.name}", device.architecture
