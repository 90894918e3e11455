"""``python -m shoal.cuda_ext``: what was compiled, and what each operator runs on here."""

import sys

import torch

from shoal.cuda_ext.binding import OPERATORS, CpuLibrary, library, library_path
from shoal.errors import StartError

WITHOUT_TWIN = {"pack_weight", "pack_quantised", "linear_quantised"}
"""They serve layouts that only compiled operators read: torch takes plain weights."""


def main() -> int:
    """Returns the exit code."""
    try:
        compiled = library()
    except StartError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    lines = [*_built(compiled), "", *(f"{name:<18}{_runs_on(name, compiled)}" for name in OPERATORS)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _built(compiled: CpuLibrary | None) -> list[str]:
    if compiled is None:
        why = "not used (SHOAL_CPU_LEVEL)" if library_path().exists() else "not built (no C++ compiler?)"
        return [f"CPU library: {why}", "CUDA library: not built"]
    levels = [
        name if supported else f"{name} (not on this processor)"
        for name, supported in compiled.levels().items()
    ]
    return [f"CPU library: {library_path()}", f"  levels: {', '.join(levels)}", "CUDA library: not built"]


def _runs_on(operator: str, compiled: CpuLibrary | None) -> str:
    if compiled is not None:
        return f"compiled, {compiled.level}"
    return "not used" if operator in WITHOUT_TWIN else f"torch {torch.__version__} reference"


if __name__ == "__main__":
    sys.exit(main())
