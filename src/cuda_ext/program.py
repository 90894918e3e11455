"""Operators in the order in which a step runs them. Made by ``ops``, run by the decoder and the sampler.

Where the library was built, each operator's argument struct is filled once, when it is added, and a run is one call
into the library for all of them: nothing is allocated, parsed or checked again. Where it was not, a run calls the
operators' torch twins. What changes from step to step is only how many rows of its buffers an operator takes: a
``Count``.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from shoal.cuda_ext.binding import OPERATORS, CpuLibrary, library

Twin = Callable[[], None]


class Count:
    """A number of rows that is set before each run; at most ``most``, the rows that the buffers have."""

    __slots__ = ("most", "value")

    def __init__(self, most: int) -> None:
        self.most = most
        self.value = most

    def set(self, value: int) -> None:
        """Raises ValueError where the buffers are too small."""
        if not 0 <= value <= self.most:
            raise ValueError(f"{value} rows do not fit buffers of {self.most}")
        self.value = value


class Scaled(Count):
    """So many elements as some rows of ``columns`` have."""

    __slots__ = ("_columns", "_rows")

    def __init__(self, rows: Count, columns: int) -> None:
        self._rows, self._columns = rows, columns

    @property
    def most(self) -> int:  # type: ignore[override]
        return self._rows.most * self._columns

    @property
    def value(self) -> int:  # type: ignore[override]
        return self._rows.value * self._columns


Value = int | float | Count | Tensor | None
"""A field of an argument struct: a size, a number, a count, or a tensor (None: a null pointer)."""


class Program:
    """Add operators with the functions of ``ops``, then run them all, any number of times. One thread at a time."""

    def __init__(self) -> None:
        compiled = library()
        self._steps: list[_CompiledCalls | _Twins] = []
        self._compiled = compiled

    def add(self, operator: str, values: Sequence[Value], twin: Twin) -> None:
        """Appends an operator; ``values`` are the fields of its struct, in their order."""
        if self._compiled is None:
            self.add_function(twin)
            return
        last = self._steps[-1] if self._steps else None
        if not isinstance(last, _CompiledCalls):
            last = _CompiledCalls(self._compiled)
            self._steps.append(last)
        last.add(operator, values)

    def add_function(self, function: Twin) -> None:
        """Appends a Python function, which runs between the operators before and after it."""
        last = self._steps[-1] if self._steps else None
        if not isinstance(last, _Twins):
            last = _Twins()
            self._steps.append(last)
        last.functions.append(function)

    def run(self) -> None:
        """Raises IndexError where an operator met an index outside of its tensors, MemoryError where it had no memory,
        PeerLost where another rank is gone: the operators after it have not run then."""
        for step in self._steps:
            step.run()


def no_twin() -> None:
    """Of operators on what only exists where the library was built: packed and quantised weights."""
    raise NotImplementedError("this operator needs the compiled library")


class _Twins:
    def __init__(self) -> None:
        self.functions: list[Twin] = []

    def run(self) -> None:
        for function in self.functions:
            function()


class _CompiledCalls:
    """Consecutive operators of the library: their structs lie in one array of 64-bit words."""

    def __init__(self, compiled: CpuLibrary) -> None:
        self._library = compiled
        self._packed = bytearray()
        self._functions: list[int] = []
        self._starts: list[int] = []
        self._counts: dict[Count, list[int]] = {}
        self._kept: list[Tensor] = []
        self._words: np.ndarray | None = None
        self._calls = np.zeros(0, np.uint64)
        self._patches: list[tuple[Count, np.ndarray]] = []
        self._written: list[int] = []

    def add(self, operator: str, values: Sequence[Value]) -> None:
        fields = OPERATORS[operator].split()
        if len(values) != len(fields):
            raise ValueError(f"{operator} has {len(fields)} fields, not {len(values)}")
        self._functions.append(self._library.address_of(operator))
        self._starts.append(len(self._packed) // 8)
        for field, value in zip(fields, values, strict=True):
            if isinstance(value, Count):
                self._counts.setdefault(value, []).append(len(self._packed) // 8)
                value = value.value
            elif value is None:
                value = 0
            elif isinstance(value, Tensor):
                self._kept.append(value)
                value = value.data_ptr()
            self._packed += struct.pack("=d" if field[0] == "." else "=q", value)
        self._words = None

    def run(self) -> None:
        words = self._words
        if words is None:
            words = self._lay_out()
        for place, (count, positions) in enumerate(self._patches):
            if self._written[place] != count.value:
                words[positions] = self._written[place] = count.value
        self._library.run(self._calls_pointer, len(self._functions))

    def _lay_out(self) -> np.ndarray:
        words = np.frombuffer(self._packed, np.int64).copy()
        address = words.ctypes.data
        self._calls = np.array(
            [word for function, start in zip(self._functions, self._starts, strict=True)
             for word in (function, address + 8 * start)],
            np.uint64,
        )  # fmt: skip
        self._calls_pointer = ctypes.c_void_p(self._calls.ctypes.data)
        self._patches = [(count, np.array(at)) for count, at in self._counts.items()]
        self._written = [-1] * len(self._patches)
        self._words = words
        return words
