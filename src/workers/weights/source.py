"""Where a rank gets the tensors of a checkpoint from: one protocol, one implementation a file format.

The loader (``workers/architectures.py`` and ``workers/decoder.py``) asks for the rows and columns of its shard;
no more than those are ever held. Names and shapes are those of the file.
"""

from typing import Literal, Protocol

from torch import Tensor

from shoal.checkpoint import ModelLocation, fp8_scheme_of
from shoal.cuda_ext.fp8 import Fp8, Fp8Rows
from shoal.cuda_ext.quantised import QuantisedGroups, WeightFormat
from shoal.workers.weights.fp8 import Fp8Source
from shoal.workers.weights.gguf import GgufSource
from shoal.workers.weights.safetensors import SafetensorsSource


class WeightSource(Protocol):
    """The tensors of a checkpoint, read a piece at a time."""

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def nbytes(self, name: str) -> int:
        """Its size in the file, for the progress of loading."""
        ...

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The tensor or a part of it, contiguous and in memory of its own: float32, float16 or bfloat16.

        Slices are plain (no step); ``columns`` goes with two dimensions only. A missing or unusable tensor is a
        ModelError.
        """
        ...

    def format_of(self, name: str, columns: slice | None = None) -> WeightFormat | Fp8 | None:
        """How ``read_groups`` or ``read_fp8`` gives a matrix; None where it is of other floats, or the columns cut a
        group."""
        ...

    def read_groups(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> QuantisedGroups:
        """A matrix or a part of it, as the integers that the file holds."""
        ...

    def read_fp8(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Fp8Rows:
        """A matrix or a part of it, as the fp8 that the file holds."""
        ...

    def cache_scale(self, attention: str, which: Literal["k", "v"], kv_heads: int) -> Tensor | None:
        """What an fp8 cache's keys or values of a layer are to be multiplied with: float32 [kv_heads]; None where the
        file does not say. attention: the prefix of the layer's projections."""
        ...


def open_source(location: ModelLocation) -> WeightSource:
    """The weights of a located model; they stay open as long as the source lives."""
    if location.kind == "gguf":
        return GgufSource(location.path)
    file, scheme = SafetensorsSource(location.path), fp8_scheme_of(location.path)
    return file if scheme is None else Fp8Source(file, scheme)
