"""Plans for a rank, as the scheduler would send them."""

from typing import Any

from shoal.messages import StepPlan
from shoal.wire import pack_ids


def plan(rows: list[tuple[int, int, int, bool, list[int]]], **changes: Any) -> StepPlan:
    """Rows are (slot, start, count, samples, new blocks)."""
    fields: dict[str, Any] = {
        "crew_epoch": 1,
        "step_id": 1,
        "leave": b"",
        "admit": (),
        "slots": pack_ids(row[0] for row in rows),
        "starts": pack_ids(row[1] for row in rows),
        "counts": pack_ids(row[2] for row in rows),
        "samples": bytes(row[3] for row in rows),
        "block_counts": pack_ids(len(row[4]) for row in rows),
        "new_blocks": pack_ids(block for row in rows for block in row[4]),
    }
    return StepPlan(**(fields | changes))
