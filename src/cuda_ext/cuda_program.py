"""CUDA operators in the order in which a step runs them: what ``program.Program`` is for the CPU library.

Each operator's argument struct is filled once, when it is added; a run writes what changes from step to step, the
``Count``s and the stream, and is one call into the library for all operators. Nothing waits for the device.
"""

import ctypes

import torch
from torch import Tensor

from shoal.cuda_ext.cuda_binding import OPERATORS, CudaLibrary, pack
from shoal.cuda_ext.program import Count

Field = int | float | Count | Tensor | None


class CudaProgram:
    """Add operators with the functions of ``cuda_ops``, then run them all, any number of times. One thread at a time.

    Tensors are on ``device``: a chip, or the CPU where the library is emulated. is_deterministic: a row's result is the
    same to the bit in every batch, whichever instructions the chip has for many rows.
    """

    def __init__(self, library: CudaLibrary, device: torch.device, *, is_deterministic: bool = False) -> None:
        if library.is_emulated != (device.type == "cpu"):
            raise ValueError(f"a library for {library.targets} does not run on {device}")
        self.device = device
        self.library = library
        self.is_deterministic = is_deterministic
        self._calls = _Calls(library)

    def add(self, operator: str, **fields: Field) -> None:
        """Appends an operator; fields left out are 0 or null."""
        self._calls.add(operator, fields)

    def run(self) -> None:
        """On torch's current stream. Raises what ``CudaLibrary.run`` raises."""
        stream = 0 if self.device.type == "cpu" else torch.cuda.current_stream(self.device).cuda_stream
        self._calls.run(stream)


class _Calls:
    """The operators: their structs, and which words of them are counts or the stream."""

    def __init__(self, library: CudaLibrary) -> None:
        self._library = library
        self._operators: list[str] = []
        self._structs: list[ctypes.Array[ctypes.c_int64]] = []
        self._counts: list[tuple[ctypes.Array[ctypes.c_int64], int, Count]] = []
        self._kept: list[Tensor] = []
        self._stream = 0

    def add(self, operator: str, fields: dict[str, Field]) -> None:
        names = [name.lstrip("*.") for name in OPERATORS[operator].split()]
        fixed = {name: value.value if isinstance(value, Count) else value for name, value in fields.items()}
        packed = pack(operator, fixed)
        words = (ctypes.c_int64 * len(names)).from_buffer_copy(packed)
        self._operators.append(operator)
        self._structs.append(words)
        for place, name in enumerate(names):
            value = fields.get(name)
            if isinstance(value, Count):
                self._counts.append((words, place, value))
            elif isinstance(value, Tensor):
                self._kept.append(value)

    def run(self, stream: int) -> None:
        for words, place, count in self._counts:
            words[place] = count.value
        if stream != self._stream:
            for words in self._structs:
                words[len(words) - 1] = stream
            self._stream = stream
        self._library.run_structs(self._operators, self._structs)
