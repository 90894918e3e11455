"""The CPU library as Python sees it: one prefilled argument struct an operator, the levels of instructions it
can run at, and its errors. Called by ``ops.py`` and ``__main__.py``.

``SHOAL_CPU_LEVEL`` chooses a level by its name, as ``python -m shoal.cuda_ext`` lists them, or ``reference`` for the
torch twins. Without it the best one that the processor has is taken. ``SHOAL_CPU_LIBRARY`` is the path of a library
that was built otherwise, with a sanitizer for example, from the same sources.
"""

import ctypes
import logging
import os
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from shoal import logs
from shoal.errors import StartError

_LOG = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libshoal_cpu.so")
INTERFACE = Path(__file__).parent / "csrc" / "cpu" / "shoal_cpu.h"
REFERENCE = "reference"

OPERATORS = {
    "rms_norm": "*out *quantised *x *weight outer inner dim outer_stride inner_stride .eps",
    "add_rms_norm": "*out *quantised *residual *x *weight rows dim residual_stride x_stride .eps",
    "rope_write_kv": (
        "*q *k *v *cos_sin *positions *k_cache *v_cache *cache_slots "
        "tokens heads kv_heads dim rotary_dim max_positions blocks block_size "
        "q_token_stride q_head_stride k_token_stride k_head_stride v_token_stride v_head_stride "
        "cache_dtype"
    ),
    "paged_attention": (
        "*out *q *k_cache *v_cache *block_tables *query_starts *context_lens "
        "tokens sequences heads kv_heads dim blocks block_size table_width table_stride "
        "q_token_stride q_head_stride window cache_dtype .scale .soft_cap"
    ),
    "gated_activation": "*out *quantised *gate_up rows dim row_stride kind",
    "gated_linear": (
        "*out *x *gate *up *gate_bias *up_bias rows inputs outputs row_stride kind bits group has_offset"
    ),
    "pack_weight": "*panels *weight rows words row_stride",
    "linear": "*out *x *panels *bias rows inputs outputs row_stride out_stride dtype bits group has_offset",
    "quantise": "*quantised *x rows inputs row_stride",
    "linear_quantised": "*out *x *panels *bias rows inputs outputs out_stride bits group has_offset",
    "pack_quantised": "*panels *codes *scales *offsets rows groups bits group",
    "embed": "*out *ids *panels tokens rows dim first_id dtype bits group has_offset .scale",
    "take_rows": "*out *x *rows count x_rows row_bytes row_stride",
    "all_reduce": "*x *region *member rows columns",
    "gather_columns": "*out *x *widths *region *member rows",
    "draw": "*ids *logits *temperature *top_k *top_p *min_p *uniform rows vocabulary row_stride",
}
"""The fields of each operator's struct in csrc/cpu/shoal_cpu.h: ``*`` is a pointer, ``.`` a double, the others
are 64-bit integers."""

_REMEDY = f"run `python setup.py build_ext --inplace` or reinstall, or set SHOAL_CPU_LEVEL={REFERENCE}"

_NO_MEMORY = 4
_PEER_LOST = 6
_ERRORS = {
    1: "a position lies outside of the rope table",
    2: "a cache slot lies outside of the cache",
    3: "a block table names a block outside of the cache",
    _NO_MEMORY: "there is no memory for an operator's scratch",
    5: "a sequence has more tokens than its context, or more context than its block table",
    _PEER_LOST: "a tensor-parallel peer is gone or does not answer",
    7: "integer weights were packed for another level, or activations made for one",
}


class PeerLost(Exception):
    """Another rank is gone or does not answer; this crew epoch is over, the weights are still good."""


class CpuLibrary:
    """The loaded library and its operators."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._functions.shoal_level.restype = ctypes.c_char_p
        self._functions.shoal_level_name.restype = ctypes.c_char_p
        self._addresses = {name: self._address(f"shoal_{name}") for name in OPERATORS}
        self._run = self._functions.shoal_run

    def _address(self, name: str) -> int:
        address = ctypes.cast(getattr(self._functions, name), ctypes.c_void_p).value
        assert address is not None
        return address

    def address_of(self, operator: str) -> int:
        """Of an operator's function, as ``run`` takes it."""
        return self._addresses[operator]

    def run(self, calls: ctypes.c_void_p, count: int) -> None:
        """calls: pairs of an operator's address and its struct's. Raises IndexError, MemoryError or PeerLost."""
        status = self._run(calls, ctypes.c_int64(count)) & 0xFF
        if status == _NO_MEMORY:
            raise MemoryError(_ERRORS[status])
        if status == _PEER_LOST:
            raise PeerLost(_ERRORS[status])
        if status:
            raise IndexError(_ERRORS[status])

    @property
    def is_current(self) -> bool:
        """Whether the library was built with today's structs."""
        self._functions.shoal_interface.restype = ctypes.c_uint32
        return bool(self._functions.shoal_interface() == zlib.crc32(INTERFACE.read_bytes()))

    @property
    def level(self) -> str:
        name: bytes = self._functions.shoal_level()
        return name.decode()

    @property
    def has_tiles(self) -> bool:
        """Whether ``linear`` takes integer weights, so that activations stay floats."""
        return bool(self._functions.shoal_has_tiles())

    def pairs_positions(self, dim: int, block_size: int) -> bool:
        """Whether the operators keep a bfloat16 cache of such heads and blocks in pairs (``reference.in_pairs``)."""
        return bool(self._functions.shoal_pairs_positions(ctypes.c_int64(dim), ctypes.c_int64(block_size)))

    def levels(self) -> dict[str, bool]:
        """Every compiled level, best first, and whether this processor has it."""
        found: dict[str, bool] = {}
        while (name := self._functions.shoal_level_name(len(found))) is not None:
            found[name.decode()] = bool(self._functions.shoal_level_supported(len(found)))
        return found

    def use_level(self, name: str) -> bool:
        """False where there is no such level or the processor lacks it."""
        return bool(self._functions.shoal_use_level(name.encode()))

    def set_threads(self, count: int, cpus: Sequence[int] = ()) -> None:
        """cpus: one a thread, where the helpers stay; empty: anywhere."""
        pinned = (ctypes.c_int * count)(*cpus) if len(cpus) == count else None
        self._functions.shoal_set_threads(count, pinned)

    def populate(self, address: int, size: int) -> None:
        """Has the system give ``size`` bytes of memory from a page's ``address`` on, by all threads where they are huge
        pages. Raises MemoryError where it does not (before Linux 5.14, or memory is short)."""
        if self._functions.shoal_populate(ctypes.c_void_p(address), ctypes.c_int64(size)):
            raise MemoryError(f"the system does not give {size} bytes ahead of use")

    def leave_region(self, address: int, ranks: int) -> None:
        """Of a ``SharedRegion``."""
        self._functions.shoal_leave_region(ctypes.c_void_p(address), ctypes.c_int64(ranks))


def library_path() -> Path:
    return Path(os.environ.get("SHOAL_CPU_LIBRARY") or LIBRARY)


@cache
def library() -> CpuLibrary | None:
    """None where the torch twins are to be used."""
    wanted, path = os.environ.get("SHOAL_CPU_LEVEL", ""), library_path()
    if wanted == REFERENCE:
        return None
    if not path.exists():
        _require_none_wanted(wanted, path)
        return None
    try:
        loaded = CpuLibrary(path)
    except (OSError, AttributeError) as error:
        raise StartError(f"{error}; {_REMEDY}") from error
    if not loaded.is_current:
        raise StartError(f"{path} was built from older sources; {_REMEDY}")
    if wanted and not loaded.use_level(wanted):
        usable = [name for name, supported in loaded.levels().items() if supported]
        raise StartError(f"SHOAL_CPU_LEVEL={wanted}: this processor can do {', '.join(usable)}, or {REFERENCE}")
    return loaded


def _require_none_wanted(level: str, path: Path) -> None:
    """Whoever names a library or a level gets that or an error."""
    if path != LIBRARY:
        raise StartError(f"SHOAL_CPU_LIBRARY={path}: there is no such file")
    if level:
        raise StartError(
            f"SHOAL_CPU_LEVEL={level}: the CPU library was not built; install a C++ compiler and reinstall, or unset it"
        )
    logs.event(
        _LOG,
        "no_cpu_library",
        logging.WARNING,
        effect="operators run on torch, slower",
        remedy="install a C++ compiler and reinstall",
    )
