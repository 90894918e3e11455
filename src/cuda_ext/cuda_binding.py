"""The CUDA library as Python sees it: the fields of each operator's argument struct, and its errors. The same kernels
compiled by g++ (``python setup.py build_ext --library=cuda_emulated``) are loaded the same way and take tensors in
ordinary memory.

``SHOAL_CUDA_LIBRARY`` is the path of a library that was built otherwise from the same sources.
"""

import ctypes
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.errors import StartError

LIBRARY = Path(__file__).with_name("libshoal_cuda.so")
INTERFACE = Path(__file__).parent / "csrc" / "cuda" / "shoal_cuda.h"

OPERATORS = {
    "rms_norm": "*out *x *weight outer inner dim outer_stride inner_stride x_dtype dtype .eps *stream",
    "add_rms_norm": "*out *residual *x *weight rows dim residual_stride x_stride dtype .eps *stream",
    "rope_write_kv": (
        "*q *k *v *cos_sin *positions *k_cache *v_cache *cache_slots *fault *k_scales *v_scales "
        "tokens heads kv_heads dim rotary_dim max_positions blocks block_size "
        "q_token_stride q_head_stride k_token_stride k_head_stride v_token_stride v_head_stride "
        "dtype cache_dtype *stream"
    ),
    "gated_activation": "*out *gate_up rows dim row_stride kind dtype *stream",
    "embed": "*out *ids *table tokens rows dim first_id dtype bits group has_offset .scale *stream",
    "linear": (
        "*out *x *weight *scales *bias rows inputs outputs row_stride weight_stride out_stride "
        "dtype weight_dtype out_dtype is_deterministic *stream"
    ),
    "linear_quantised": (
        "*out *x *panels *bias rows inputs outputs row_stride out_stride bits group has_offset dtype out_dtype "
        "is_deterministic *stream"
    ),
    "pack_quantised": "*panels *codes *scales *offsets rows groups bits group *stream",
    "dequantise": "*out *panels rows columns bits group has_offset dtype *stream",
    "paged_attention": (
        "*out *q *k_cache *v_cache *block_tables *query_starts *context_lens *workspace *fault *k_scales *v_scales "
        "tokens sequences heads kv_heads dim blocks block_size table_width table_stride "
        "q_token_stride q_head_stride window most_tokens most_context workspace_floats "
        "dtype cache_dtype is_deterministic .scale .soft_cap *stream"
    ),
    "draw": "*ids *logits *temperature *top_k *top_p *min_p *uniform rows vocabulary row_stride *stream",
    "feed_tokens": "*token_ids *drawn *sources tokens rows *stream",
    "take_rows": "*out *x *rows count x_rows row_bytes *stream",
    "cap_logits": "*logits rows vocabulary row_stride .cap *stream",
    "adjust_logits": (
        "*logits *bias_starts *bias_ids *biases *seen_starts *seen_ids *seen_counts *repetition *presence *frequency "
        "rows vocabulary row_stride *stream"
    ),
    "mask_logits": "*logits *mask_of *masks rows vocabulary row_stride mask_bytes *stream",
    "score_logits": (
        "*totals *top_ids *top_values *logits *rows *tops count logits_rows vocabulary row_stride width *stream"
    ),
    "pick_logits": "*values *logits *rows *ids count logits_rows vocabulary row_stride *stream",
    "all_reduce": "*x *regions *stop *fault count rank ranks slot_bytes dtype steps *stream",
    "gather_columns": (
        "*out *x *widths *regions *stop *fault rows x_stride out_stride rank ranks slot_bytes *stream"
    ),
}
"""The fields of each operator's struct in csrc/cuda/shoal_cuda.h: ``*`` is a pointer, ``.`` a double, the others are
64-bit integers."""

PICKS = {
    "rms_norm": "a block a row, eight elements a thread up to 8192",
    "add_rms_norm": "a block a row, eight elements a thread up to 8192",
    "rope_write_kv": "eight pairs of a head a thread",
    "gated_activation": "eight elements a thread",
    "embed": "eight elements a thread, one from quantised tables",
    "linear": (
        "mma.m16n8k16, blocks that walk panels of 16 outputs: up to 8 rows of 2 million plain weights, 16 of fp8; else "
        "cuBLAS, of fp8 from 65 rows on; without it wgmma on sm_90a; deterministic and elsewhere mma, 256 × 64 a block"
    ),
    "linear_quantised": "as linear of fp8; codes to 16-bit floats in registers, scales on a group's sum",
    "pack_quantised": "a block a tile of 16 × 64",
    "dequantise": "a warp four tiles of 16 × 64",
    "paged_attention": (
        "mma.m16n8k16, heads of up to 64, 128, 256; chunks: 128 or 64 rows a block (32 or 16 for 256), on sm_90a "
        "with wgmma, unless deterministic; single tokens: a block each 256 positions, a warp each 32"
    ),
    "draw": "a cluster of eight blocks a row (sm_90), else a block; radix selection, nothing is sorted",
    "feed_tokens": "a thread a token",
    "take_rows": "sixteen bytes a thread",
    "cap_logits": "a thread a logit",
    "adjust_logits": "a block a row",
    "mask_logits": "a thread a logit",
    "score_logits": "a cluster of eight blocks a row (sm_90), else a block",
    "pick_logits": "a thread a row",
    "all_reduce": "over peer memory, up to 8 ranks of one host: one step, or two where there is much to add",
    "gather_columns": "one step over peer memory, a block a row",
}
"""How each operator is shared out, for ``python -m shoal.cuda_ext``."""

_NO_MEMORY = 4
_NOT_SUPPORTED = 7
_LAUNCH_FAILED = 8
_ERRORS = {
    _NO_MEMORY: "the operator's workspace is too small",
    _NOT_SUPPORTED: "there is no CUDA kernel for these sizes or types",
    _LAUNCH_FAILED: "a kernel did not start",
}

Value = int | float | Tensor | None


class CudaError(RuntimeError):
    """The device failed, in the driver's words. What is on it is lost: the process is to end."""


Call = tuple[str, dict[str, Value]]
"""An operator and its struct's fields; those left out are 0 or null."""


class CudaLibrary:
    """The loaded library and its operators."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._functions = ctypes.CDLL(str(path))
        self._functions.shoal_targets.restype = ctypes.c_char_p
        self._functions.shoal_error.restype = ctypes.c_char_p
        self._functions.shoal_interface.restype = ctypes.c_uint32
        if self._functions.shoal_interface() != zlib.crc32(INTERFACE.read_bytes()):
            raise StartError(f"{path} was built from older sources; run `python setup.py build_ext --inplace`")
        self._addresses = {name: self._address(f"shoal_{name}") for name in OPERATORS}

    def _address(self, name: str) -> int:
        address = ctypes.cast(getattr(self._functions, name), ctypes.c_void_p).value
        assert address is not None
        return address

    @property
    def targets(self) -> str:
        """The chips that the kernels were compiled for, as nvcc names them, or ``emulation``."""
        name: bytes = self._functions.shoal_targets()
        return name.decode()

    @property
    def is_emulated(self) -> bool:
        return self.targets == "emulation"

    def chips(self) -> dict[str, str]:
        """Those of this machine, and their targets: ``{"NVIDIA H100 …": "sm_90"}``."""
        found: dict[str, str] = {}
        name = ctypes.create_string_buffer(256)
        while capability := self._functions.shoal_chip(len(found), name, len(name)):
            found[f"{len(found)}: {name.value.decode()}"] = f"sm_{capability}"
        return found

    def count_devices(self) -> int:
        """That this process may use."""
        return len(self.chips())

    def do(self, function: str, *arguments: Any) -> None:
        """Calls a function of csrc/cuda/device.cu. Raises CudaError, or MemoryError where the device has not enough."""
        status = getattr(self._functions, f"shoal_{function}")(*arguments)
        if status == _NO_MEMORY:
            raise MemoryError(self.error)
        if status:
            raise CudaError(self.error)

    def ask(self, function: str) -> int:
        """A number that the library tells."""
        return int(getattr(self._functions, f"shoal_{function}")())

    def make(self, function: str, *arguments: Any, size: int | None = None) -> ctypes.c_void_p:
        """The same, of those that give a pointer: to memory of ``size`` bytes, or after the arguments."""
        made = ctypes.c_void_p()
        sizes = () if size is None else (ctypes.c_int64(size),)
        self.do(function, *arguments, ctypes.byref(made), *sizes)
        return made

    def give_back(self, function: str, made: ctypes.c_void_p) -> None:
        """Frees what ``make`` made. A device that has failed has nothing to free, and says so: nobody wants to know."""
        getattr(self._functions, f"shoal_{function}")(made)

    @property
    def error(self) -> str:
        """Of the last launch that failed."""
        text: bytes = self._functions.shoal_error()
        return text.decode()

    def call(self, operator: str, **fields: Value) -> None:
        """Starts one operator."""
        self.run([(operator, fields)])

    def run(self, calls: Sequence[Call], *, together: bool = False) -> None:
        """Starts the operators in order. together: emulated kernels that wait for each other take turns.

        Raises NotImplementedError, MemoryError, or CudaError."""
        packed = [ctypes.create_string_buffer(pack(operator, fields)) for operator, fields in calls]
        self.run_structs([operator for operator, _ in calls], packed, together=together)

    def run_structs(
        self, operators: Sequence[str], structs: Sequence[ctypes.Array[Any]], *, together: bool = False
    ) -> None:
        """As ``run``, of structs that are filled already."""
        words = (ctypes.c_void_p * (2 * len(operators)))()
        for i, (operator, packed) in enumerate(zip(operators, structs, strict=True)):
            words[2 * i] = self._addresses[operator]
            words[2 * i + 1] = ctypes.addressof(packed)
        function = self._functions.shoal_run_together if together else self._functions.shoal_run
        status = function(words, ctypes.c_int64(len(operators)))
        if status:
            self._raise(operators[status >> 8], status & 0xFF)

    def _raise(self, operator: str, status: int) -> None:
        if status == _LAUNCH_FAILED:
            raise CudaError(self.error)
        kinds = {_NO_MEMORY: MemoryError, _NOT_SUPPORTED: NotImplementedError}
        raise kinds.get(status, RuntimeError)(f"{operator}: {_ERRORS.get(status, f'status {status}')}")


def pack(operator: str, fields: dict[str, Value]) -> bytes:
    """The struct. A bytes object of its size; tensors become their addresses."""
    names = OPERATORS[operator].split()
    unknown = fields.keys() - {name.lstrip("*.") for name in names}
    if unknown:
        raise ValueError(f"{operator} has no field {', '.join(sorted(unknown))}")
    packed = bytearray()
    for name in names:
        value = fields.get(name.lstrip("*."))
        if isinstance(value, Tensor):
            value = value.data_ptr()
        packed += struct.pack("=d" if name[0] == "." else "=q", value or 0)
    return bytes(packed)


def library_path() -> Path:
    return Path(os.environ.get("SHOAL_CUDA_LIBRARY") or LIBRARY)


def library() -> CudaLibrary | None:
    """None where it was not built."""
    path = library_path()
    if not path.exists():
        return None
    try:
        return CudaLibrary(path)
    except (OSError, AttributeError) as error:
        raise StartError(f"{error}; run `python setup.py build_ext --inplace` or reinstall") from error
