"""``python -m shoal.cuda_ext``: what was compiled, and what each operator runs on here."""

import sys

import torch

from shoal.cuda_ext.binding import LIBRARY, OPERATORS, library


def main() -> None:
    compiled = library()
    sys.stdout.write("\n".join([*_built(), "", *_operators(compiled.level if compiled else "")]) + "\n")


def _built() -> list[str]:
    compiled = library()
    if compiled is None:
        why = "not used (SHOAL_CPU_LEVEL)" if LIBRARY.exists() else "not built (no C++ compiler was found)"
        return [f"CPU library: {why}", "CUDA library: not built"]
    levels = [
        name if supported else f"{name} (not on this processor)"
        for name, supported in compiled.levels().items()
    ]
    return [f"CPU library: {LIBRARY}", f"  levels: {', '.join(levels)}", "CUDA library: not built"]


def _operators(level: str) -> list[str]:
    runs_on = f"compiled, {level}" if level else f"torch {torch.__version__} reference"
    return [f"{name:<18}{runs_on}" for name in OPERATORS]


if __name__ == "__main__":
    main()
