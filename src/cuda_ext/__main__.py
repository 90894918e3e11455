"""``python -m shoal.cuda_ext``: what was compiled, and what each operator runs on here."""

import sys

import torch

from shoal.cuda_ext import cuda_binding
from shoal.cuda_ext.binding import OPERATORS, CpuLibrary, library, library_path
from shoal.errors import StartError

WITHOUT_TWIN = {"pack_weight", "pack_quantised", "linear_quantised", "gated_linear"}
"""They serve layouts that only compiled operators read: torch takes plain weights."""
WITHOUT_TILES = {"quantise"}
"""It makes integers of activations."""
WITH_TILES_ALONE = {"gated_linear"}
"""It makes tiles of activations."""


def main() -> int:
    """Returns the exit code."""
    try:
        compiled = library()
        cuda = cuda_binding.library()
    except StartError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    runs_on = [f"{name:<18}{_runs_on(name, compiled)}" for name in OPERATORS]
    lines = [*_built(compiled), *_built_for_cuda(cuda), "", *runs_on]
    if cuda is not None:
        lines += ["", *(f"{name:<18}CUDA: {how}" for name, how in cuda_binding.PICKS.items())]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _built(compiled: CpuLibrary | None) -> list[str]:
    if compiled is None:
        why = "not used (SHOAL_CPU_LEVEL)" if library_path().exists() else "not built (no C++ compiler?)"
        return [f"CPU library: {why}"]
    levels = [
        name if supported else f"{name} (not on this processor)"
        for name, supported in compiled.levels().items()
    ]
    return [f"CPU library: {library_path()}", f"  levels: {', '.join(levels)}"]


def _built_for_cuda(cuda: cuda_binding.CudaLibrary | None) -> list[str]:
    if cuda is None:
        return ["CUDA library: not built (no nvcc?)"]
    chips = [f"{name} ({target})" for name, target in cuda.chips().items()]
    # CUDA 13 needs a driver of version 580 or newer.
    here = ", ".join(chips) if chips else f"none{f' ({cuda.error})' if cuda.error else ''}"
    return [
        f"CUDA library: {cuda_binding.library_path()}",
        f"  compiled for: {cuda.targets}",
        f"  chips here: {here}",
    ]


def _runs_on(operator: str, compiled: CpuLibrary | None) -> str:
    if compiled is not None:
        if compiled.has_tiles and operator in WITHOUT_TILES:
            return f"not used: at {compiled.level} linear takes integer weights"
        if not compiled.has_tiles and operator in WITH_TILES_ALONE:
            return f"not used: {compiled.level} has no tiles"
        return f"compiled, {compiled.level}"
    return "not used" if operator in WITHOUT_TWIN else f"torch {torch.__version__} reference"


if __name__ == "__main__":
    sys.exit(main())
