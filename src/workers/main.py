"""``python -m shoal.workers.main SETTINGS.json RANK``: one tensor-parallel rank."""

import sys
from pathlib import Path

import torch

from shoal import config, logs, process
from shoal.cuda_ext import ops
from shoal.errors import StartError
from shoal.workers.loop import RankLoop


def main() -> int:
    """Runs the rank until it is told to stop; returns the exit code."""
    process.die_with_supervisor()
    settings = config.load(Path(sys.argv[1]))
    rank = int(sys.argv[2])
    logs.configure(f"rank{rank}", settings.log_level)
    threads = max(1, settings.threads // settings.tp)
    torch.set_num_threads(threads)
    ops.set_threads(threads)
    try:
        RankLoop(settings, rank).run()
    except StartError as error:
        sys.stderr.write(f"error: {error}\n")
        return process.START_FAILED_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
