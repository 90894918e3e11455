"""One small call, or a few, of every CUDA operator, as data: run under sanitizers by a program without Python, and by
whoever wants each kernel once."""

import struct
from pathlib import Path

import torch
from torch import Tensor

from shoal.cuda_ext.cuda_binding import Call, pack

BF16 = torch.bfloat16


def _zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def rms_norm(random: torch.Generator, dim: int = 1000) -> list[Call]:
    x = torch.randn(3, dim, generator=random)
    return [
        ("rms_norm", {
            "out": _zeros(3, dim), "x": x, "weight": torch.randn(dim, generator=random), "outer": 3, "inner": 1,
            "dim": dim, "outer_stride": dim, "x_dtype": 0, "dtype": 1, "eps": 1e-5,
        }),
    ]  # fmt: skip


def add_rms_norm(random: torch.Generator) -> list[Call]:
    residual, x = torch.randn(3, 1000, generator=random), torch.randn(3, 1000, generator=random).to(BF16)
    return [
        ("add_rms_norm", {
            "out": _zeros(3, 1000), "residual": residual, "x": x, "weight": torch.randn(1000, generator=random),
            "rows": 3, "dim": 1000, "residual_stride": 1000, "x_stride": 1000, "dtype": 1, "eps": 1e-5,
        }),
    ]  # fmt: skip


def rope_write_kv(random: torch.Generator) -> list[Call]:
    q, k = torch.randn(5, 4, 32, generator=random).to(BF16), torch.randn(5, 2, 32, generator=random).to(BF16)
    return [
        ("rope_write_kv", {
            "q": q, "k": k, "v": k.clone(), "cos_sin": torch.randn(9, 32, generator=random),
            "positions": torch.arange(5, dtype=torch.int32), "k_cache": _zeros(3, 2, 4, 32),
            "v_cache": _zeros(3, 2, 4, 32), "cache_slots": torch.randperm(12, generator=random)[:5],
            "fault": _zeros(1, dtype=torch.int32), "tokens": 5, "heads": 4, "kv_heads": 2, "dim": 32,
            "rotary_dim": 32, "max_positions": 9, "blocks": 3, "block_size": 4, "q_token_stride": 128,
            "q_head_stride": 32, "k_token_stride": 64, "k_head_stride": 32, "v_token_stride": 64,
            "v_head_stride": 32, "dtype": 1, "cache_dtype": 1,
        }),
    ]  # fmt: skip


def gated_activation(random: torch.Generator) -> list[Call]:
    gate_up = torch.randn(3, 2 * 1100, generator=random).to(BF16)
    sizes = {"rows": 3, "dim": 1100, "row_stride": 2200, "dtype": 1}
    return [("gated_activation", {"out": _zeros(3, 1100), "gate_up": gate_up, "kind": 0, **sizes})]


def embed(random: torch.Generator) -> list[Call]:
    table, ids = torch.randn(10, 200, generator=random).to(BF16), torch.randint(0, 12, (6,), generator=random)
    sizes = {"tokens": 6, "rows": 10, "dim": 200, "first_id": 1, "dtype": 1, "scale": 2.0}
    return [("embed", {"out": _zeros(6, 200, dtype=torch.float32), "ids": ids, "table": table, **sizes})]


def linear(random: torch.Generator, is_deterministic: int = 0) -> list[Call]:
    """Few rows, some, and many; of a plain weight and of an fp8 one."""
    x, weight = (
        torch.randn(70, 1408, generator=random).to(BF16),
        torch.randn(35, 1408, generator=random).to(BF16),
    )
    sizes = {"inputs": 1408, "outputs": 35, "row_stride": 1408, "weight_stride": 1408, "out_stride": 35}
    kinds = {"dtype": 1, "out_dtype": 1, "is_deterministic": is_deterministic}
    plain = {"weight": weight, "weight_dtype": 1}
    narrow = {
        "weight": weight.to(torch.float8_e4m3fn),
        "weight_dtype": 4,
        "scales": torch.rand(35, generator=random),
    }
    return [
        ("linear", {"out": _zeros(rows, 35), "rows": rows, "x": x, **sizes, **kinds, **one})
        for rows in (11, 40, 70)
        for one in (plain, narrow)
    ]


def linear_quantised(random: torch.Generator) -> list[Call]:
    """Packed, multiplied with few rows and with many, and made plain."""
    codes = torch.randint(0, 16, (35, 20, 32), generator=random, dtype=torch.uint8)
    scales, offsets = torch.randn(2, 35, 20, generator=random).half().unbind()
    panels, x = _zeros(3, 10, 640, dtype=torch.uint8), torch.randn(70, 640, generator=random).to(BF16)
    form = {"bits": 4, "group": 32}
    packing = {"panels": panels, "codes": codes, "scales": scales, "offsets": offsets, "rows": 35, "groups": 20}
    sizes = {"inputs": 640, "outputs": 35, "row_stride": 640, "out_stride": 35, "dtype": 1, "out_dtype": 1}
    fields = {"x": x, "panels": panels, **sizes, **form, "has_offset": 1}
    plain = {"out": _zeros(35, 640), "panels": panels, "rows": 35, "columns": 640}
    return [
        ("pack_quantised", {**packing, **form}),
        *(("linear_quantised", {"out": _zeros(rows, 35), "rows": rows, **fields}) for rows in (11, 40, 70)),
        ("dequantise", {**plain, **form, "has_offset": 1, "dtype": 1}),
    ]


def paged_attention(
    random: torch.Generator, is_deterministic: int = 0, chunk: int = 40, context: int = 430
) -> list[Call]:
    """A context's last tokens as a chunk, and a single token after 299."""
    tokens = chunk + 1
    q = torch.randn(tokens, 4, 64, generator=random).to(BF16)
    caches = [torch.randn(31, 2, 16, 64, generator=random).to(BF16) for _ in range(2)]
    tables = torch.stack([torch.arange(27), torch.arange(27) + 4]).int()
    workspace = _zeros(2 * 4 * (2 * 66 + 1), dtype=torch.float32)
    return [
        ("paged_attention", {
            "out": _zeros(tokens, 4, 64), "q": q, "k_cache": caches[0], "v_cache": caches[1], "block_tables": tables,
            "query_starts": torch.tensor([0, chunk, tokens]).int(), "context_lens": torch.tensor([context, 300]).int(),
            "workspace": workspace, "fault": _zeros(1, dtype=torch.int32), "tokens": tokens, "sequences": 2, "heads": 4,
            "kv_heads": 2, "dim": 64, "blocks": 31, "block_size": 16, "table_width": 27, "table_stride": 27,
            "q_token_stride": 256, "q_head_stride": 64, "most_tokens": chunk, "most_context": 432,
            "workspace_floats": workspace.numel(), "dtype": 1, "cache_dtype": 1, "scale": 0.125,
            "is_deterministic": is_deterministic,
        }),
    ]  # fmt: skip


def draw(random: torch.Generator) -> list[Call]:
    columns = {
        "temperature": torch.full((2,), 0.9), "top_k": torch.tensor([0, 40]), "top_p": torch.tensor([0.9, 0.8]),
        "min_p": torch.zeros(2), "uniform": torch.rand(2, generator=random, dtype=torch.float64),
    }  # fmt: skip
    logits, ids = torch.randn(2, 1500, generator=random), _zeros(2, dtype=torch.int64)
    return [
        ("draw", {"ids": ids, "logits": logits, "rows": 2, "vocabulary": 1500, "row_stride": 1500, **columns})
    ]


def feed_tokens(random: torch.Generator) -> list[Call]:
    drawn, sources = (
        torch.randint(40, (9,), generator=random),
        torch.arange(-5, 195, dtype=torch.int32) % 10 - 1,
    )
    ids = torch.randint(40, (200,), generator=random)
    return [
        ("feed_tokens", {"token_ids": ids, "drawn": drawn, "sources": sources, "tokens": 200, "rows": 9}),
    ]  # fmt: skip


def take_rows(random: torch.Generator) -> list[Call]:
    x, rows = torch.randn(5, 72, generator=random).to(BF16), torch.tensor([4, 0, 4])
    sizes = {"count": 3, "x_rows": 5, "row_bytes": 144}
    return [("take_rows", {"out": _zeros(3, 72), "x": x, "rows": rows, **sizes})]


def cap_logits(random: torch.Generator) -> list[Call]:
    sizes = {"rows": 2, "vocabulary": 300, "row_stride": 300, "cap": 30.0}
    return [("cap_logits", {"logits": torch.randn(2, 300, generator=random), **sizes})]


def adjust_logits(random: torch.Generator) -> list[Call]:
    ids = torch.randperm(300, generator=random).int()
    sizes = {"rows": 2, "vocabulary": 300, "row_stride": 300}
    penalty = {name: torch.tensor([1.5, 0.5]) for name in ("repetition", "presence", "frequency")}
    starts = torch.tensor([0, 270, 300], dtype=torch.int32)
    return [
        ("adjust_logits", {
            "logits": torch.randn(2, 300, generator=random), "bias_starts": starts, "bias_ids": ids,
            "biases": torch.randn(300, generator=random), "seen_starts": starts, "seen_ids": ids.flip(0),
            "seen_counts": torch.arange(300) % 3.0, **penalty, **sizes,
        }),
    ]  # fmt: skip


def mask_logits(random: torch.Generator) -> list[Call]:
    sizes = {"rows": 2, "vocabulary": 300, "row_stride": 300, "mask_bytes": 38}
    masks = torch.randint(256, (1, 38), generator=random).to(torch.uint8)
    fields = {"mask_of": torch.tensor([-1, 0], dtype=torch.int32), "masks": masks}
    return [("mask_logits", {"logits": torch.randn(2, 300, generator=random), **fields, **sizes})]


def score_logits(random: torch.Generator) -> list[Call]:
    sizes = {"count": 2, "logits_rows": 3, "vocabulary": 1300, "row_stride": 1300, "width": 4}
    return [
        ("score_logits", {
            "totals": _zeros(2, dtype=torch.float64), "top_ids": _zeros(2, 4, dtype=torch.int32),
            "top_values": _zeros(2, 4, dtype=torch.float32), "logits": torch.randn(3, 1300, generator=random),
            "rows": torch.tensor([2, 0]), "tops": torch.tensor([4, 1], dtype=torch.int32), **sizes,
        }),
    ]  # fmt: skip


def pick_logits(random: torch.Generator) -> list[Call]:
    logits, values = torch.randn(3, 1300, generator=random), _zeros(2, dtype=torch.float32)
    sizes = {"count": 2, "logits_rows": 3, "vocabulary": 1300, "row_stride": 1300}
    fields = {"rows": torch.tensor([2, 0]), "ids": torch.tensor([1299, 5, 0])}
    return [("pick_logits", {"values": values, "logits": logits, **fields, **sizes})]


REGION_BYTES = 4096 + 2 * 2560


def all_reduce(random: torch.Generator, steps: int = 2) -> list[Call]:
    """Three ranks, to be run together."""
    regions = _zeros(3, REGION_BYTES, dtype=torch.uint8)
    pointers = torch.tensor([region.data_ptr() for region in regions])
    sizes = {"count": 1200, "ranks": 3, "slot_bytes": 2560, "dtype": 1, "steps": steps}
    parts = [torch.randn(1200, generator=random).to(BF16) for _ in range(3)]
    # The header's last bytes are nobody's: a rank that is told to stop would write there.
    spare = regions[0, 4092:4096]
    return [
        ("all_reduce", {"x": part, "regions": pointers, "fault": spare, "rank": rank, **sizes})
        for rank, part in enumerate(parts)
    ]


def gather_columns(random: torch.Generator) -> list[Call]:
    """Two ranks, to be run together."""
    regions = _zeros(2, REGION_BYTES, dtype=torch.uint8)
    pointers, widths = torch.tensor([region.data_ptr() for region in regions]), torch.tensor([200, 100])
    sizes = {"rows": 3, "out_stride": 300, "ranks": 2, "slot_bytes": 2560}
    spare, out = regions[0, 4092:4096], torch.zeros(3, 300)
    parts = [torch.randn(3, width, generator=random) for width in (200, 100)]
    shared = {"widths": widths, "regions": pointers, "fault": spare, **sizes}
    return [
        ("gather_columns", {"x": parts[0], "x_stride": 200, "rank": 0, "out": out, **shared}),
        ("gather_columns", {"x": parts[1], "x_stride": 100, "rank": 1, **shared}),
    ]


TOGETHER = ("all_reduce", "gather_columns")
"""Operators whose examples are ranks that wait for each other."""

EXAMPLES = {
    function.__name__: function
    for function in (
        *(rms_norm, add_rms_norm, rope_write_kv, gated_activation, embed, linear, linear_quantised),
        *(paged_attention, draw, all_reduce, gather_columns),
        *(feed_tokens, take_rows, cap_logits, adjust_logits, mask_logits, score_logits, pick_logits),
    )
}


class _Memory:
    """The storages that calls point into."""

    def __init__(self) -> None:
        self.storages: list[Tensor] = []

    def place(self, address: int) -> tuple[int, int] | None:
        """A storage and an offset in it."""
        for index, storage in enumerate(self.storages):
            if storage.data_ptr() <= address < storage.data_ptr() + storage.numel():
                return index, address - storage.data_ptr()
        return None

    def add(self, tensor: Tensor) -> None:
        if self.place(tensor.data_ptr()) is None:
            self.storages.append(torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()))


def record(calls: list[Call], to: Path) -> None:
    """All that tests/process/replay.cpp needs to run the calls elsewhere: memory, the places in it that point into it,
    and each operator's struct with its pointers."""
    memory = _Memory()
    for _, fields in calls:
        for value in fields.values():
            if isinstance(value, Tensor):
                memory.add(value)
    words = [storage.numel() for storage in memory.storages]
    data = struct.pack("=q", len(words)) + struct.pack(f"={len(words)}q", *words)
    links = []
    for index, storage in enumerate(memory.storages):
        data += bytes(storage.tolist())
        if storage.numel() <= 64 and storage.numel() % 8 == 0:
            for offset, word in enumerate(storage.view(torch.int64).tolist()):
                if (place := memory.place(word)) is not None:
                    links.append((index, offset * 8, *place))
    data += struct.pack("=q", len(links)) + b"".join(struct.pack("=4q", *link) for link in links)
    data += struct.pack("=q", len(calls))
    for operator, fields in calls:
        packed = pack(operator, fields)
        places = [
            (at, *place)
            for at in range(0, len(packed), 8)
            if (place := memory.place(struct.unpack_from("=q", packed, at)[0])) is not None
        ]
        data += struct.pack("=32sqq", operator.encode(), len(packed), len(places))
        data += packed + b"".join(struct.pack("=3q", *place) for place in places)
    to.write_bytes(data)
